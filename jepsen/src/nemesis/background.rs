//! A fault that goes on by itself, on and off, until it is told to stop.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use tokio::task::JoinHandle;

/// What it does in each turn; it leaves everything whole at the end of the turn.
pub struct Background {
    stop: Arc<AtomicBool>,
    task: JoinHandle<anyhow::Result<u64>>,
}

impl Background {
    /// Takes turns until it is stopped or a turn fails.
    pub fn start<F>(mut turn: impl FnMut() -> F + Send + 'static) -> Self
    where
        F: Future<Output = anyhow::Result<()>> + Send,
    {
        let stop = Arc::new(AtomicBool::new(false));
        let told = stop.clone();
        let task = tokio::spawn(async move {
            let mut turns = 0;
            while !told.load(Ordering::Relaxed) {
                turn().await?;
                turns += 1;
            }
            Ok(turns)
        });
        Self { stop, task }
    }

    /// Waits for the end of the turn; how many there were.
    ///
    /// # Errors
    /// When a turn has failed.
    pub async fn stop(self) -> anyhow::Result<u64> {
        self.stop.store(true, Ordering::Relaxed);
        self.task.await?
    }
}
