//! The drills there are: what each does, what it takes, and where it may run.

use clap::ValueEnum;
use serde::Serialize;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    LeaderKill,
    LeaderTransfer,
    ControllerWipe,
    NodePower,
    NodePartition,
    AgentHang,
    DiskFull,
    ClockStep,
    BackupRestore,
    LostMajority,
}

/// One row of `trefoil drill list`.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct About {
    pub drill: Kind,
    pub does: &'static str,
    pub needs: &'static str,
    /// Where it may run.
    pub runs_on: &'static str,
    #[serde(skip)]
    pub live: bool,
}

const UP: &str = "a cloud of `trefoil up`";
const UP_LIBVIRT: &str = "a cloud of `trefoil up` with libvirt";
const ANY: &str = "a cloud of `trefoil up`; a live one by tag";

impl Kind {
    /// As it is typed.
    pub fn name(self) -> String {
        self.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
    }

    pub fn about(self) -> About {
        let row = |does, needs, runs_on| About { drill: self, does, needs, runs_on, live: false };
        match self {
            Self::LeaderKill => {
                row("ends the leading controller as kill -9 does, later starts it again", "3 voters that agree", UP)
            }
            Self::LeaderTransfer => {
                About { live: true, ..row("hands leadership to another controller", "3 voters that agree", ANY) }
            }
            Self::ControllerWipe => row(
                "kills a controller that follows, destroys its data, and joins it anew under a new id",
                "3 voters that agree",
                UP,
            ),
            Self::NodePower => row(
                "cuts the power of the host that runs most machines, later switches it on",
                "3 voters, 2 hosts, a machine that moves when its host is lost",
                UP,
            ),
            Self::NodePartition => row(
                "pulls the network cable of the host that runs most machines, later plugs it in",
                "as node-power",
                UP_LIBVIRT,
            ),
            Self::AgentHang => row(
                "stops the agent of the host that runs most machines with SIGSTOP, later lets it go on",
                "as node-power",
                UP_LIBVIRT,
            ),
            Self::DiskFull => row(
                "lets no file of a following controller grow (a limit of the kernel: EFBIG in place of ENOSPC), so that \
                 it stops; later starts it without",
                "3 voters that agree",
                UP,
            ),
            Self::ClockStep => row(
                "puts the leader's wall clock an hour forward, then an hour behind the true time, later starts it without",
                "3 voters that agree, the package libfaketime",
                UP,
            ),
            Self::BackupRestore => About {
                live: true,
                ..row("backs a machine up, makes another one from it, and removes both", "a running machine", ANY)
            },
            Self::LostMajority => row(
                "kills all controllers but one for ever and destroys their data; the one that is left goes on alone, \
                 others join it, and an old voter must not come back",
                "3 voters that agree, no refounding that is still open",
                UP,
            ),
        }
    }

    /// Whether the fault meets a host, so that there must be machines to recover.
    pub fn hits_a_host(self) -> bool {
        matches!(self, Self::NodePower | Self::NodePartition | Self::AgentHang)
    }

    /// Whether hosts of their own are needed, with cables and guests' processes.
    pub fn takes_libvirt(self) -> bool {
        matches!(self, Self::NodePartition | Self::AgentHang)
    }
}
