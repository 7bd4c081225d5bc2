//! Being asked to end: whoever starts processes must hear it, to take them down.

use tokio::signal::unix::{SignalKind, signal};

/// Returns when this process gets SIGINT or SIGTERM.
///
/// # Panics
/// When the runtime has no signals.
pub async fn asked_to_end() {
    let mut interrupted = signal(SignalKind::interrupt()).expect("the runtime hears signals");
    let mut terminated = signal(SignalKind::terminate()).expect("the runtime hears signals");
    tokio::select! {
        _ = interrupted.recv() => {}
        _ = terminated.recv() => {}
    }
}
