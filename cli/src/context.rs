//! What every command of a client shares: the connection, the tenant, the request id, how to print.

use std::io::IsTerminal;

use api::{
    RequestId,
    client::{Client, new_request_id},
    error::ApiError,
    proto::{Consistency, ListRequest, NamedRef},
};
use serde::Serialize;

use crate::{
    arguments::Global,
    config::Config,
    output::{self, Format},
};

/// Rows a page; the largest that a controller gives, so that a long list takes few calls.
pub const PAGE: u32 = 1000;

pub struct Context {
    pub client: Client,
    /// Name or id; empty when the token's own is meant.
    pub tenant: String,
    pub format: Format,
    pub stale: bool,
    /// Of the one change that a command makes.
    pub request: RequestId,
}

impl Context {
    /// # Errors
    /// When the configuration is not usable.
    pub fn new(global: &Global, format: Format) -> Result<Self, ApiError> {
        let config = Config::load(global)?;
        let client = Client::new(&config.endpoints, &config.ca_pem, &config.token)?.with_deadline(global.timeout);
        let request = global.request_id.unwrap_or_else(new_request_id);
        tracing::debug!(%request, endpoints = ?config.endpoints, "client");
        Ok(Self { client, tenant: config.tenant, format, stale: global.stale, request })
    }

    /// Whether a person is watching: then progress is shown and waiting is the default.
    pub fn is_watched(&self) -> bool {
        std::io::stdout().is_terminal() && std::io::stderr().is_terminal()
    }

    pub fn named(&self, name: String) -> NamedRef {
        NamedRef { tenant: self.tenant.clone(), name, stale: self.stale }
    }

    /// The request for a page after `after`.
    pub fn page(&self, after: String) -> ListRequest {
        let consistency = Some(Consistency { stale: self.stale });
        ListRequest { tenant: self.tenant.clone(), limit: PAGE, after, consistency }
    }

    pub fn print<T: Serialize + ?Sized>(&self, value: &T, text: impl FnOnce() -> String) -> Result<(), ApiError> {
        output::print(self.format, value, text)
    }
}

/// Reads page after page: `next` gives the rows after a key, and the key to go on from, empty at the end.
///
/// # Errors
/// Those of `next`.
pub async fn all_pages<T>(
    mut next: impl AsyncFnMut(String) -> Result<(Vec<T>, String), ApiError>,
) -> Result<Vec<T>, ApiError> {
    let mut all = Vec::new();
    let mut after = String::new();
    loop {
        let (rows, last) = next(after.clone()).await?;
        all.extend(rows);
        // A key that does not move would never end.
        if last.is_empty() || last == after {
            return Ok(all);
        }
        after = last;
    }
}

/// `read!(context, get_vm, body)`: the reply of a call that changes nothing.
macro_rules! read {
    ($context:expr, $method:ident, $body:expr) => {
        $context.client.read($body, |mut stub, request| async move { stub.$method(request).await }).await
    };
}

/// `change!(context, create_vm, body)`: the reply of a call that changes something, made once under the command's
/// request id.
macro_rules! change {
    ($context:expr, $method:ident, $body:expr) => {
        $context
            .client
            .mutate($context.request, $body, |mut stub, request| async move { stub.$method(request).await })
            .await
    };
}

pub(crate) use {change, read};
