//! States of the links between controllers, told from the leader's point of view.

use std::time::Duration;

use crate::nemesis::links::{Cuts, Shape, connected_majority};

/// The product's longest election timeout; `noisy` is what a controller has unless it is told otherwise.
const ELECTION_MAX: Duration = Duration::from_secs(1);
/// A follower that has heard a leader waits for one longest timeout as that leader's lease, and then for its own, before
/// it asks for votes: two. The first attempt may be split, so twice that; and a second for the machine and the client.
pub const BOUND: Duration = Duration::from_millis(2 * 2 * ELECTION_MAX.as_millis() as u64 + 1000);

/// What the links are, with 0 for the leader and 1.. for the others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct State {
    pub name: String,
    pub cuts: Cuts,
    /// The link between these comes and goes.
    pub flapping: Option<(usize, usize)>,
}

impl State {
    /// A majority that is connected the whole time.
    pub fn majority(&self, controllers: usize) -> Option<Vec<usize>> {
        let flapping = self.flapping.iter().flat_map(|(a, b)| [(*a, *b), (*b, *a)]);
        connected_majority(controllers, &self.cuts.iter().copied().chain(flapping).collect())
    }
}

/// The six directed links of three controllers, in every combination.
pub fn of_three() -> Vec<State> {
    let links = [(0, 1), (1, 0), (0, 2), (2, 0), (1, 2), (2, 1)];
    let cut =
        |state: u32| links.iter().enumerate().filter(move |(bit, _)| state >> bit & 1 == 1).map(|(_, link)| *link);
    (0..64).map(|state| named(cut(state).collect())).collect()
}

/// A few of them that each broke some system: a cut link of three, a leader alone, half-deaf leaders and followers, one
/// way round.
pub fn selection() -> Vec<State> {
    let wanted = ["L a=b L", "L=a b=L", "L>a=b<L", "L<a=b>L", "L=a>b=L", "L>a>b>L"];
    of_three().into_iter().filter(|state| wanted.contains(&state.name.as_str())).collect()
}

/// What five controllers have that three have not.
pub fn of_five() -> Vec<State> {
    let shaped = |name: &str, shape: Shape, order: [usize; 5]| State {
        name: name.to_owned(),
        cuts: shape.cut(&order),
        flapping: None,
    };
    let flapping = |name: &str, between| State { name: name.to_owned(), cuts: Vec::new(), flapping: Some(between) };
    vec![
        shaped("bridge, leader beside it", Shape::Bridge, [0, 1, 2, 3, 4]),
        shaped("bridge, leader is it", Shape::Bridge, [1, 2, 0, 3, 4]),
        shaped("ring", Shape::Ring, [0, 1, 2, 3, 4]),
        shaped("one link cut, of the leader", Shape::OneLink, [0, 1, 2, 3, 4]),
        shaped("one link cut, of others", Shape::OneLink, [1, 2, 0, 3, 4]),
        shaped("leader in minority", Shape::LeaderInMinority, [0, 1, 2, 3, 4]),
        flapping("flapping, of the leader", (0, 1)),
        flapping("flapping, of others", (1, 2)),
    ]
}

/// As a circle of the leader L and the others, a and b: `L>a` when only a hears L, `L=a` when both hear each other,
/// `L a` when neither does.
fn named(cuts: Cuts) -> State {
    let names = ["L", "a", "b"];
    let mut name = "L".to_owned();
    for (from, to) in [(0, 1), (1, 2), (2, 0)] {
        name += match (cuts.contains(&(from, to)), cuts.contains(&(to, from))) {
            (false, false) => "=",
            (false, true) => ">",
            (true, false) => "<",
            (true, true) => " ",
        };
        name += names[to];
    }
    State { name, cuts, flapping: None }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn there_are_sixty_four_states_of_three_and_37_have_a_connected_majority() {
        let states = of_three();
        assert_eq!(states.iter().map(|state| state.name.clone()).collect::<BTreeSet<_>>().len(), 64);
        assert_eq!(states.iter().filter(|state| state.majority(3).is_some()).count(), 37);
        assert_eq!(states[0].name, "L=a=b=L");
    }

    #[test]
    fn the_selection_exists_and_has_one_state_without_a_majority() {
        assert_eq!(selection().len(), 6);
        assert_eq!(selection().iter().filter(|state| state.majority(3).is_none()).count(), 1);
    }

    #[test]
    fn of_five_only_the_ring_has_no_connected_majority() {
        let without: Vec<String> =
            of_five().into_iter().filter(|state| state.majority(5).is_none()).map(|state| state.name).collect();
        assert_eq!(without, ["ring"]);
    }
}
