//! A new quorum from what is left of another: `trefoil controller init --from-backup` and `trefoil quorum recover`.
//!
//! ```text
//! backup file, or the stopped controller's own log and state
//!   ── planted as the whole of a new quorum of one, in a new cluster epoch, at a log index above all before ──►
//!   Refound is its first entry: nothing is given out twice (model::apply::refound)
//! ```
//! `recover` builds beside what it read, in `DATA/refounded`, and then exchanges the parts; what was there stays in
//! `DATA/before-epoch-E`. Until the exchange begins nothing has changed; from then on it can only be completed.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, Result, bail, ensure};
use api::{
    quorum_backup,
    tls::{CertificateAuthority, Identity},
    token,
};
use model::{Actor, Command, ControllerId, Digest, INDICES_PER_SECOND, PlannerCommand, State};
use raft::{Proposal, Replica};
use storage::{
    plant::{self, Remains},
    record::Position,
};

use crate::{
    config::{Config, fresh, random, snapshot_every},
    found::{InitArgs, InitOutcome, raise_level, replica_config},
};

/// The level at which `Refound` came to be.
const REFOUND_LEVEL: u32 = 2;
/// A single voter elects itself after one election timeout.
const ELECTION: Duration = Duration::from_secs(30);
/// Machines' clocks may differ by this much; one that is further behind than the cloud's own time is wrong.
const CLOCK_TOLERANCE_SECONDS: u64 = 60;
const READY: &str = "refounded";
const BUILDING: &str = "refounding";

/// Makes this machine the only controller of the cloud in the backup; the operator gets a new token.
///
/// # Errors
/// When the directory is in use, the backup is not whole, the clock is behind it, or the disk fails.
pub async fn restore(args: InitArgs, file: PathBuf) -> Result<InitOutcome> {
    fresh(&args.data)?;
    let opened = fs::File::open(&file).with_context(|| format!("cannot read {}", file.display()))?;
    let read = tokio::task::spawn_blocking(move || quorum_backup::read(std::io::BufReader::new(opened), |_| {}));
    let backup = read.await?.with_context(|| format!("{} cannot be restored", file.display()))?;
    let (header, state) = (backup.header, backup.state);
    let epoch = next_epoch(&state, header.index)?;
    let authority = CertificateAuthority::from_pem(&header.ca_pem, &header.ca_key_pem)?;
    let id = state.next_founder();
    let identity = authority.issue(&id.to_string())?;
    authority.save(&args.data)?;
    identity.save(&args.data)?;
    let operator_token = token::user_token(random()?);
    let digest = token::user_token_digest(&operator_token).context("a user's token has a digest")?;
    let config = Config {
        id: id.0,
        name: args.name,
        cluster: header.cluster.clone(),
        epoch,
        listen: args.listen,
        advertise: args.advertise,
        timing: args.timing,
        snapshot_every: args.snapshot_every.unwrap_or_else(snapshot_every),
    };
    begin(&args.data, state, header.term, &config, &identity, Some((args.operator, digest))).await?;
    Ok(InitOutcome { cluster: header.cluster, operator_token, ca_pem: authority.ca_pem })
}

pub struct RecoverArgs {
    /// Of a controller that has stopped.
    pub data: PathBuf,
    /// The other members, of which the operator says that none runs any more.
    pub fenced: BTreeSet<u64>,
}

/// What a stopped controller knows, before anything is done with it.
pub struct Survivor {
    pub id: u64,
    pub cluster: String,
    /// The last entry in its log, all of which a recovery keeps.
    pub last: u64,
    pub term: u64,
    /// As far as it knew its log to be agreed.
    pub applied: u64,
    /// The cloud's time at the last entry.
    pub at_millis: u64,
    pub others: BTreeSet<u64>,
    pub epoch: u64,
}

/// # Errors
/// When the controller runs, or what it left cannot be read.
pub fn survivor(data: &Path) -> Result<Survivor> {
    let config = Config::load(data)?;
    ensure!(!data.join(READY).exists(), "a recovery was begun here; 'trefoil quorum recover' completes it");
    let remains = Remains::read(data).context("what the controller left cannot be used (is it stopped?)")?;
    Ok(seen(&config, &remains))
}

fn seen(config: &Config, remains: &Remains) -> Survivor {
    let others = remains.members.addresses.keys().copied().filter(|id| *id != config.id).collect();
    Survivor {
        id: config.id,
        cluster: config.cluster.clone(),
        last: remains.last.index,
        term: remains.last.term,
        applied: remains.applied.map_or(0, |position| position.index),
        at_millis: remains.state.now().0,
        others,
        epoch: config.epoch,
    }
}

/// Makes a stopped controller the only one of its cloud, with everything that it has in its log.
///
/// # Errors
/// When it runs, is damaged, the others are not all named, or the disk fails.
pub async fn recover(args: RecoverArgs) -> Result<Survivor> {
    let old = Config::load(&args.data)?;
    let ready = args.data.join(READY);
    if ready.exists() {
        exchange(&args.data)?;
        bail!("an earlier recovery was interrupted in its last step and is complete now: run the controller");
    }
    let data = args.data.clone();
    let remains = tokio::task::spawn_blocking(move || Remains::read(&data)).await?;
    let remains = remains.context("what the controller left cannot be used (is it stopped?)")?;
    let mut survivor = seen(&old, &remains);
    if args.fenced != survivor.others {
        let list = |ids: &BTreeSet<u64>| ids.iter().map(u64::to_string).collect::<Vec<_>>().join(",");
        bail!("the other members are {}, but {} were named as fenced", list(&survivor.others), list(&args.fenced));
    }
    let epoch = next_epoch(&remains.state, remains.last.index)?;
    survivor.epoch = epoch;
    let identity = Identity::load(&args.data)?.with_context(|| format!("{} has no identity", args.data.display()))?;
    let building = args.data.join(BUILDING);
    if building.exists() {
        fs::remove_dir_all(&building)?;
    }
    fs::create_dir(&building)?;
    let config = Config { epoch, ..old };
    begin(&building, remains.state, remains.last.term, &config, &identity, None).await?;
    fs::rename(&building, &ready)?;
    sync(&args.data)?;
    exchange(&args.data)?;
    Ok(survivor)
}

/// Refuses a directory in which a recovery was interrupted.
pub(crate) fn must_be_whole(data: &Path) -> Result<()> {
    ensure!(
        !data.join(READY).exists(),
        "a recovery of {} was interrupted in its last step; 'trefoil quorum recover' completes it",
        data.display()
    );
    Ok(())
}

/// The epoch of now: above every one before, and with it every log index.
fn next_epoch(state: &State, last: u64) -> Result<u64> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let known = (state.now().0 / 1000).max(last / INDICES_PER_SECOND).max(state.quorum().epoch);
    if known > now + CLOCK_TOLERANCE_SECONDS {
        bail!("this machine's clock is {} s behind what the cloud has seen: set it, then try again", known - now);
    }
    Ok(now.max(known + 1))
}

/// Plants the state, leads it for a moment, and lets the refounding be its first entry.
async fn begin(
    data: &Path,
    state: State,
    term: u64,
    config: &Config,
    identity: &Identity,
    operator: Option<(String, Digest)>,
) -> Result<()> {
    let start = Position { term: term + 1, leader: config.id, index: config.epoch * INDICES_PER_SECOND };
    let (place, address) = (data.to_owned(), config.advertise.clone());
    let level = state.quorum().level;
    tokio::task::spawn_blocking(move || plant::plant(&place, &state, start, &address)).await??;
    let replica = Replica::open(replica_config(config, data.to_owned(), identity)).await?;
    let mut leadership = replica.watch_leadership();
    let leads = leadership.wait_for(|now| now.leading);
    tokio::time::timeout(ELECTION, leads).await.context("the new quorum elected no leader")??;
    if level < REFOUND_LEVEL {
        raise_level(&replica, REFOUND_LEVEL).await?;
    }
    let refound = PlannerCommand::Refound {
        epoch: config.epoch,
        controller: ControllerId(config.id),
        name: config.name.clone(),
        address: config.advertise.clone(),
        operator,
    };
    let command = Command::Planner(refound);
    let refounded = replica.propose(Proposal { request: None, actor: Actor::System, command }).await?;
    replica.shutdown().await;
    refounded.applied.context("the quorum was not refounded")?;
    config.save(data)
}

/// Puts what was built in the place of what was read. May be interrupted, and begun again, at any point.
fn exchange(data: &Path) -> Result<()> {
    let ready = data.join(READY);
    let epoch = Config::load(&ready).or_else(|_| Config::load(data))?.epoch;
    let before = data.join(format!("before-epoch-{epoch}"));
    fs::create_dir_all(&before)?;
    let is_state = |name: &str| name.starts_with("state-");
    // The tables go together with the file that names them: as long as that is still to come, all of them are old.
    if ready.join("CURRENT").exists() {
        for name in names(data)?.into_iter().filter(|name| is_state(name)) {
            fs::rename(data.join(&name), before.join(&name))?;
        }
    }
    let mut parts = names(&ready)?;
    // The new tables last, and what says of which epoch all this is before them.
    parts.sort_by_key(|name| (is_state(name), name != "CURRENT"));
    for name in parts {
        if data.join(&name).exists() {
            fs::rename(data.join(&name), before.join(&name))?;
        }
        fs::rename(ready.join(&name), data.join(&name))?;
    }
    fs::remove_dir(&ready)?;
    sync(data)
}

fn names(folder: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(folder)? {
        names.extend(entry?.file_name().into_string());
    }
    Ok(names)
}

fn sync(folder: &Path) -> Result<()> {
    Ok(fs::File::open(folder)?.sync_all()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONFIG: &str =
        "id = 1\nname = 'one'\ncluster = 'c'\nlisten = '127.0.0.1:1'\nadvertise = 'a:1'\ntiming = 'lan'\n";

    fn write(folder: &Path, name: &str, text: &str) {
        let path = folder.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    fn read(folder: &Path, name: &str) -> String {
        fs::read_to_string(folder.join(name)).unwrap_or_default()
    }

    /// What stands before the exchange: old and new parts, and what neither is.
    fn prepared() -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        let data = folder.path();
        for (name, text) in
            [("raft-log/a", "old"), ("state-7/a", "old"), ("snapshots/a", "old"), ("CURRENT", "state-7")]
        {
            write(data, name, text);
        }
        write(data, "identity.pem", "kept");
        write(data, "controller.toml", CONFIG);
        for (name, text) in
            [("raft-log/a", "new"), ("state-1/a", "new"), ("snapshots/b", "new"), ("CURRENT", "state-1")]
        {
            write(&data.join(READY), name, text);
        }
        write(&data.join(READY), "controller.toml", &format!("{CONFIG}epoch = 9\n"));
        folder
    }

    fn is_exchanged(data: &Path) {
        let (now, before) = (|name| read(data, name), |name| read(&data.join("before-epoch-9"), name));
        assert_eq!([now("raft-log/a"), now("state-1/a"), now("CURRENT")], ["new", "new", "state-1"]);
        assert_eq!([before("raft-log/a"), before("state-7/a"), before("CURRENT")], ["old", "old", "state-7"]);
        assert_eq!(
            (now("identity.pem"), now("snapshots/a"), now("snapshots/b")),
            ("kept".into(), "".into(), "new".into())
        );
        assert_eq!(Config::load(data).unwrap().epoch, 9);
        assert!(!data.join(READY).exists() && !data.join("state-7").exists());
        must_be_whole(data).unwrap();
    }

    #[test]
    fn parts_are_exchanged_and_the_old_ones_kept() {
        let folder = prepared();
        assert!(must_be_whole(folder.path()).is_err());
        exchange(folder.path()).unwrap();
        is_exchanged(folder.path());
    }

    #[test]
    fn an_exchange_that_was_interrupted_anywhere_is_completed() {
        // What an exchange has done when it is interrupted after so many of its moves.
        let moves: [(&str, &str); 10] = [
            ("state-7", "before-epoch-9/state-7"),
            ("CURRENT", "before-epoch-9/CURRENT"),
            ("refounded/CURRENT", "CURRENT"),
            ("raft-log", "before-epoch-9/raft-log"),
            ("refounded/raft-log", "raft-log"),
            ("snapshots", "before-epoch-9/snapshots"),
            ("refounded/snapshots", "snapshots"),
            ("controller.toml", "before-epoch-9/controller.toml"),
            ("refounded/controller.toml", "controller.toml"),
            ("refounded/state-1", "state-1"),
        ];
        for done in 0..=moves.len() {
            let folder = prepared();
            let data = folder.path();
            fs::create_dir(data.join("before-epoch-9")).unwrap();
            for (from, to) in &moves[..done] {
                fs::rename(data.join(from), data.join(to)).unwrap();
            }
            exchange(data).unwrap();
            is_exchanged(data);
        }
    }
}
