//! A watch: opened at whichever controller answers, told apart from one that has silently ended.

use std::time::Duration;

use tokio::time::timeout;
use tonic::Streaming;

use super::Client;
use crate::{
    error::ApiError,
    proto::{WatchReply, WatchRequest},
};

/// A controller says how far it is every five seconds; one that says nothing for so long is not there any more.
const SILENCE: Duration = Duration::from_secs(15);

/// What one controller tells.
pub struct Watch {
    stream: Streaming<WatchReply>,
}

impl Client {
    /// What changes after a log index, or from now on; of everything that the token may see when no tenant is named.
    ///
    /// # Errors
    /// What a controller answered, or that none did; `compacted` when the changes after that index are not kept any more.
    pub async fn watch(&self, tenant: &str, after: Option<u64>) -> Result<Watch, ApiError> {
        let asked = WatchRequest { tenant: tenant.to_owned(), after };
        let stream = self.read(asked, |mut stub, request| async move { stub.watch(request).await }).await?;
        Ok(Watch { stream })
    }
}

impl Watch {
    /// The next changes. After an error the watch has ended; `is_retryable` says whether it can go on elsewhere, from the
    /// last revision that was told.
    ///
    /// # Errors
    /// What the controller said at the end, or `unavailable` when it said nothing more.
    pub async fn next(&mut self) -> Result<WatchReply, ApiError> {
        let ended = || ApiError::new("unavailable", "the controller ended the watch");
        match timeout(SILENCE, self.stream.message()).await {
            Ok(Ok(reply)) => reply.ok_or_else(ended),
            Ok(Err(status)) => Err(status.into()),
            Err(_) => Err(ended()),
        }
    }
}
