//! Amounts as people write and read them: sizes, durations, decimal numbers, money. Exact in both directions where
//! the value is sent; rounded only for tables.

use std::time::Duration;

const UNITS: [(&str, u32); 6] = [("PiB", 50), ("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10), ("B", 0)];

/// `512MiB`, `10G`, `1.5TiB`: powers of 1024, as bytes; a bare number is bytes.
///
/// # Errors
/// With a sentence that says what is allowed.
pub fn size(text: &str) -> Result<u64, String> {
    let refused = || format!("'{text}' is not a size: write bytes, or a number with KiB, MiB, GiB or TiB");
    let (number, unit) = split_unit(text);
    let shift = match unit {
        "" => 0,
        unit => {
            let same =
                |&&(name, _): &&(&str, u32)| name.eq_ignore_ascii_case(unit) || name[..1].eq_ignore_ascii_case(unit);
            UNITS.iter().find(same).ok_or_else(refused)?.1
        }
    };
    let (digits, thousandths) = decimal_parts(number, 3).ok_or_else(refused)?;
    let exact = (u128::from(digits) * 1000 + u128::from(thousandths)) << shift;
    if exact % 1000 != 0 {
        // 0.1 GiB is not a whole number of bytes.
        return u64::try_from(exact / 1000 / 512 * 512).map_err(|_| refused());
    }
    u64::try_from(exact / 1000).map_err(|_| refused())
}

/// At most four digits and a unit, for tables: `1.5 GiB`.
pub fn size_text(bytes: u64) -> String {
    let (unit, shift) = UNITS.into_iter().find(|&(_, shift)| bytes >> shift > 0).unwrap_or(("B", 0));
    let whole = bytes >> shift;
    let tenths = ((u128::from(bytes) * 10) >> shift) % 10;
    if shift == 0 || whole >= 100 || tenths == 0 {
        format!("{whole} {unit}")
    } else {
        format!("{whole}.{tenths} {unit}")
    }
}

/// `250ms`, `30s`, `10m`, `2h`, `7d`; a bare number is seconds.
///
/// # Errors
/// With a sentence that says what is allowed.
pub fn duration(text: &str) -> Result<Duration, String> {
    let refused = || format!("'{text}' is not a duration: write a number with ms, s, m, h or d");
    let (number, unit) = split_unit(text);
    let millis = match unit {
        "ms" => 1,
        "" | "s" => 1000,
        "m" => 60_000,
        "h" => 3_600_000,
        "d" => 86_400_000,
        _ => return Err(refused()),
    };
    let (whole, thousandths) = decimal_parts(number, 3).ok_or_else(refused)?;
    let total = (u128::from(whole) * 1000 + u128::from(thousandths)) * millis / 1000;
    // A century: more is a mistake, and would overflow a clock.
    match u64::try_from(total) {
        Ok(total) if total <= 3_155_760_000_000 => Ok(Duration::from_millis(total)),
        _ => Err(refused()),
    }
}

/// Two units at most, for tables: `2d 3h`, `1m 5s`, `250ms`.
pub fn duration_text(millis: u64) -> String {
    let seconds = millis / 1000;
    match seconds {
        0 => format!("{millis}ms"),
        1..60 => format!("{seconds}s"),
        60..3600 => format!("{}m {}s", seconds / 60, seconds % 60),
        3600..86_400 => format!("{}h {}m", seconds / 3600, seconds / 60 % 60),
        _ => format!("{}d {}h", seconds / 86_400, seconds / 3600 % 24),
    }
}

/// A weight: `1`, `1.5`, `0.125`, as thousandths.
///
/// # Errors
/// With a sentence that says what is allowed.
pub fn milli(text: &str) -> Result<u64, String> {
    scaled(text, 3).ok_or_else(|| format!("'{text}' is not a number with at most three decimals"))
}

/// An amount of currency: `0.05`, as nano-units.
///
/// # Errors
/// With a sentence that says what is allowed.
pub fn nano(text: &str) -> Result<u64, String> {
    scaled(text, 9).ok_or_else(|| format!("'{text}' is not an amount with at most nine decimals"))
}

/// Thousandths, without zeros that say nothing: `1.5`.
pub fn milli_text(milli: u64) -> String {
    decimal_text(milli, 3, 0)
}

/// Nano-units, with two decimals or as many as it takes to be exact: `0.05`, `1.000000001`.
pub fn nano_text(nano: u64) -> String {
    decimal_text(nano, 9, 2)
}

fn scaled(text: &str, decimals: u32) -> Option<u64> {
    let (whole, fraction) = decimal_parts(text, decimals)?;
    whole.checked_mul(10u64.pow(decimals))?.checked_add(fraction)
}

/// The whole part, and the fraction in units of `10^-decimals`.
fn decimal_parts(text: &str, decimals: u32) -> Option<(u64, u64)> {
    let (whole, fraction) = text.split_once('.').unwrap_or((text, "0"));
    let digits = |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit());
    if !digits(whole) || !digits(fraction) || fraction.len() > decimals as usize {
        return None;
    }
    let missing = decimals - u32::try_from(fraction.len()).ok()?;
    Some((whole.parse().ok()?, fraction.parse::<u64>().ok()? * 10u64.pow(missing)))
}

fn decimal_text(value: u64, decimals: usize, at_least: usize) -> String {
    let unit = 10u64.pow(u32::try_from(decimals).unwrap_or(9));
    let mut fraction = format!("{:0decimals$}", value % unit);
    while fraction.len() > at_least && fraction.ends_with('0') {
        fraction.pop();
    }
    let point = if fraction.is_empty() { "" } else { "." };
    format!("{}{point}{fraction}", value / unit)
}

fn split_unit(text: &str) -> (&str, &str) {
    let text = text.trim();
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    (&text[..end], text[end..].trim_start())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_read_and_write() {
        let read =
            [("0", 0), ("512", 512), ("1KiB", 1024), ("512 MiB", 512 << 20), ("10g", 10 << 30), ("1.5G", 3 << 29)];
        for (text, bytes) in read {
            assert_eq!(size(text), Ok(bytes), "{text}");
        }
        for bad in ["", "G", "-1", "1e3", "1.2345G", "99999999999P", "1 KB", "１"] {
            assert!(size(bad).is_err(), "{bad}");
        }
        assert_eq!(size("0.1G").unwrap() % 512, 0);
        let written = [0, 1023, 1024, 1536, 100 << 30, (1 << 40) + 1, u64::MAX].map(size_text);
        assert_eq!(written, ["0 B", "1023 B", "1 KiB", "1.5 KiB", "100 GiB", "1 TiB", "16383 PiB"]);
    }

    #[test]
    fn durations_read_and_write() {
        let read =
            [("5", 5000), ("250ms", 250), ("1.5s", 1500), ("2m", 120_000), ("1h", 3_600_000), ("7d", 604_800_000)];
        for (text, millis) in read {
            assert_eq!(duration(text), Ok(Duration::from_millis(millis)), "{text}");
        }
        for bad in ["", "s", "1y", "-1s", "99999999999d"] {
            assert!(duration(bad).is_err(), "{bad}");
        }
        let written = [5, 59_999, 65_000, 7_260_000, 183_600_000].map(duration_text);
        assert_eq!(written, ["5ms", "59s", "1m 5s", "2h 1m", "2d 3h"]);
    }

    #[test]
    fn money_and_weights_are_exact() {
        assert_eq!((nano("0.05"), nano("12"), nano("0.000000001")), (Ok(50_000_000), Ok(12_000_000_000), Ok(1)));
        for bad in ["", ".5", "1.", "0.0000000001", "1,5", "-1", "99999999999"] {
            assert!(nano(bad).is_err(), "{bad}");
        }
        assert_eq!([50_000_000, 1, 1_500_000_000, 0].map(nano_text), ["0.05", "0.000000001", "1.50", "0.00"]);
        assert_eq!([1000, 1500, 125].map(milli_text), ["1", "1.5", "0.125"]);
        assert_eq!(milli("1.5"), Ok(1500));
    }
}
