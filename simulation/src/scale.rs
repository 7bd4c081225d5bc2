//! What a cloud costs as it grows: `apply`, the planners and the bill on hosts and machines by the thousand, in one
//! process, without log, disk or network.
//!
//! Everything is brought about by the commands that a real quorum would see, in the batches in which it would see them.

use std::{
    fs,
    time::{Duration, Instant},
};

use model::{
    Actor, Applied, Capacity, Command, Digest, Entry, HypervisorKind, ImageFormat, ImageId, JoinRole, NetworkId,
    NodeCommand, NodeId, OperatorCommand, Phase, PlannerCommand, Quota, Recovery, Reply, Role, State, Telemetry,
    TenantCommand, TenantId, Timestamp, VmId, bill,
    command::VmReport,
    level, plan,
    telemetry::{Heard, NodeStatus},
};

/// Machines of one tenant, in one network.
const A_TENANT: u64 = 100;
/// Entries that go to the state's tables at once, as on a busy quorum.
const BATCH: usize = 512;
/// Asked this often, to have a median of something short.
const LOOKS: usize = 21;
/// As the leader's loop has it.
const WATCH: Duration = Duration::from_millis(100);
const HOUR: u64 = 3_600_000;
const SMALL: Capacity = Capacity { vcpus: 1, memory_bytes: 1 << 30, disk_bytes: 10 << 30 };

/// What a cloud of one size costs.
#[derive(Clone, Debug)]
pub struct Cost {
    pub nodes: u64,
    pub machines: u64,
    /// Resident memory of the state with its indexes, by machine.
    pub bytes_a_machine: u64,
    /// Rows on disk, by machine.
    pub stored_bytes_a_machine: u64,
    /// A second, on one core: accepted, given a host by the planner, so committed, and said to run.
    pub created: f64,
    pub decided: f64,
    pub placed: f64,
    pub reported: f64,
    /// A look of all planners when there is nothing to do.
    pub idle_plan: Duration,
    /// From rows to a state with its indexes.
    pub load: Duration,
    /// A hundred rows of a tenant.
    pub page: Duration,
    /// All tenants' bills, and whether the state that was loaded again says the same.
    pub bill: Duration,
    pub bill_agrees: bool,
}

struct Cloud {
    state: State,
    telemetry: Telemetry,
    index: u64,
    pending: usize,
}

/// Makes a cloud of that size and measures it on the way.
///
/// # Panics
/// When the model refuses what it must accept.
pub fn measure(nodes: u64, machines: u64) -> Cost {
    let before = resident();
    let mut cloud = Cloud::new(nodes, machines);
    let created = rate(machines, || cloud.create(machines));
    let (decided, placed) = cloud.place(machines);
    let reported = rate(machines, || cloud.report());
    let bytes_a_machine = resident().saturating_sub(before) / machines;
    let idle_plan = median(|| assert_eq!(plan::plan(&cloud.state, &cloud.telemetry, cloud.now()), []));
    let tenant = TenantId(machines.div_ceil(A_TENANT));
    let page = median(|| assert!(cloud.state.vms_of_tenant_after(tenant, VmId(0)).take(100).count() > 0));
    let (bill, total) = timed(|| cloud.bills());

    let rows: Vec<_> = cloud.state.rows().filter_map(|row| Some((row.table, row.key, row.row?))).collect();
    let stored: usize = rows.iter().map(|(_, key, row)| key.len() + row.len()).sum();
    let (load, state) = timed(|| State::load(rows.into_iter()).expect("rows that it gave out itself"));
    let again = Cloud {
        state,
        ..Cloud { telemetry: Telemetry::default(), index: cloud.index, pending: 0, state: State::default() }
    };
    Cost {
        nodes,
        machines,
        bytes_a_machine,
        stored_bytes_a_machine: stored as u64 / machines,
        created,
        decided,
        placed,
        reported,
        idle_plan,
        load,
        page,
        bill,
        bill_agrees: again.bills() == total,
    }
}

impl Cloud {
    /// Hosts, tenants and networks.
    fn new(nodes: u64, machines: u64) -> Self {
        let telemetry = Telemetry { clock: 1, confirmed: Some(1), ..Telemetry::default() };
        let mut cloud = Self { state: State::default(), telemetry, index: 0, pending: 0 };
        let (token, here) = (Digest([9; 32]), "192.0.2.1:7470".to_owned());
        cloud.planner(PlannerCommand::Found {
            cluster: "scale".into(),
            controller: "one".into(),
            address: here,
            operator: "root".into(),
            token,
        });
        cloud.operator(OperatorCommand::RaiseLevel { level: level::LATEST });
        cloud.operator(OperatorCommand::CreateTemplate { name: "scale".into(), size: SMALL, weight_milli: 1000 });
        // Twice the room that is needed, so that the order of nodes decides and not what is left.
        let each = 2 * machines.div_ceil(nodes);
        for node in 1..=nodes {
            cloud.join(
                node,
                Capacity { vcpus: each, memory_bytes: each * SMALL.memory_bytes, disk_bytes: each * SMALL.disk_bytes },
            );
        }
        let all = Capacity { vcpus: A_TENANT, memory_bytes: A_TENANT << 30, disk_bytes: A_TENANT * SMALL.disk_bytes };
        for tenant in 1..=machines.div_ceil(A_TENANT) {
            let quota = Quota { vms: A_TENANT, size: all, networks: 1, image_bytes: 1 << 40 };
            cloud.operator(OperatorCommand::CreateTenant { name: format!("t{tenant}"), quota });
            cloud.tenant(TenantCommand::CreateNetwork {
                tenant: TenantId(tenant),
                name: "lan".into(),
                range: "10.0.0.0/20".parse().expect("a constant"),
            });
            cloud.tenant(TenantCommand::ImportImage {
                tenant: TenantId(tenant),
                name: "debian".into(),
                format: ImageFormat::Qcow2,
                size_bytes: 1 << 30,
                virtual_bytes: 1 << 30,
                digest: Digest([5; 32]),
                replicas: vec![NodeId(1), NodeId(nodes.min(2))],
            });
        }
        cloud
    }

    fn join(&mut self, node: u64, capacity: Capacity) {
        let mut token = [0; 32];
        token[..8].copy_from_slice(&node.to_le_bytes());
        let (token, role) = (Digest(token), JoinRole::Agent);
        self.operator(OperatorCommand::IssueJoinToken { token, role, valid_millis: HOUR });
        self.planner(PlannerCommand::JoinNode { token, name: format!("host{node}") });
        let underlay = std::net::Ipv4Addr::from(0x0a00_0000 + u32::try_from(node).expect("few nodes"));
        let node = NodeId(node);
        self.entry(
            Actor::Node(node),
            Command::Node(NodeCommand::Attach {
                node,
                address: format!("{underlay}:7471"),
                underlay: underlay.into(),
                hypervisor: HypervisorKind::Simulated,
                capacity,
            }),
        );
        let status = NodeStatus {
            cpu_permille: 20 + u32::try_from(node.0 % 40).expect("less than 40"),
            memory_used_bytes: capacity.memory_bytes / 20,
            memory_total_bytes: capacity.memory_bytes,
            disk_used_bytes: capacity.disk_bytes / 20,
            disk_total_bytes: capacity.disk_bytes,
            watchdog: false,
        };
        self.telemetry.nodes.insert(node, Heard { at: 1, answered: Some(1), status, ..Heard::default() });
    }

    fn create(&mut self, machines: u64) {
        for number in 0..machines {
            let tenant = number / A_TENANT + 1;
            self.tenant(TenantCommand::CreateVm {
                tenant: TenantId(tenant),
                name: format!("m{number}"),
                image: ImageId(tenant),
                template: "scale".into(),
                network: NetworkId(tenant),
                ssh_keys: vec![],
                user_data: String::new(),
                recovery: Recovery::Available,
                priority: 0,
            });
        }
    }

    /// Decided and placed, a second. Between two looks at all hosts the leader only looks for work; so here.
    fn place(&mut self, machines: u64) -> (f64, f64) {
        let (mut deciding, mut placing, mut done) = (Duration::ZERO, Duration::ZERO, 0);
        let mut watched = Instant::now() - WATCH;
        while done < machines {
            let now = self.now();
            let (took, commands) = timed(|| {
                if watched.elapsed() < WATCH {
                    return plan::work(&self.state, &self.telemetry, now);
                }
                watched = Instant::now();
                plan::plan(&self.state, &self.telemetry, now)
            });
            deciding += took;
            let before = done;
            let (took, ()) = timed(|| {
                for command in commands {
                    done += u64::from(matches!(command, Command::Planner(PlannerCommand::PlaceVm { .. })));
                    self.entry(Actor::System, command);
                }
            });
            placing += took;
            assert!(done > before, "the planner stopped at {done} of {machines}");
        }
        (machines as f64 / deciding.as_secs_f64(), machines as f64 / placing.as_secs_f64())
    }

    /// Every host says that its machines run.
    fn report(&mut self) {
        let nodes: Vec<NodeId> = self.state.nodes().values().map(|node| node.id).collect();
        for node in nodes {
            let report = |vm: &model::Vm| VmReport {
                vm: vm.id,
                epoch: vm.placement.expect("it is on this node").epoch,
                attempt: vm.tries,
                phase: Phase::Running,
                rebooted: 0,
                reason: String::new(),
                retry: false,
            };
            let reports: Vec<VmReport> = self.state.vms_on_node(node).map(report).collect();
            let incarnation = self.state.nodes().get(&node).expect("it was just listed").incarnation;
            let command = NodeCommand::ReportVms { node, incarnation, reports };
            self.entry(Actor::Node(node), Command::Node(command));
        }
    }

    /// The sum of what all tenants owe an hour later, and how many lines say so.
    fn bills(&self) -> (u128, usize) {
        let until = self.now().plus_millis(HOUR);
        let bills =
            self.state.tenants().values().map(|tenant| bill::bill(&self.state, tenant.id, Timestamp(0), until, until));
        bills.fold((0, 0), |(sum, lines), bill| (sum + bill.total_nano, lines + bill.lines.len()))
    }

    fn now(&self) -> Timestamp {
        Timestamp(HOUR + self.index)
    }

    fn operator(&mut self, command: OperatorCommand) {
        self.entry(Actor::User { name: "root".into(), role: Role::Operator }, Command::Operator(command));
    }
    fn tenant(&mut self, command: TenantCommand) {
        self.entry(Actor::User { name: "root".into(), role: Role::Operator }, Command::Tenant(command));
    }
    fn planner(&mut self, command: PlannerCommand) {
        self.entry(Actor::System, Command::Planner(command));
    }

    /// As a replica does it: applied, and now and then the changed rows encoded and hashed.
    fn entry(&mut self, actor: Actor, command: Command) -> Reply {
        self.index += 1;
        let entry = Entry { at: self.now(), request: None, actor, command };
        let applied: Applied = self.state.apply(self.index, &entry);
        self.pending += 1;
        if self.pending == BATCH {
            self.state.drain_changes();
            self.state.take_woken();
            self.pending = 0;
        }
        applied.unwrap_or_else(|refusal| panic!("{entry:?}: {refusal}"))
    }
}

fn timed<T>(work: impl FnOnce() -> T) -> (Duration, T) {
    let began = Instant::now();
    let result = work();
    (began.elapsed(), result)
}

fn rate(many: u64, work: impl FnOnce()) -> f64 {
    many as f64 / timed(work).0.as_secs_f64()
}

fn median(mut work: impl FnMut()) -> Duration {
    let mut times: Vec<Duration> = (0..LOOKS).map(|_| timed(&mut work).0).collect();
    times.sort_unstable();
    times[LOOKS / 2]
}

/// Bytes of this process in memory; 0 where the kernel does not say.
fn resident() -> u64 {
    const PAGE: u64 = 4096;
    let text = fs::read_to_string("/proc/self/statm").unwrap_or_default();
    text.split(' ').nth(1).and_then(|pages| pages.parse::<u64>().ok()).unwrap_or(0) * PAGE
}
