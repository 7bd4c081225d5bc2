//! Rehearsals of a restore: asked for, given to a host, ended by its report, by its owner or by the clock.

use super::{Applied, Moment, check};
use crate::{
    Capacity, Image, ImageId, Node, NodeId, NodeState, Placement, Rehearsal, Rehearsed, Rejection, Reply, State,
    Verdict,
    command::{Noun, RehearsalReport},
    setting,
};

/// An emulated guest on a busy host takes half a minute, a large one that checks its file systems some more.
const LEAST_LIMIT_MILLIS: u64 = 10_000;
const MOST_LIMIT_MILLIS: u64 = 3_600_000;
/// They cost their tenant nothing, so it has few at a time.
const MOST_AT_ONCE: u64 = 4;
/// What a console is searched for is a phrase, not a text.
const MOST_EXPECT_CHARS: usize = 200;
/// What a machine that no longer exists is taken to have been.
const SIZE_OF_THE_FORGOTTEN: Capacity = Capacity { vcpus: 1, memory_bytes: 1 << 30, disk_bytes: 0 };

impl State {
    pub(super) fn rehearse_backup(&mut self, m: Moment, id: ImageId, limit_millis: u64, expect: &str) -> Applied {
        check::between("limit_millis", limit_millis, LEAST_LIMIT_MILLIS, MOST_LIMIT_MILLIS)?;
        if !expect.is_empty() {
            check::line("expect", expect, MOST_EXPECT_CHARS)?;
        }
        let image = self.visible_image(m, id)?;
        let Some(of) = image.backup else {
            return Err(check::invalid("backup", &image.name, "a backup of a machine"));
        };
        if image.rehearsal.is_some() {
            return Err(check::in_use(Noun::Image, &image.name, "a rehearsal of it is under way".into()));
        }
        let owner = self.tenants.get(&image.tenant).map_or_else(String::new, |tenant| tenant.name.clone());
        let used = self.rehearsing().filter(|other| other.tenant == image.tenant).count() as u64;
        if used >= MOST_AT_ONCE {
            let what = "rehearsals at once".into();
            return Err(Rejection::Quota { tenant: owner, what, limit: MOST_AT_ONCE, used, asked: 1 });
        }
        let size = self.vms.get(&of.vm).map_or(SIZE_OF_THE_FORGOTTEN, |vm| vm.size);
        let rehearsal = Rehearsal {
            size: Capacity { disk_bytes: image.virtual_bytes, ..size },
            limit_millis,
            expect: expect.into(),
            placement: None,
            deadline: m.now.plus_millis(self.setting(setting::CREATE_DEADLINE)),
            request: m.request,
        };
        let image = Image { rehearsal: Some(rehearsal), ..image.clone() };
        self.put_image(image);
        Ok(Reply::Image(id))
    }

    /// Its host ends it as soon as it hears of it. What an earlier one came to stays.
    pub(super) fn end_rehearsal(&mut self, m: Moment, id: ImageId) -> Applied {
        let image = self.visible_image(m, id)?;
        if image.rehearsal.is_none() {
            return Err(Rejection::Stale(format!("no rehearsal of {} is under way", image.name)));
        }
        self.finish_rehearsal(m, id, None);
        Ok(Reply::Image(id))
    }

    pub(super) fn place_rehearsal(&mut self, m: Moment, id: ImageId, node: NodeId) -> Applied {
        let image = self.images.get(&id).ok_or_else(|| check::missing(Noun::Image, id))?;
        let rehearsal = image.rehearsal.as_ref().filter(|rehearsal| self.wants_place(rehearsal));
        let rehearsal = rehearsal.ok_or_else(|| Rejection::Stale(format!("no rehearsal of {id} waits for a node")))?;
        let host = self.nodes.get(&node).ok_or_else(|| check::missing(Noun::Node, node))?;
        self.has_room(host, rehearsal.size)?;
        let before = rehearsal.placement.map(|placement| placement.node);
        let limit = self.setting(setting::CREATE_DEADLINE) + rehearsal.limit_millis;
        let placement = Some(Placement { node, epoch: m.index });
        let rehearsal = Rehearsal { placement, deadline: m.now.plus_millis(limit), ..rehearsal.clone() };
        let image = Image { rehearsal: Some(rehearsal), ..image.clone() };
        self.put_image(image);
        before.into_iter().chain([node]).for_each(|node| self.renumber_node(node));
        Ok(Reply::Node(node))
    }

    pub(super) fn expire_rehearsal(&mut self, m: Moment, id: ImageId) -> Applied {
        let image = self.images.get(&id).ok_or_else(|| check::missing(Noun::Image, id))?;
        let late = image.rehearsal.as_ref().filter(|rehearsal| rehearsal.deadline <= m.now);
        let rehearsal = late.ok_or_else(|| Rejection::Stale(format!("no rehearsal of {id} is late")))?;
        let host = rehearsal.placement.and_then(|placement| self.nodes.get(&placement.node));
        let reason = match host {
            Some(host) => format!("its host {} has not said what came of it", host.name),
            None => "no node had room for it".into(),
        };
        let rehearsed = Rehearsed { at: m.now, verdict: Verdict::Unknown, took_millis: 0, reason };
        self.finish_rehearsal(m, id, Some(rehearsed));
        Ok(Reply::Done)
    }

    pub(super) fn report_rehearsals(
        &mut self,
        m: Moment,
        node: NodeId,
        incarnation: u64,
        reports: &[RehearsalReport],
    ) -> Applied {
        self.heard_from(m, node, incarnation)?;
        for report in reports {
            let rehearsal = self.images.get(&report.image).and_then(|image| image.rehearsal.as_ref());
            let current = Some(Placement { node, epoch: report.epoch });
            if rehearsal.is_some_and(|rehearsal| rehearsal.placement == current) {
                let (verdict, took_millis, reason) = (report.verdict, report.took_millis, report.reason.clone());
                self.finish_rehearsal(m, report.image, Some(Rehearsed { at: m.now, verdict, took_millis, reason }));
            }
        }
        Ok(Reply::Done)
    }

    fn finish_rehearsal(&mut self, m: Moment, id: ImageId, rehearsed: Option<Rehearsed>) {
        let Some(mut image) = self.images.get(&id).cloned() else { return };
        let placement = image.rehearsal.take().and_then(|rehearsal| rehearsal.placement);
        image.rehearsed = rehearsed.or(image.rehearsed);
        let of = image.backup;
        self.put_image(image);
        placement.iter().for_each(|placement| self.renumber_node(placement.node));
        // While it was under way, the backup was kept.
        of.iter().for_each(|of| self.drop_superfluous_backups(m, of.vm));
    }

    /// The node is about to be forgotten: what it rehearsed waits for another.
    pub(super) fn leave_rehearsals(&mut self, node: NodeId) {
        let left: Vec<Image> = self.rehearsing_on(node).cloned().collect();
        for mut image in left {
            image.rehearsal.iter_mut().for_each(|rehearsal| rehearsal.placement = None);
            self.put_image(image);
        }
    }

    /// The backups that are being rehearsed.
    pub fn rehearsing(&self) -> impl Iterator<Item = &Image> {
        self.index.rehearsing.iter().filter_map(|id| self.images.get(id))
    }

    pub(crate) fn rehearsing_on(&self, node: NodeId) -> impl Iterator<Item = &Image> {
        self.index.rehearsing_by_node.get(&node).into_iter().flatten().filter_map(|id| self.images.get(id))
    }

    /// It has no host, or one that is lost.
    pub(crate) fn wants_place(&self, rehearsal: &Rehearsal) -> bool {
        let host = rehearsal.placement.and_then(|placement| self.nodes.get(&placement.node));
        host.is_none_or(|host: &Node| host.state == NodeState::Lost)
    }

    fn visible_image(&self, m: Moment, id: ImageId) -> Result<&Image, Rejection> {
        self.images.get(&id).filter(|image| m.may_see(image.tenant)).ok_or_else(|| check::missing(Noun::Image, id))
    }
}
