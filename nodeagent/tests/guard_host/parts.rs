//! What the tests of the guard share: a member's directory, the processes beside it, and what `/proc` says of them.

use std::{
    fs,
    path::Path,
    process::{Child, Command},
};

use api::{beat::BeatKey, tls::CertificateAuthority};
use model::NodeId;
use nodeagent::membership::{DataDir, Membership};

/// A guard, or an agent that only renews; see there.
pub const PARTS: &str = env!("CARGO_BIN_EXE_guard_parts");

/// Makes `data` the directory of a member.
pub fn join(cluster: &str, data: &Path) {
    let member = Membership {
        cluster: cluster.into(),
        node: NodeId(1),
        name: "h1".into(),
        address: "127.0.0.1:7480".into(),
        beat_key: BeatKey([7; 32]),
        identity: CertificateAuthority::create(cluster).unwrap().issue("node-1").unwrap(),
    };
    DataDir::open(data).unwrap().save_membership(&member).unwrap();
}

/// Ends with the test.
pub struct Process(pub Child);

impl Process {
    pub fn guard(data: &Path) -> Self {
        Self(Command::new(PARTS).arg("guard").arg(data).spawn().unwrap())
    }

    pub fn kill(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// proc(5): the state follows the name, which may hold anything, brackets too.
pub fn state(pid: u32) -> Option<char> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(')')?.1.trim_start().chars().next()
}
