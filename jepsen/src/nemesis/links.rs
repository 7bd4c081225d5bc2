//! Links that carry nothing, or not everything.

use std::time::Duration;

use super::{Proof, Scene, background::Background};
use crate::{chance::Chance, cluster::Cluster};

/// A flapping link stays down, and then up, for a time between these.
const FLAP_SHORTEST: Duration = Duration::from_millis(100);
const FLAP_LONGEST_MILLIS: usize = 2000;

/// From whom to whom nothing comes.
pub type Cuts = Vec<(usize, usize)>;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    LeaderAlone,
    FollowerAlone,
    /// The leader is with the fewer.
    LeaderInMinority,
    /// Two parts, who is where by chance.
    Halves,
    /// Each sees a majority, and no two see the same.
    Ring,
    /// Two parts that only one controller sees both of.
    Bridge,
    /// One link is cut: everybody still has a path.
    OneLink,
    /// The leader is heard but hears nobody.
    DeafLeader,
    /// The leader hears but nobody hears it.
    MuteLeader,
    /// A follower is heard but hears nobody.
    DeafFollower,
    /// A part of all packets from and to the leader is lost.
    Lossy,
    /// The link between the leader and a follower comes and goes.
    Flapping,
    /// What the leader sends is late.
    Late,
}

impl Shape {
    /// Where links carry something.
    pub const WEAK: [Self; 6] =
        [Self::DeafLeader, Self::MuteLeader, Self::Flapping, Self::Lossy, Self::DeafFollower, Self::Late];

    /// Where links carry nothing in either direction, as far as they differ in a quorum of this size.
    pub fn cuts(controllers: usize) -> Vec<Self> {
        match controllers {
            ..=3 => vec![Self::LeaderAlone, Self::OneLink, Self::Halves, Self::FollowerAlone],
            _ => vec![Self::LeaderInMinority, Self::Ring, Self::Bridge, Self::OneLink, Self::LeaderAlone, Self::Halves],
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::LeaderAlone => "isolate leader",
            Self::FollowerAlone => "isolate follower",
            Self::LeaderInMinority => "leader in minority",
            Self::Halves => "halves",
            Self::Ring => "ring",
            Self::Bridge => "bridge",
            Self::OneLink => "cut one link",
            Self::DeafLeader => "deaf leader",
            Self::MuteLeader => "mute leader",
            Self::DeafFollower => "deaf follower",
            Self::Lossy => "lossy leader",
            Self::Flapping => "flapping link",
            Self::Late => "late leader",
        }
    }

    /// `order`: the leader first, the others in any order. Empty for what is no cut.
    pub fn cut(self, order: &[usize]) -> Cuts {
        let all = order.len();
        let (leader, followers) = (order[0], &order[1..]);
        match self {
            Self::LeaderAlone => apart(&[leader], followers),
            Self::FollowerAlone => apart(&followers[..1], &[&[leader], &followers[1..]].concat()),
            Self::LeaderInMinority => apart(&order[..(all - 1) / 2], &order[(all - 1) / 2..]),
            Self::Halves => {
                // By chance of the order of the followers, the leader is on either side.
                let mut shuffled = followers.to_vec();
                shuffled.insert(followers[0] % all, leader);
                apart(&shuffled[..all / 2], &shuffled[all / 2..])
            }
            Self::Ring => (0..all)
                .flat_map(|a| (0..all).map(move |b| (a, b)))
                .filter(|(a, b)| a != b && (a + 1) % all != *b && (b + 1) % all != *a)
                .map(|(a, b)| (order[a], order[b]))
                .collect(),
            Self::Bridge => {
                let half = (all - 1) / 2;
                apart(&order[..half], &order[half + 1..])
            }
            Self::OneLink => apart(&[leader], &followers[..1]),
            Self::DeafLeader => followers.iter().map(|from| (*from, leader)).collect(),
            Self::MuteLeader => followers.iter().map(|to| (leader, *to)).collect(),
            Self::DeafFollower => {
                order.iter().filter(|from| **from != order[1]).map(|from| (*from, order[1])).collect()
            }
            Self::Lossy | Self::Flapping | Self::Late => Vec::new(),
        }
    }
}

/// Both directions between each of these and each of those.
fn apart(these: &[usize], those: &[usize]) -> Cuts {
    these.iter().flat_map(|a| those.iter().flat_map(move |b| [(*a, *b), (*b, *a)])).collect()
}

/// A majority of which each hears each other, if there is one.
pub fn connected_majority(size: usize, cuts: &Cuts) -> Option<Vec<usize>> {
    let sets = (0_u32..1 << size).filter(|set| set.count_ones() as usize > size / 2);
    let members = |set: u32| (0..size).filter(|member| set & (1 << member) != 0).collect::<Vec<_>>();
    let whole = |among: &[usize]| !cuts.iter().any(|(from, to)| among.contains(from) && among.contains(to));
    sets.map(members).filter(|among| whole(among)).max_by_key(Vec::len)
}

/// What is to be undone.
pub enum Held {
    Cut { cuts: Cuts, dropped_before: u64 },
    Weak { leader: usize, others: Vec<usize>, dropped_before: u64 },
    Flapping { background: Background, between: (usize, usize), dropped_before: u64 },
    Late { leader: usize },
}

/// # Errors
/// When the harness itself fails.
pub fn begin(
    cluster: &Cluster,
    shape: Shape,
    scene: &Scene,
    proof: &mut Proof,
    chance: &mut Chance,
) -> anyhow::Result<Held> {
    let leader = scene.leader;
    let others = chance.shuffle((0..scene.size).filter(|controller| *controller != leader).collect());
    let dropped_before = cluster.dropped()?;
    match shape {
        Shape::Lossy => {
            for other in &others {
                cluster.link(*other, leader)?.weaken()?;
                cluster.link(leader, *other)?.weaken()?;
            }
            proof.targets.insert(leader);
            Ok(Held::Weak { leader, others, dropped_before })
        }
        Shape::Flapping => {
            let between = (leader, others[0]);
            proof.targets.extend([leader, others[0]]);
            proof.must_write = true;
            Ok(Held::Flapping { background: flap(cluster, between, chance.split())?, between, dropped_before })
        }
        Shape::Late => {
            cluster.delay(leader, true)?;
            proof.targets.insert(leader);
            proof.must_write = true;
            "what it sends is delayed by the kernel".clone_into(&mut proof.evidence);
            Ok(Held::Late { leader })
        }
        _ => {
            let cuts = shape.cut(&[&[leader], &others[..]].concat());
            for (from, to) in &cuts {
                cluster.cut(*from, *to)?;
            }
            proof.targets.extend(hit(&cuts));
            proof.must_write = connected_majority(scene.size, &cuts).is_some();
            Ok(Held::Cut { cuts, dropped_before })
        }
    }
}

/// Those with the most cuts: of one alone, that one.
fn hit(cuts: &Cuts) -> Vec<usize> {
    let count = |member: usize| cuts.iter().filter(|(from, to)| *from == member || *to == member).count();
    let members: std::collections::BTreeSet<usize> = cuts.iter().flat_map(|(from, to)| [*from, *to]).collect();
    let most = members.iter().map(|member| count(*member)).max().unwrap_or(0);
    members.into_iter().filter(|member| count(*member) == most).collect()
}

/// Down and up for times by chance, until it is stopped.
pub fn flap(cluster: &Cluster, (a, b): (usize, usize), mut chance: Chance) -> anyhow::Result<Background> {
    let links = [cluster.link(a, b)?, cluster.link(b, a)?];
    let some_time =
        move |chance: &mut Chance| FLAP_SHORTEST + Duration::from_millis(chance.below(FLAP_LONGEST_MILLIS) as u64);
    Ok(Background::start(move || {
        let (down, up, links) = (some_time(&mut chance), some_time(&mut chance), links.clone());
        async move {
            links.iter().try_for_each(crate::cluster::switch::Link::cut)?;
            tokio::time::sleep(down).await;
            links.iter().try_for_each(crate::cluster::switch::Link::mend)?;
            tokio::time::sleep(up).await;
            Ok(())
        }
    }))
}

impl Held {
    /// # Errors
    /// When the harness itself fails.
    pub async fn end(self, cluster: &Cluster, proof: &mut Proof) -> anyhow::Result<()> {
        let (mended, before, turns) = match self {
            Self::Late { leader } => return cluster.delay(leader, false),
            Self::Flapping { background, between, dropped_before } => {
                (apart(&[between.0], &[between.1]), dropped_before, Some(background.stop().await?))
            }
            Self::Weak { leader, others, dropped_before } => (apart(&[leader], &others), dropped_before, None),
            Self::Cut { cuts, dropped_before } => (cuts, dropped_before, None),
        };
        let dropped = cluster.dropped()? - before;
        for (from, to) in mended {
            cluster.link(from, to)?.mend()?;
        }
        proof.evidence = format!("{dropped} packets dropped");
        if let Some(turns) = turns {
            proof.evidence += &format!(", down {turns} times");
        }
        if dropped == 0 {
            proof.doubt("no packet met the cut");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hears(cuts: &Cuts, who: usize, size: usize) -> usize {
        (0..size).filter(|from| !cuts.contains(&(*from, who))).count()
    }

    #[test]
    fn in_a_ring_each_sees_a_majority_and_no_majority_is_connected() {
        let cuts = Shape::Ring.cut(&[2, 0, 4, 1, 3]);
        assert!((0..5).all(|who| hears(&cuts, who, 5) == 3));
        assert_eq!(connected_majority(5, &cuts), None);
    }

    #[test]
    fn a_bridge_is_in_two_majorities() {
        let cuts = Shape::Bridge.cut(&[0, 1, 2, 3, 4]);
        assert_eq!(hears(&cuts, 2, 5), 5);
        assert!([0, 1, 3, 4].iter().all(|who| hears(&cuts, *who, 5) == 3));
        assert_eq!(connected_majority(5, &cuts).map(|majority| majority.len()), Some(3));
    }

    #[test]
    fn a_majority_is_connected_where_each_hears_each() {
        assert_eq!(connected_majority(3, &Shape::LeaderAlone.cut(&[1, 0, 2])), Some(vec![0, 2]));
        assert_eq!(connected_majority(3, &Shape::OneLink.cut(&[0, 1, 2])), Some(vec![1, 2]));
        assert_eq!(connected_majority(3, &Shape::DeafLeader.cut(&[0, 1, 2])), Some(vec![1, 2]));
        assert_eq!(connected_majority(3, &vec![(0, 1), (1, 2), (2, 0)]), None, "each link in one direction only");
        assert_eq!(connected_majority(3, &Vec::new()), Some(vec![0, 1, 2]));
        assert_eq!(connected_majority(5, &Shape::LeaderInMinority.cut(&[4, 3, 2, 1, 0])), Some(vec![0, 1, 2]));
    }
}
