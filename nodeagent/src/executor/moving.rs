//! A guest that goes to another host, or comes from one: what takes its time, and what ends it.
//!
//! Deliberately not here: when it goes (`model::steps`), and how its bytes travel (`relay`, `hypervisor::migration`).

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    pin::pin,
    sync::Arc,
    time::Duration,
};

use model::{
    Assignment, MoveEnd, Power, VmId,
    assignment::Lease,
    command::MoveReport,
    steps::{Memory, Observed},
};
use tokio::{
    task::spawn_blocking,
    time::{Instant, sleep, sleep_until},
};

use super::act::{Done as Outcome, Fault, FaultKind, cut_short, fault, hypervisor_fault, spec};
use crate::{
    host::Host,
    hypervisor::job::Job,
    relay::{self, Arrival, Departure},
};

/// The quorum's own deadline for a move is shorter, and is what ends one that takes too long.
const MOVE_LIMIT: Duration = Duration::from_secs(24 * 3600);
/// How often it is looked how far it is, and whether it should end.
const GLANCE: Duration = Duration::from_millis(250);
/// Between the word that it should end and the closing of its sockets: libvirt ends it by itself within a second, when
/// neither side hangs.
const CLOSING_AFTER: Duration = Duration::from_secs(10);
/// From then until nobody waits for it any more. A guest that the guard has stopped keeps libvirt waiting for ever; it
/// can be set aside only when this step no longer holds it.
const ABANDONED_AFTER: Duration = Duration::from_secs(20);

/// On the destination: makes what the guest needs, and lets it in.
pub async fn prepare(host: Arc<Host>, assignment: Arc<Assignment>, vm: VmId) -> Result<(), Fault> {
    let wish = assignment.vms.iter().find(|wish| wish.vm == vm);
    let source = wish.and_then(|wish| wish.moves.as_ref()).map(|end| end.node);
    let source = source.ok_or_else(|| fault(FaultKind::NotNow, "the assignment no longer has it"))?;
    let prepared = spawn_blocking(move || {
        let spec = spec(&host, &assignment, vm)?;
        host.arrivals.make_dir().map_err(|error| fault(FaultKind::Transient, error))?;
        let destination = host.hypervisor.prepare_migration(&spec).map_err(hypervisor_fault)?;
        host.arrivals.expect(vm, Arrival { source, spec, destination });
        Ok(())
    });
    prepared.await.map_err(|_| cut_short())?
}

/// On the source: sends it away, as it runs or as it lies there. `NotNow` until the destination is ready: then nothing
/// was begun.
pub async fn depart(host: Arc<Host>, end: &MoveEnd, vm: VmId, job: Arc<Job>) -> Result<(), Fault> {
    let worker = host.clone();
    let at_rest = spawn_blocking(move || worker.hypervisor.disk_at_rest(vm));
    match at_rest.await.map_err(|_| cut_short())?.map_err(hypervisor_fault)? {
        Some(disk) => send_disk(host, end, vm, disk, job).await,
        None => send_guest(host, end, vm, job).await,
    }
}

async fn send_disk(host: Arc<Host>, end: &MoveEnd, vm: VmId, disk: PathBuf, job: Arc<Job>) -> Result<(), Fault> {
    let asked = relay::ask(&host.identity, &end.address, vm, end.epoch).await;
    let (client, _) = asked.map_err(|error| fault(FaultKind::NotNow, error))?;
    let mut sending = pin!(relay::disk::send(client, vm, end.epoch, disk, job.clone()));
    loop {
        let progress = job.progress();
        host.view.set_moved(vm, progress.done_bytes, progress.total_bytes);
        if let Some(why) = job.must_end() {
            return Err(fault(FaultKind::Transient, why));
        }
        tokio::select! {
            sent = &mut sending => break sent.map_err(|error| fault(FaultKind::Transient, error))?,
            () = sleep(GLANCE) => {}
        }
    }
    // All of it is there. Nothing starts it here before this step is over, and then only when the move was given up.
    let let_go = spawn_blocking(move || host.hypervisor.let_go(vm));
    let_go.await.map_err(|_| cut_short())?.map_err(hypervisor_fault)
}

async fn send_guest(host: Arc<Host>, end: &MoveEnd, vm: VmId, job: Arc<Job>) -> Result<(), Fault> {
    let opened = Departure::open(&host.arrivals, &host.identity, &end.address, vm, end.epoch).await;
    let departure = opened.map_err(|error| fault(FaultKind::NotNow, error))?;
    let (working, worker) = (job.clone(), host.clone());
    let (destination, route) = (departure.destination.clone(), departure.route.clone());
    let mut work = spawn_blocking(move || worker.hypervisor.migrate(vm, &destination, &route, &working));
    let mut departure = Some(departure);
    let mut ended_at = None;
    loop {
        let progress = job.progress();
        host.view.set_moved(vm, progress.done_bytes, progress.total_bytes);
        if ended_at.is_none() && job.must_end().is_some() {
            ended_at = Some(Instant::now());
        }
        let abandoned = async {
            match ended_at {
                Some(at) => sleep_until(at + CLOSING_AFTER + ABANDONED_AFTER).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            done = &mut work => return done.map_err(|_| cut_short())?.map_err(hypervisor_fault),
            () = abandoned => return Err(fault(FaultKind::Transient, "it was ended, and the hypervisor does not say so")),
            () = sleep(GLANCE) => {}
        }
        if ended_at.is_some_and(|at| at.elapsed() >= CLOSING_AFTER) {
            drop(departure.take());
        }
    }
}

/// What the executor remembers of guests that go.
#[derive(Default)]
pub struct Moves {
    /// Those that are going, each in its move.
    going: BTreeMap<VmId, (u64, Arc<Job>)>,
    /// Why one did not go, and in which move.
    failed: BTreeMap<VmId, (u64, String)>,
    pub told: BTreeMap<VmId, MoveReport>,
}

impl Moves {
    pub fn begin(&mut self, vm: VmId, epoch: u64) -> Arc<Job> {
        let job = Arc::new(Job::new(MOVE_LIMIT));
        self.going.insert(vm, (epoch, job.clone()));
        job
    }

    /// What is going and should not go any more.
    pub fn call_back(&self, new: &Assignment) {
        for (vm, (epoch, job)) in &self.going {
            if move_of(new, *vm) != Some(*epoch) {
                job.cancel();
            }
        }
    }

    /// Nothing was begun when it was not possible just now; otherwise a move is tried once.
    pub fn finish(&mut self, vm: VmId, epoch: u64, result: &Result<Outcome, Fault>, memory: Option<&mut Memory>) {
        self.going.remove(&vm);
        match (result, memory) {
            (Err(fault), Some(memory)) if fault.kind == FaultKind::NotNow => memory.leaving = None,
            (Err(fault), _) => drop(self.failed.insert(vm, (epoch, fault.reason.clone()))),
            (Ok(_), _) => {}
        }
    }

    pub fn note_told(&mut self, report: &MoveReport) {
        self.told.insert(report.vm, report.clone());
    }

    pub fn keep_wished(&mut self, assignment: &Assignment) {
        self.failed.retain(|vm, (epoch, _)| move_of(assignment, *vm) == Some(*epoch));
        self.told.retain(|vm, told| move_of(assignment, *vm) == Some(told.epoch));
    }

    /// What the decisions need of it.
    pub fn lend(&self, found: &mut Observed, host: &Host) {
        found.expected = host.arrivals.epochs();
        found.leaving = self.going.keys().copied().collect();
        found.moves_failed = self.failed.clone();
        found.told_moves = self.told.clone();
    }
}

fn move_of(assignment: &Assignment, vm: VmId) -> Option<u64> {
    assignment.vms.iter().find(|wish| wish.vm == vm)?.moves.as_ref().map(|end| end.epoch)
}

/// The guests that may come, each under the placement that it will have.
pub fn arriving(assignment: &Assignment) -> BTreeMap<VmId, u64> {
    let coming = assignment.vms.iter().filter(|wish| wish.power == Power::Arriving);
    coming.map(|wish| (wish.vm, wish.epoch)).collect()
}

/// As it will be when the guests that may come have been handed over: their networks are made for them before they are let in,
/// so that none runs here under rules that do not know it, nor waits for them. One that has not come asks for no address here.
pub fn with_their_leases(new: Arc<Assignment>) -> Arc<Assignment> {
    let coming = new.vms.iter().filter(|wish| wish.power == Power::Arriving);
    let vnis: BTreeSet<u32> = coming.flat_map(|wish| &wish.nics).map(|nic| nic.vni).collect();
    if vnis.is_empty() {
        return new;
    }
    let mut whole = (*new).clone();
    for network in whole.networks.iter_mut().filter(|network| vnis.contains(&network.vni)) {
        let here = new.vms.iter().filter(|wish| wish.power != Power::Absent);
        let plugged = here.flat_map(|wish| wish.nics.iter().map(move |nic| (wish, nic)));
        let plugged = plugged.filter(|(_, nic)| nic.vni == network.vni);
        network.leases =
            plugged.map(|(wish, nic)| Lease { mac: nic.mac, ip: nic.ip, hostname: wish.name.clone() }).collect();
    }
    Arc::new(whole)
}
