//! Backups that the host is to boot apart from everything: begun once the bytes are here, told once it is known what
//! came of it. One that is in no wish any more is ended by the executor, for it is under way then.

use super::{Observed, Step, Subject};
use crate::Assignment;

pub(super) fn rehearsals(wish: &Assignment, found: &Observed, out: &mut Vec<Step>) {
    for rehearsal in &wish.rehearsals {
        let (image, epoch) = (rehearsal.image, rehearsal.epoch);
        match found.rehearsals.get(&image).filter(|report| report.epoch == epoch) {
            Some(report) if found.told_rehearsals.get(&image) != Some(&epoch) => {
                out.push(Step::ReportRehearsal(report.clone()));
            }
            Some(_) => {}
            None => {
                let here = found.holds(&rehearsal.base);
                if here && found.may_try(Subject::Rehearsal(image), wish.generation) {
                    out.push(Step::Rehearse { image, epoch });
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        Capacity, Digest, ImageFormat, ImageId, ImageWish, NodeId, RequestId, Verdict, VmId, assignment::RehearsalWish,
        command::RehearsalReport, steps::steps,
    };

    #[test]
    fn a_backup_is_fetched_booted_once_and_told_once() {
        let (image, epoch, digest) = (ImageId(4), 9, Digest([4; 32]));
        let base = ImageWish {
            digest,
            format: ImageFormat::Qcow2,
            size_bytes: 1,
            virtual_bytes: 1,
            sources: vec![],
            parents: vec![],
        };
        let rehearsal = RehearsalWish {
            image,
            epoch,
            vm: VmId(1),
            request: RequestId(0),
            size: Capacity::default(),
            limit_millis: 1000,
            expect: String::new(),
            base: base.clone(),
        };
        let wish = Assignment {
            cluster: "demo".into(),
            node: NodeId(1),
            incarnation: 1,
            generation: 1,
            vms: vec![],
            networks: vec![],
            images: vec![],
            rehearsals: vec![rehearsal],
            spared: None,
        };
        let mut found = Observed { now_millis: 10 * super::super::IMAGE_IDLE_MILLIS, ..Observed::default() };
        assert_eq!(steps(&wish, &found), [Step::FetchImage(base)]);
        found.images.insert(digest, 2 * super::super::IMAGE_IDLE_MILLIS);
        assert_eq!(steps(&wish, &found), [Step::Rehearse { image, epoch }], "and the bytes stay, idle or not");
        let report = RehearsalReport { image, epoch, verdict: Verdict::Booted, took_millis: 5, reason: "up".into() };
        let old = RehearsalReport { epoch: 8, ..report.clone() };
        found.rehearsals.insert(image, old);
        assert_eq!(steps(&wish, &found), [Step::Rehearse { image, epoch }], "that was an earlier one");
        found.rehearsals.insert(image, report.clone());
        assert_eq!(steps(&wish, &found), [Step::ReportRehearsal(report)]);
        found.told_rehearsals.insert(image, epoch);
        assert_eq!(steps(&wish, &found), []);
    }
}
