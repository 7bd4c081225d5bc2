//! Both ends of a move between hosts. The guest runs on one side at any instant: what has left does not run here again
//! unless the move is given up, and what has arrived does not run here before it was handed over. One that is wished
//! stopped goes as it lies on the disk, by the same steps.
//!
//! ```text
//!  source:       on or off ── migrate, once ──► moved ── told ──► given up: cancel, and it goes on or boots
//!  destination:  nothing ── prepare ──► arriving ──► arrived ── told ──►   handed over: finish; given up: remove
//! ```
//! A move is tried once: what a first try wrote into the disk over there would stay in it. Another is another move, under
//! another placement. Deliberately not here: when a guest moves, and who has it.

use super::{FoundPower, Memory, Next, Observed, Step, Subject, next};
use crate::{
    MoveEnd, Phase, Power, VmWish,
    command::{MoveOutcome, MoveReport},
};

/// Whether a move has to be brought to its end before anything that its owner wants of a guest can be done.
pub(super) fn comes_first(wish: &VmWish, power: FoundPower, memory: Memory) -> bool {
    let midway = matches!(power, FoundPower::Arriving | FoundPower::Arrived | FoundPower::Moved);
    midway || (memory.leaving.is_some() && memory.leaving != end(wish))
}

pub(super) fn settle(wish: &VmWish, power: FoundPower, memory: Memory) -> Next {
    match power {
        FoundPower::Arriving => Next::Wait,
        FoundPower::Arrived => Next::Do(Step::FinishMigration { vm: wish.vm, run: wish.power == Power::Running }),
        FoundPower::Moved if may_have_left(wish, memory) => Next::Wait,
        _ => Next::Do(Step::CancelMigration(wish.vm)),
    }
}

/// It was sent away in the move that is still wished. Whatever is seen of it here (a host that lost its power may have forgotten
/// why a guest is off), it may be all there, and handed over at any moment: it is not started before the quorum has said whose it is.
pub(super) fn may_have_left(wish: &VmWish, memory: Memory) -> bool {
    memory.leaving.is_some() && memory.leaving == end(wish)
}

fn end(wish: &VmWish) -> Option<u64> {
    wish.moves.as_ref().map(|end| end.epoch)
}

/// The source's side: once the guest is as its owner wants it, it goes.
pub(super) fn departure(generation: u64, wish: &VmWish, found: &Observed, out: &mut Vec<Step>) {
    let Some(end) = wish.moves.as_ref().filter(|_| wish.power != Power::Arriving) else { return };
    let Some(guest) = found.guest(wish) else { return nothing_departs(generation, wish, end, found, out) };
    if guest.epoch != wish.epoch {
        return;
    }
    let tried = found.memory(wish).leaving == Some(end.epoch);
    if tried && guest.power == FoundPower::Moved {
        return tell(wish, end, found, MoveOutcome::Left, out);
    }
    if found.leaving.contains(&wish.vm) {
        return;
    }
    if tried {
        let known = found.moves_failed.get(&wish.vm).filter(|(epoch, _)| *epoch == end.epoch);
        let reason = known.map_or("its agent began anew while it moved", |(_, reason)| reason);
        return tell(wish, end, found, MoveOutcome::Failed(reason.into()), out);
    }
    let as_wished = match next(wish, found) {
        Next::Rest { phase: Phase::Running | Phase::Suspended, .. } => true,
        // One that went down by itself is told first: its owner may want it on again.
        Next::Rest { phase: Phase::Stopped, .. } => wish.power == Power::Stopped,
        Next::Rest { .. } | Next::Do(_) | Next::Wait => false,
    };
    if as_wished && found.may_try(Subject::Vm(wish.vm), generation) {
        out.push(Step::Migrate { vm: wish.vm, epoch: end.epoch });
    }
}

/// A machine that was stopped before its first start has no guest. What was begun of it is removed first, for it may be a
/// start that is still under way. Where it has run, what it wrote is gone: it is not moved, lest it come up blank elsewhere.
fn nothing_departs(generation: u64, wish: &VmWish, end: &MoveEnd, found: &Observed, out: &mut Vec<Step>) {
    let memory = found.memory(wish);
    if wish.power != Power::Stopped {
        return;
    }
    if memory.ran {
        let reason = "it has run, and nothing of it is found here";
        tell(wish, end, found, MoveOutcome::Failed(reason.into()), out);
    } else if !memory.begun {
        tell(wish, end, found, MoveOutcome::Nothing, out);
    } else if found.may_try(Subject::Vm(wish.vm), generation) {
        out.push(Step::Remove(wish.vm));
    }
}

/// The destination's side, until the hand-over.
pub(super) fn arrival(generation: u64, wish: &VmWish, found: &Observed, out: &mut Vec<Step>) {
    let Some(end) = &wish.moves else { return };
    let subject = Subject::Vm(wish.vm);
    match found.guest(wish) {
        Some(guest) if guest.epoch > wish.epoch => {}
        Some(guest) if guest.epoch < wish.epoch => {
            if found.may_try(subject, generation) {
                out.push(Step::Quarantine { vm: wish.vm, epoch: guest.epoch });
            }
        }
        Some(guest) => match guest.power {
            FoundPower::Arrived => tell(wish, end, found, MoveOutcome::Arrived, out),
            FoundPower::Arriving => {}
            _ => {
                let reason = "what had come went down before it was handed over";
                tell(wish, end, found, MoveOutcome::Failed(reason.into()), out);
            }
        },
        None => {
            if let Some(failure) = found.failure(wish) {
                return tell(wish, end, found, MoveOutcome::Failed(failure.reason.clone()), out);
            }
            let plugged = wish.nics.iter().all(|nic| found.networks.get(&nic.vni) == Some(&true));
            let ready = plugged && found.holds(&wish.image);
            let expected = found.expected.get(&wish.vm) == Some(&wish.epoch);
            if ready && !expected && found.may_try(subject, generation) {
                out.push(Step::PrepareMigration(wish.vm));
            }
        }
    }
}

fn tell(wish: &VmWish, end: &MoveEnd, found: &Observed, outcome: MoveOutcome, out: &mut Vec<Step>) {
    let report = MoveReport { vm: wish.vm, epoch: end.epoch, outcome };
    if found.told_moves.get(&wish.vm) != Some(&report) {
        out.push(Step::ReportMove(report));
    }
}
