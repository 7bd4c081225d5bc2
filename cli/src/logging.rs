//! What a server tells about itself, and what a client tells when it is asked to: on the error stream, by `TREFOIL_LOG`.

use std::io;

use tracing_subscriber::EnvFilter;

use crate::{arguments::Command, config::variable};

/// openraft tells at `info` of every election timer that fires, a hundred times a second while a link is cut, and at `warn` of
/// every entry and heartbeat that it cannot send to a member that is down: the leader says once that it does not answer.
const OF_A_SERVER: &str = "info,openraft=warn,openraft::replication=error,\
    openraft::engine::handler::replication_handler=error,openraft::core::heartbeat=error";

/// A server logs at `info` unless `TREFOIL_LOG` says otherwise, for example `debug` or `raft=trace,info`; a client logs
/// only when `TREFOIL_LOG` is set.
pub fn init(command: &Command) {
    let asked = variable("TREFOIL_LOG");
    if asked.is_none() && !command.is_server() {
        return;
    }
    let filter = EnvFilter::try_new(asked.as_deref().unwrap_or(OF_A_SERVER));
    let filter = filter.unwrap_or_else(|e| {
        eprintln!("TREFOIL_LOG is ignored: {e}");
        EnvFilter::new(OF_A_SERVER)
    });
    let subscriber = tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr);
    // A line that cannot be written, because the disk is full, is lost. Told about it, the library would panic on the same
    // stream, in whatever thread had something to say.
    let subscriber = subscriber.log_internal_errors(false);
    // A second logger can only come from a test that runs several commands in one process; the first one stays.
    let _ = if command.logs_json() {
        subscriber.json().try_init()
    } else {
        subscriber.with_ansi(io::IsTerminal::is_terminal(&io::stderr())).try_init()
    };
}
