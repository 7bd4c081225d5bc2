//! Chance from a seed, and clocks that drift: the only sources of either in a simulation.

/// SplitMix64: small, and the same on every machine.
#[derive(Clone, Debug)]
pub struct Dice(u64);

impl Dice {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x1234_5678_9abc_def1)
    }

    pub fn roll(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// 0 to `n` − 1; 0 when there is nothing to choose from.
    pub fn below(&mut self, n: u64) -> u64 {
        self.roll() % n.max(1)
    }

    pub fn between(&mut self, least: u64, most: u64) -> u64 {
        least + self.below(most - least + 1)
    }

    pub fn permille(&mut self, of_thousand: u64) -> bool {
        self.below(1000) < of_thousand
    }

    pub fn pick<T: Clone>(&mut self, from: &[T]) -> Option<T> {
        let at = usize::try_from(self.below(from.len() as u64)).unwrap_or(0);
        from.get(at).cloned()
    }

    /// Nanoseconds: mostly short, now and then long.
    pub fn delay(&mut self, usual_millis: u64, long_millis: u64, long_permille: u64) -> u64 {
        let most = if self.permille(long_permille) { long_millis } else { usual_millis };
        self.below(most * MILLI + 1)
    }
}

pub const MILLI: u64 = 1_000_000;
pub const SECOND: u64 = 1000 * MILLI;

/// A CLOCK_BOOTTIME: starts where it likes, runs a little too fast or too slow, is never stepped.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    /// True time at which it showed `start`.
    origin: u64,
    start: u64,
    ppm: i64,
}

/// Half of what `model::lease` allows between any two clocks.
const MOST_PPM: u64 = model::lease::DRIFT_PPM / 2;

impl Clock {
    pub fn new(now: u64, dice: &mut Dice) -> Self {
        let ppm = dice.below(2 * MOST_PPM - 1) as i64 - MOST_PPM as i64 + 1;
        Self { origin: now, start: dice.below(1_000_000) * SECOND, ppm }
    }

    /// The machine boots again: the same crystal, from the beginning.
    pub fn reboot(&mut self, now: u64) {
        (self.origin, self.start) = (now, 1);
    }

    pub fn at(&self, now: u64) -> u64 {
        let passed = i128::from(now - self.origin) * (1_000_000 + i128::from(self.ppm)) / 1_000_000;
        self.start + u64::try_from(passed).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clocks_stay_within_the_bound_of_leases() {
        let mut dice = Dice::new(7);
        let clocks: Vec<Clock> = (0..200).map(|_| Clock::new(0, &mut dice)).collect();
        let passed: Vec<u64> = clocks.iter().map(|clock| clock.at(1000 * SECOND) - clock.at(0)).collect();
        let (least, most) = (*passed.iter().min().unwrap(), *passed.iter().max().unwrap());
        assert!((most - least) as u128 * 1_000_000 <= u128::from(model::lease::DRIFT_PPM) * u128::from(least));
        assert!(most - least > SECOND / 2, "they differ enough to matter");
    }
}
