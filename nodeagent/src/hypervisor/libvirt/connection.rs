//! The connection to libvirtd: opened when needed, dropped when dead, and errors in our words.
//!
//! libvirtd may restart at any moment; its guests do not notice. A call that meets a dead connection fails as
//! `Unreachable`, and the next one opens anew. Calls on one connection may run side by side.

use std::{
    sync::{Mutex, OnceLock},
    thread,
};

use virt::{
    connect::Connect,
    error::{Error, ErrorNumber},
    event,
};

use super::super::{HypervisorError, Result};

/// A libvirtd that answers nothing for this many seconds, thrice, is given up: calls return instead of hanging.
const KEEPALIVE_SECONDS: i32 = 5;
const KEEPALIVE_COUNT: u32 = 3;

pub struct Connection {
    uri: String,
    open: Mutex<Option<Connect>>,
}

impl Connection {
    /// # Errors
    /// Permanent, when the URI has a NUL byte; nothing is opened yet.
    pub fn new(uri: &str) -> Result<Self> {
        if uri.contains('\0') {
            return Err(HypervisorError::Permanent("the libvirt URI has a NUL byte".into()));
        }
        Ok(Self { uri: uri.into(), open: Mutex::new(None) })
    }

    /// A live connection, as far as anybody can tell before using it.
    pub fn get(&self) -> Result<Connect> {
        let mut open = self.open.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(connect) = open.as_ref() {
            if connect.is_alive().unwrap_or(false) {
                return Ok(connect.clone());
            }
            tracing::warn!(uri = self.uri, "the connection to libvirtd was lost");
            *open = None;
        }
        run_event_loop();
        let connect = Connect::open(Some(&self.uri)).map_err(|e| HypervisorError::Unreachable(e.message().into()))?;
        // Only remote drivers know keep-alive; a driver inside this process cannot be out of reach.
        if let Err(e) = connect.set_keep_alive(KEEPALIVE_SECONDS, KEEPALIVE_COUNT) {
            tracing::debug!(error = e.message(), "no keep-alive on this connection");
        }
        tracing::info!(uri = self.uri, "connected to libvirtd");
        *open = Some(connect.clone());
        Ok(connect)
    }

    /// What an error of a call on `connect` means to the caller.
    pub fn explain(&self, connect: &Connect, doing: &str, error: Error) -> HypervisorError {
        let text = format!("{doing}: {}", error.message());
        if !connect.is_alive().unwrap_or(false) {
            return HypervisorError::Unreachable(text);
        }
        match error.code().known() {
            Some(ErrorNumber::NoConnect) => HypervisorError::Unreachable(text),
            Some(
                ErrorNumber::XmlError
                | ErrorNumber::XmlDetail
                | ErrorNumber::ConfigUnsupported
                | ErrorNumber::InvalidArg
                | ErrorNumber::NoSupport,
            ) => HypervisorError::Permanent(text),
            _ => HypervisorError::Transient(text),
        }
    }
}

/// True when the domain is not there: never defined, or gone since it was listed.
pub fn is_missing(error: &Error) -> bool {
    error.code().known() == Some(ErrorNumber::NoDomain)
}

/// True when the domain is not in the state that the call needs.
pub fn is_wrong_state(error: &Error) -> bool {
    error.code().known() == Some(ErrorNumber::OperationInvalid)
}

/// libvirt's client needs a running event loop for keep-alive. One for the whole process, before the first open.
fn run_event_loop() {
    static STARTED: OnceLock<()> = OnceLock::new();
    STARTED.get_or_init(|| {
        // Errors come back from each call; libvirt need not print them too.
        virt::error::clear_error_callback();
        if let Err(e) = event::event_register_default_impl() {
            tracing::warn!(error = e.message(), "no event loop for libvirt: a hung libvirtd will not be noticed");
            return;
        }
        let run = || {
            while event::event_run_default_impl().is_ok() {}
            tracing::error!("libvirt's event loop has ended");
        };
        if let Err(e) = thread::Builder::new().name("libvirt-events".into()).spawn(run) {
            tracing::warn!(error = %e, "no thread for libvirt's event loop");
        }
    });
}
