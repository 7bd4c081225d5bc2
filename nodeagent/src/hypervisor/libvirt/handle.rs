//! One domain, and what is asked of it again and again.

use virt::{connect::Connect, domain::Domain, error::Error, sys};

use super::{
    super::{
        HypervisorError, Result,
        domain_xml::{MARK_NAMESPACE, Mark, read_mark},
    },
    connection::{Connection, is_missing, is_wrong_state},
    power::{self, Seen},
};

/// A domain and the connection that it belongs to.
pub struct Handle<'a> {
    pub connection: &'a Connection,
    pub connect: Connect,
    pub domain: Domain,
}

impl Handle<'_> {
    pub fn call<T>(&self, doing: &str, call: impl FnOnce(&Domain) -> std::result::Result<T, Error>) -> Result<T> {
        call(&self.domain).map_err(|e| {
            let name = self.domain.name().unwrap_or_default();
            self.connection.explain(&self.connect, &format!("{doing} {name}"), e)
        })
    }

    pub fn seen(&self) -> Result<Seen> {
        self.call("looking at", |d| d.state()).map(|(state, reason)| power::seen(state, reason))
    }

    /// `None` when it carries none, or is gone.
    pub fn mark(&self) -> Result<Option<Mark>> {
        match self.domain.metadata(sys::VIR_DOMAIN_METADATA_ELEMENT as i32, Some(MARK_NAMESPACE), 0) {
            Ok(xml) => Ok(read_mark(&xml)),
            Err(e) => match self.connection.explain(&self.connect, "reading the mark of a guest", e) {
                HypervisorError::Unreachable(why) => Err(HypervisorError::Unreachable(why)),
                _ => Ok(None),
            },
        }
    }

    /// On already, by a start whose agent did not live to see it, is as good.
    pub fn create(&self) -> Result<()> {
        match self.call("starting", |d| d.create()) {
            Err(_) if self.seen().is_ok_and(|seen| matches!(seen, Seen::Running | Seen::Suspended)) => Ok(()),
            other => other,
        }
    }

    /// Off already, or gone, is as good.
    pub fn destroy(&self) -> Result<()> {
        match self.domain.destroy() {
            Err(e) if is_missing(&e) || is_wrong_state(&e) => Ok(()),
            other => self.call("switching off", |_| other),
        }
    }

    pub fn undefine(&self) -> Result<()> {
        let everything = sys::VIR_DOMAIN_UNDEFINE_MANAGED_SAVE
            | sys::VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA
            | sys::VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA
            | sys::VIR_DOMAIN_UNDEFINE_NVRAM;
        match self.domain.undefine_flags(everything) {
            Err(e) if is_missing(&e) => Ok(()),
            other => self.call("undefining", |_| other),
        }
    }
}
