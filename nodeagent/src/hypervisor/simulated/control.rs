//! How a test tells simulated guests of another process to misbehave: a file that is obeyed once and removed.
//!
//! `DIR/sim-control.json`: `{"crash": ["vm-1"], "shut_down": ["vm-2"], "ignore_power_button": ["vm-3"],
//! "power_failure": false}`, each part optional. Write it under another name and rename it.

use std::{fs, io, path::Path};

use model::VmId;
use serde::{Deserialize, Deserializer, de::Error};

use super::super::{Result, guest_dir::failed};

#[derive(Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Control {
    #[serde(deserialize_with = "names")]
    pub crash: Vec<VmId>,
    #[serde(deserialize_with = "names")]
    pub shut_down: Vec<VmId>,
    #[serde(deserialize_with = "names")]
    pub ignore_power_button: Vec<VmId>,
    /// The host goes down under all its guests.
    pub power_failure: bool,
}

impl Control {
    pub const FILE: &str = "sim-control.json";

    /// What is asked for since the last time. A file that says nothing sensible is removed and logged.
    pub fn take(dir: &Path) -> Result<Option<Self>> {
        let path = dir.join(Self::FILE);
        let bytes = match fs::read(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other.map_err(|e| failed("read", &path, e))?,
        };
        match fs::remove_file(&path) {
            // Another thread has taken it.
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other.map_err(|e| failed("remove", &path, e))?,
        }
        Ok(serde_json::from_slice(&bytes)
            .inspect_err(|e| tracing::warn!(error = %e, "the control file of the simulation is not understood"))
            .ok())
    }
}

fn names<'de, D: Deserializer<'de>>(from: D) -> std::result::Result<Vec<VmId>, D::Error> {
    let names = Vec::<String>::deserialize(from)?;
    names.iter().map(|name| name.parse().map_err(|()| D::Error::custom(format!("no machine: {name}")))).collect()
}
