//! The language of the stories: one command a line, names as a person writes them.

use std::collections::{BTreeMap, BTreeSet};

use model::{
    command::{BackupMade, BackupReport, ImageReport, MoveOutcome, MoveReport, RehearsalReport, VmReport},
    *,
};

use crate::told;

const GIB: u64 = 1 << 30;
/// When every story begins.
const START: Timestamp = Timestamp(1_700_000_000_000);
/// What the leader's own clock says then, and since when it has led.
const BOOTED_AGO_NANOS: u64 = 86_400 * 1_000_000_000;

pub struct Story {
    state: State,
    index: u64,
    now: Timestamp,
    unheard: BTreeSet<String>,
    telemetry: Telemetry,
}

impl Default for Story {
    fn default() -> Self {
        Self {
            state: State::default(),
            index: 0,
            now: START,
            unheard: BTreeSet::new(),
            telemetry: Telemetry { leader_since: BOOTED_AGO_NANOS, ..Telemetry::default() },
        }
    }
}

type Told = Result<String, String>;

/// The words of a line, and its `key=value` pairs.
struct Line<'a> {
    words: Vec<&'a str>,
    values: BTreeMap<&'a str, &'a str>,
    /// What stands after `: `.
    reason: String,
}

impl<'a> Line<'a> {
    fn of(text: &'a str) -> Self {
        let (head, reason) = text.split_once(": ").unwrap_or((text, ""));
        let (values, words) = head.split_whitespace().partition::<Vec<&str>, _>(|word| word.contains('='));
        Self { words, values: values.iter().filter_map(|pair| pair.split_once('=')).collect(), reason: reason.into() }
    }
    fn word(&self, at: usize) -> Result<&'a str, String> {
        self.words.get(at).copied().ok_or_else(|| format!("word {at} is missing"))
    }
    fn has(&self, word: &str) -> bool {
        self.words.contains(&word)
    }
    fn number(&self, key: &str, default: u64) -> Result<u64, String> {
        self.values.get(key).map_or(Ok(default), |value| value.parse().map_err(|_| format!("{key} is no number")))
    }
    fn size(&self, default: u64) -> Result<Capacity, String> {
        Ok(Capacity {
            vcpus: self.number("vcpus", default)?,
            memory_bytes: self.number("memory", default)?.saturating_mul(GIB),
            disk_bytes: self.number("disk", default)?.saturating_mul(GIB),
        })
    }
}

impl Story {
    /// Carries one command out; the reply, and what a person now reads anew.
    pub fn tell(&mut self, text: &str) -> Told {
        let before = told::picture(&self.state);
        let said = self.carry_out(text)?;
        invariant::check(&self.state)?;
        // Waiting changes what is left of each time; that is no news.
        let news = if text.starts_with("wait") { vec![] } else { told::news(&before, &told::picture(&self.state)) };
        Ok([said].into_iter().chain(news).filter(|line| !line.is_empty()).collect::<Vec<_>>().join("\n"))
    }

    fn carry_out(&mut self, text: &str) -> Told {
        let line = Line::of(text);
        if let ["as", user] = line.words[..2.min(line.words.len())] {
            let tenant = self.tenant(user)?;
            let actor = Actor::User { name: user.into(), role: Role::Member(tenant) };
            let rest = text.split_once(user).ok_or("who asks for what?")?.1.trim();
            return self.owner(actor, rest, &Line::of(rest));
        }
        match (line.word(0)?, line.words.get(1).copied()) {
            ("found", _) => self.found(&line),
            ("node", _) => self.node(&line),
            ("plan", _) => self.plan(),
            ("wait", _) => self.wait(&line),
            ("bill", _) => Ok(told::bill(&self.state, self.tenant(line.word(1)?)?, START)),
            ("assignment", _) => self.assignment(&line),
            (node, Some("reports")) => self.report(node, &line),
            (node, Some("attaches")) => self.attach(node, &line),
            (node, Some("runs")) => self.clock(node, &line),
            (node, Some("falls")) => {
                self.unheard.insert(node.into());
                Ok(String::new())
            }
            (node, Some("speaks")) => {
                self.unheard.remove(node);
                Ok(String::new())
            }
            (
                "tenant" | "quota" | "template" | "setting" | "price" | "cordon" | "remove" | "maintain" | "arm"
                | "disarm" | "migrate" | "cancel" | "drain" | "uncordon",
                _,
            ) => self.operator(text, &line),
            _ => self.owner(root(), text, &line),
        }
    }

    fn apply(&mut self, actor: Actor, request: Option<Request>, command: Command) -> Applied {
        self.index += 1;
        self.state.apply(self.index, &Entry { at: self.now, request, actor, command })
    }

    fn said(&mut self, actor: Actor, request: Option<Request>, command: Command) -> String {
        match self.apply(actor, request, command) {
            Ok(reply) => reply.to_string(),
            Err(refusal) => format!("refused, {}: {refusal}", refusal.code()),
        }
    }

    fn found(&mut self, line: &Line) -> Told {
        let (cluster, operator) = (line.word(1)?.into(), "root".into());
        let (controller, address) = ("one".into(), "192.0.2.1:7470".into());
        let token = Digest::of(b"root");
        Ok(self.said(
            Actor::System,
            None,
            Command::Planner(PlannerCommand::Found { cluster, controller, address, operator, token }),
        ))
    }

    fn operator(&mut self, text: &str, line: &Line) -> Told {
        let name = line.words.get(1).copied().unwrap_or_default().to_owned();
        let command = match line.word(0)? {
            "maintain" => OperatorCommand::MaintainNode { node: self.host(&name)?.id, maintenance: !line.has("over") },
            "migrate" => OperatorCommand::MigrateVm { vm: self.machine(&name)?, to: self.host(line.word(3)?)?.id },
            "cancel" => OperatorCommand::CancelMigration { vm: self.machine(&name)? },
            "arm" => OperatorCommand::ArmRecovery { armed: true },
            "disarm" => OperatorCommand::ArmRecovery { armed: false },
            "tenant" => OperatorCommand::CreateTenant { name, quota: quota(line)? },
            "quota" => OperatorCommand::SetQuota { tenant: self.tenant(&name)?, quota: quota(line)? },
            "template" => OperatorCommand::CreateTemplate {
                name,
                size: line.size(1)?,
                weight_milli: line.number("weight", 1000)?,
            },
            "setting" => OperatorCommand::SetSetting {
                name,
                value: line.word(2)?.parse().map_err(|_| "the value is no number")?,
            },
            "price" => {
                let from =
                    if line.has("in") { self.now.plus_millis(millis(line.word(3)?)?) } else { Timestamp::default() };
                OperatorCommand::SetPrice { nano_per_hour: name.parse().map_err(|_| "the price is no number")?, from }
            }
            "drain" => OperatorCommand::DrainNode { node: self.host(&name)?.id },
            "uncordon" => OperatorCommand::CordonNode { node: self.host(&name)?.id, cordoned: false },
            "cordon" => OperatorCommand::CordonNode { node: self.host(&name)?.id, cordoned: true },
            _ => OperatorCommand::RemoveNode { node: self.host(&name)?.id, force: line.has("force") },
        };
        let request = request(text, line)?;
        Ok(self.said(root(), request, Command::Operator(command)))
    }

    fn node(&mut self, line: &Line) -> Told {
        let name = line.word(1)?.to_owned();
        let token = Digest::of(name.as_bytes());
        let issue = OperatorCommand::IssueJoinToken { token, role: JoinRole::Agent, valid_millis: 60_000 };
        let issued = self.apply(root(), None, Command::Operator(issue));
        issued.map_err(|refusal| refusal.to_string())?;
        let joined =
            self.said(Actor::System, None, Command::Planner(PlannerCommand::JoinNode { token, name: name.clone() }));
        Ok(format!("{joined}, {}", self.attach(&name, line)?))
    }

    fn attach(&mut self, name: &str, line: &Line) -> Told {
        let node = self.host(name)?.id;
        let place = line.number("place", 0)?;
        let (address, underlay) =
            (format!("{name}-{place}:7480"), [192, 0, 2, (10 * place + 10 + node.0) as u8].into());
        let (hypervisor, capacity) = (HypervisorKind::Qemu, line.size(8)?);
        let command = NodeCommand::Attach { node, address, underlay, hypervisor, capacity };
        Ok(self.said(Actor::Node(node), None, Command::Node(command)))
    }

    /// `alpha runs 10000 ppm for 300s`: its beats, heard until now for so long by a clock that is right. No other time passes.
    fn clock(&mut self, name: &str, line: &Line) -> Told {
        let ppm: i64 = line.word(2)?.parse().map_err(|_| "the rate is no number")?;
        let (node, length) = (self.host(name)?.id, millis(line.word(5)?)? * 1_000_000);
        let began = self.clock_now() - length;
        let drift = &mut self.telemetry.nodes.entry(node).or_default().drift;
        *drift = telemetry::Drift::default();
        for at in (0..length).step_by(lease::BEAT_NANOS as usize) {
            drift.note(began + at, 1_000_000_000_000 + at.saturating_add_signed(at as i64 / 1_000_000 * ppm));
        }
        Ok(String::new())
    }

    fn clock_now(&self) -> u64 {
        BOOTED_AGO_NANOS + self.now.millis_since(START) * 1_000_000
    }

    fn plan(&mut self) -> Told {
        let clock = self.clock_now();
        for node in self.state.nodes().values() {
            let heard = self.telemetry.nodes.entry(node.id).or_default();
            if !self.unheard.contains(&node.name) {
                (heard.at, heard.answered, heard.incarnation) = (clock, Some(clock), node.incarnation);
            }
        }
        self.telemetry.clock = clock;
        let telemetry = self.telemetry.clone();
        let commands = plan::plan(&self.state, &telemetry, self.now);
        let mut lines = Vec::new();
        for command in commands {
            let Command::Planner(planned) = &command else { return Err("planners propose only what is theirs".into()) };
            let mut line = format!("plan: {planned}");
            if let Err(refusal) = self.apply(Actor::System, None, command) {
                line += &format!(" (refused: {refusal})");
            }
            lines.push(line);
        }
        Ok(if lines.is_empty() { "plan: nothing".into() } else { lines.join("\n") })
    }

    fn wait(&mut self, line: &Line) -> Told {
        self.now = self.now.plus_millis(millis(line.word(1)?)?);
        // Time passes in the cloud with the next entry; a refused one is enough.
        let nobody = Command::Planner(PlannerCommand::RetryVm { vm: VmId(0) });
        let _ = self.apply(Actor::System, None, nobody);
        Ok(String::new())
    }

    fn assignment(&self, line: &Line) -> Told {
        let node = self.host(line.word(1)?)?.id;
        self.state.assignment(node).map(|assignment| assignment.to_string()).ok_or_else(|| "no such node".into())
    }

    /// `alpha reports acme/web running`, `… failed retry: no space`, `alpha reports image acme/debian good`.
    fn report(&mut self, name: &str, line: &Line) -> Told {
        let host = self.host(name)?;
        let (node, incarnation) = (host.id, line.number("incarnation", host.incarnation)?);
        if line.word(2)? == "image" {
            let (tenant, image) = self.owned(line.word(3)?)?;
            let digest = self.state.image_named(tenant, image).ok_or("no such image")?.digest;
            let reports = vec![ImageReport { digest, good: line.word(4)? == "good" }];
            return Ok(self.said(
                Actor::Node(node),
                None,
                Command::Node(NodeCommand::ReportImages { node, incarnation, reports }),
            ));
        }
        match line.word(2)? {
            "backup" => return self.report_backup(node, incarnation, line),
            "rehearsal" => return self.report_rehearsal(node, incarnation, line),
            _ => {}
        }
        if line.word(2)? == "move" {
            return self.report_move(node, incarnation, line);
        }
        let vm = self.machine(line.word(2)?)?;
        let row = self.state.vms().get(&vm).ok_or("no such machine")?;
        let other = row.migration.map(|migration| migration.other).filter(|other| other.node == node);
        let epoch = line.number("epoch", other.or(row.placement).map_or(0, |placement| placement.epoch))?;
        let rebooted = line.number("rebooted", row.rebooted.into())? as u32;
        let phase = match line.word(3)? {
            "running" => Phase::Running,
            "suspended" => Phase::Suspended,
            "stopped" => Phase::Stopped,
            "absent" => Phase::Absent,
            "failed" => Phase::Failed,
            other => return Err(format!("'{other}' is no phase")),
        };
        let reports = vec![VmReport {
            vm,
            epoch,
            attempt: row.tries,
            phase,
            rebooted,
            reason: line.reason.clone(),
            retry: line.has("retry"),
        }];
        Ok(self.said(Actor::Node(node), None, Command::Node(NodeCommand::ReportVms { node, incarnation, reports })))
    }

    /// `alpha reports backup acme/web 1 GiB`, `alpha reports backup acme/web failed: no space`.
    fn report_backup(&mut self, node: NodeId, incarnation: u64, line: &Line) -> Told {
        let vm = self.machine(line.word(3)?)?;
        let row = self.state.vms().get(&vm).ok_or("no such machine")?;
        let number = line.number("number", row.backups.asked.into())? as u32;
        let since = line.values.get("since").map(|name| self.image(name)).transpose()?;
        let since = since.and_then(|id| self.state.images().get(&id)).map(|image| image.digest);
        let outcome = match line.word(4)?.parse::<u64>() {
            Ok(gib) => Ok(BackupMade {
                digest: Digest::of(format!("{vm} {number}").as_bytes()),
                size_bytes: gib * GIB,
                virtual_bytes: row.size.disk_bytes,
                age_millis: 1000,
                consistency: Consistency::Frozen,
                parent: since,
            }),
            Err(_) => Err(line.reason.clone()),
        };
        let epoch = row.placement.map_or(0, |placement| placement.epoch);
        let reports = vec![BackupReport { vm, epoch, number, outcome }];
        Ok(self.said(Actor::Node(node), None, Command::Node(NodeCommand::ReportBackups { node, incarnation, reports })))
    }

    /// `alpha reports rehearsal acme/backup-vm-1-2 ok: its guest agent answered`.
    fn report_rehearsal(&mut self, node: NodeId, incarnation: u64, line: &Line) -> Told {
        let image = self.image(line.word(3)?)?;
        let verdict = match line.word(4)? {
            "ok" => Verdict::Booted,
            "failed" => Verdict::Failed,
            _ => Verdict::Unknown,
        };
        let placement = self.state.images().get(&image).and_then(|image| image.rehearsal.as_ref()?.placement);
        let epoch = line.number("epoch", placement.map_or(0, |placement| placement.epoch))?;
        let reports = vec![RehearsalReport { image, epoch, verdict, took_millis: 12_000, reason: line.reason.clone() }];
        let command = NodeCommand::ReportRehearsals { node, incarnation, reports };
        Ok(self.said(Actor::Node(node), None, Command::Node(command)))
    }

    fn image(&self, noun: &str) -> Result<ImageId, String> {
        let (tenant, name) = self.owned(noun)?;
        Ok(self.state.image_named(tenant, name).ok_or("no such image")?.id)
    }

    /// `alpha reports move acme/web left`, `… arrived`, `… nothing`, `… failed: no room`.
    fn report_move(&mut self, node: NodeId, incarnation: u64, line: &Line) -> Told {
        let vm = self.machine(line.word(3)?)?;
        let row = self.state.vms().get(&vm).ok_or("no such machine")?;
        let epoch = line.number("epoch", row.migration.map_or(0, |migration| migration.other.epoch))?;
        let outcome = match line.word(4)? {
            "left" => MoveOutcome::Left,
            "arrived" => MoveOutcome::Arrived,
            "nothing" => MoveOutcome::Nothing,
            _ => MoveOutcome::Failed(line.reason.clone()),
        };
        let reports = vec![MoveReport { vm, epoch, outcome }];
        Ok(self.said(Actor::Node(node), None, Command::Node(NodeCommand::ReportMoves { node, incarnation, reports })))
    }

    fn owner(&mut self, actor: Actor, text: &str, line: &Line) -> Told {
        let noun = line.word(1)?;
        let stop_grace_millis = line.values.get("grace").map_or(Ok(0), |grace| millis(grace))?;
        let power = |story: &Self, wanted| {
            Ok::<_, String>(TenantCommand::SetVmPower { vm: story.machine(noun)?, wanted, stop_grace_millis })
        };
        let command = match line.word(0)? {
            "network" => {
                let (tenant, name) = self.owned(noun)?;
                let range = line.word(2)?.parse().map_err(|()| "that is no range")?;
                TenantCommand::CreateNetwork { tenant, name: name.into(), range }
            }
            "image" => self.import(line)?,
            "create" => self.create(line)?,
            "run" => power(self, Wanted::Running)?,
            "suspend" => power(self, Wanted::Suspended)?,
            "stop" => power(self, Wanted::Stopped)?,
            "backup" => {
                TenantCommand::BackUpVm { vm: self.machine(noun)?, full: line.word(2).is_ok_and(|word| word == "full") }
            }
            "schedule" => TenantCommand::SetVmBackup {
                vm: self.machine(noun)?,
                every_millis: line.values.get("every").map_or(Ok(0), |text| millis(text))?,
                keep: line.number("keep", 0)? as u32,
                full_every: line.number("full-every", 0)? as u32,
            },
            "rehearse" => TenantCommand::RehearseBackup {
                image: self.image(noun)?,
                limit_millis: line.values.get("within").map_or(Ok(60_000), |text| millis(text))?,
                expect: line.reason.clone(),
            },
            "abort" => TenantCommand::EndRehearsal { image: self.image(noun)? },
            "drop" => TenantCommand::DeleteImage { image: self.image(noun)? },
            "reboot" => TenantCommand::RebootVm { vm: self.machine(noun)? },
            "tag" => {
                let (tenant, key) = self.owned(noun)?;
                let (key, value) = (key.into(), line.word(2)?.into());
                TenantCommand::SetTag { tenant, key, value, expected: None }
            }
            "untag" => {
                let (tenant, key) = self.owned(noun)?;
                TenantCommand::DeleteTag { tenant, key: key.into(), expected: None }
            }
            "recovery" => {
                TenantCommand::SetVmRecovery { vm: self.machine(noun)?, recovery: line.word(2)?.parse()?, priority: 0 }
            }
            "delete" => TenantCommand::DeleteVm { vm: self.machine(noun)?, force: line.has("force") },
            other => return Err(format!("'{other}' is no command")),
        };
        let request = request(text, line)?;
        Ok(self.said(actor, request, Command::Tenant(command)))
    }

    /// `image acme/debian 2 GiB on alpha beta`.
    fn import(&self, line: &Line) -> Result<TenantCommand, String> {
        let (tenant, name) = self.owned(line.word(1)?)?;
        let size_bytes = line.word(2)?.parse::<u64>().map_err(|_| "the size is no number")? * GIB;
        let holders = line.words.iter().skip(5).map(|node| self.host(node).map(|node| node.id));
        Ok(TenantCommand::ImportImage {
            tenant,
            name: name.into(),
            format: ImageFormat::Qcow2,
            size_bytes,
            virtual_bytes: size_bytes,
            digest: Digest::of(name.as_bytes()),
            replicas: holders.collect::<Result<_, _>>()?,
        })
    }

    /// `create acme/web normal debian lan`: template, image, network.
    fn create(&self, line: &Line) -> Result<TenantCommand, String> {
        let (tenant, name) = self.owned(line.word(1)?)?;
        let image = self.state.image_named(tenant, line.word(3)?).ok_or("no such image")?.id;
        let network = self.state.network_named(tenant, line.word(4)?).ok_or("no such network")?.id;
        let (template, ssh_keys, user_data) = (line.word(2)?.into(), vec![], String::new());
        let recovery = line.values.get("recovery").map_or(Ok(Recovery::default()), |text| text.parse())?;
        let priority = line.number("priority", 0)? as u8;
        let name = name.into();
        Ok(TenantCommand::CreateVm { tenant, name, image, template, network, ssh_keys, user_data, recovery, priority })
    }

    fn tenant(&self, name: &str) -> Result<TenantId, String> {
        self.state.tenant_named(name).map(|tenant| tenant.id).ok_or_else(|| format!("no tenant '{name}'"))
    }
    fn host(&self, name: &str) -> Result<&Node, String> {
        self.state.node_named(name).ok_or_else(|| format!("no node '{name}'"))
    }
    /// `acme/web`.
    fn owned<'a>(&self, path: &'a str) -> Result<(TenantId, &'a str), String> {
        let (tenant, name) = path.split_once('/').ok_or_else(|| format!("'{path}' names no tenant"))?;
        Ok((self.tenant(tenant)?, name))
    }
    /// `acme/web`, or `vm-1`.
    fn machine(&self, path: &str) -> Result<VmId, String> {
        if let Ok(id) = path.parse() {
            return Ok(id);
        }
        let (tenant, name) = self.owned(path)?;
        self.state.vm_named(tenant, name).map(|vm| vm.id).ok_or_else(|| format!("no machine '{path}'"))
    }
}

fn root() -> Actor {
    Actor::User { name: "root".into(), role: Role::Operator }
}

fn quota(line: &Line) -> Result<Quota, String> {
    let image_bytes = line.number("images", 100)?.saturating_mul(GIB);
    Ok(Quota {
        vms: line.number("vms", 100)?,
        size: line.size(1000)?,
        networks: line.number("networks", 10)?,
        image_bytes,
    })
}

/// With `request=N` the command is a request that may be retried; its body is what is asked.
fn request(text: &str, line: &Line) -> Result<Option<Request>, String> {
    let number = line.number("request", 0)?;
    let mut body = [0; 16];
    body.copy_from_slice(&Digest::of(text.as_bytes()).0[..16]);
    Ok((number > 0).then_some(Request { id: RequestId(number.into()), body }))
}

/// `30s`, `10m`, `2h`.
fn millis(text: &str) -> Result<u64, String> {
    let wrong = || format!("'{text}' is no time");
    let (number, unit) = text.split_at_checked(text.len().saturating_sub(1)).ok_or_else(wrong)?;
    let unit = match unit {
        "s" => 1000,
        "m" => 60_000,
        "h" => 3_600_000,
        _ => return Err(wrong()),
    };
    number.parse::<u64>().map(|number| number * unit).map_err(|_| wrong())
}
