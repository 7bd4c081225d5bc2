//! A guest's definition as its destination needs it: the source's own, with the files, bridges and placement changed.
//!
//! It must be the source's own, because the two sides of a migration must agree on every device and its address; a
//! definition made anew could differ after an upgrade of the agent. Everything that is not changed here is kept as it is.

use std::{io, path::Path};

use quick_xml::{
    NsReader, Writer, XmlVersion,
    events::{BytesStart, Event},
    name::{Namespace, ResolveResult},
};

use super::{
    HypervisorError, Result,
    domain_xml::{DomainPaths, MARK_NAMESPACE},
    migration::Destination,
};

/// # Errors
/// When it is not XML, or names no file of the guest: then it is not what libvirt says of it.
pub fn moved_xml(xml: &str, here: &DomainPaths, to: &Destination) -> Result<String> {
    let mut reader = NsReader::from_str(xml);
    let mut writer = Writer::new(Vec::new());
    let mut changes = Changes { here, to, mac: None, files: 0, marks: 0 };
    loop {
        let (namespace, event) = reader.read_resolved_event().map_err(|e| unfit(&e.to_string()))?;
        let marked = matches!(namespace, ResolveResult::Bound(Namespace(MARK_NAMESPACE)));
        let written = match event {
            Event::Eof => break,
            Event::Start(element) => writer.write_event(Event::Start(changes.apply(element, marked)?)),
            Event::Empty(element) => writer.write_event(Event::Empty(changes.apply(element, marked)?)),
            other => writer.write_event(other),
        };
        written.map_err(|e: io::Error| unfit(&e.to_string()))?;
    }
    if changes.files < 2 || changes.marks != 1 {
        return Err(unfit("it does not name the guest's disk, seed and mark"));
    }
    String::from_utf8(writer.into_inner()).map_err(|e| unfit(&e.to_string()))
}

struct Changes<'a> {
    here: &'a DomainPaths,
    to: &'a Destination,
    /// Of the interface that is being read: libvirt writes it before the source.
    mac: Option<String>,
    files: usize,
    marks: usize,
}

impl Changes<'_> {
    fn apply<'e>(&mut self, element: BytesStart<'e>, marked: bool) -> Result<BytesStart<'e>> {
        let value = |name: &str| -> Result<Option<String>> {
            let Some(attribute) = element.try_get_attribute(name).map_err(|e| unfit(&e.to_string()))? else {
                return Ok(None);
            };
            let value = attribute.normalized_value(XmlVersion::Implicit1_0).map_err(|e| unfit(&e.to_string()))?;
            Ok(Some(value.into_owned()))
        };
        match element.local_name().as_ref() {
            "guest" if marked => {
                self.marks += 1;
                changed(&element, "epoch", &self.to.epoch.to_string())
            }
            "mac" => {
                self.mac = value("address")?;
                Ok(element)
            }
            "source" | "log" => {
                if let Some(file) = value("file")?.and_then(|file| self.file(Path::new(&file))) {
                    self.files += 1;
                    return changed(&element, "file", &file);
                }
                let bridge = self.to.bridges.iter().find(|(mac, _)| self.mac.as_ref() == Some(&mac.to_string()));
                match (value("bridge")?, bridge) {
                    (Some(_), Some((_, bridge))) => changed(&element, "bridge", bridge),
                    _ => Ok(element),
                }
            }
            _ => Ok(element),
        }
    }

    /// Where a file of the guest will be.
    fn file(&self, file: &Path) -> Option<String> {
        let (here, to) = (self.here, self.to);
        let pairs = [(&here.disk, &to.disk), (&here.seed, &to.seed), (&here.console, &to.console)];
        let (_, there) = pairs.into_iter().find(|(here, _)| *here == file)?;
        Some(there.to_string_lossy().into_owned())
    }
}

/// The same element with one attribute changed.
fn changed<'e>(element: &BytesStart, name: &str, value: &str) -> Result<BytesStart<'e>> {
    let tag = element.name().as_ref().to_owned();
    let mut new = BytesStart::new(tag);
    for attribute in element.attributes() {
        let attribute = attribute.map_err(|e| unfit(&e.to_string()))?;
        if attribute.key.as_ref() == name {
            new.push_attribute((name, value));
        } else {
            new.push_attribute(attribute);
        }
    }
    Ok(new)
}

fn unfit(why: &str) -> HypervisorError {
    HypervisorError::Transient(format!("the guest's definition cannot be used elsewhere: {why}"))
}

#[cfg(test)]
mod tests {
    use model::{HypervisorKind, Mac, VmId};

    use super::*;
    use crate::hypervisor::{domain_xml, guest_dir::GuestDirs};

    fn destination() -> Destination {
        Destination {
            epoch: 5001,
            disk: "/other/vms/vm-17/disk.qcow2".into(),
            seed: "/other/vms/vm-17/seed.img".into(),
            console: "/other/vms/vm-17/console.log".into(),
            bridges: vec![(Mac([2, 0x54, 0, 0, 1, 4]), "bridge<&>".into())],
        }
    }

    fn spec() -> crate::hypervisor::GuestSpec {
        crate::hypervisor::GuestSpec {
            cluster: "demo".into(),
            vm: VmId(17),
            epoch: 4242,
            tenant: "a\"<&".into(),
            hostname: "web-1".into(),
            size: model::Capacity { vcpus: 1, memory_bytes: 96 << 20, disk_bytes: 1 << 30 },
            base: "/base".into(),
            base_format: model::ImageFormat::Qcow2,
            base_parents: vec![],
            base_virtual_bytes: 1 << 20,
            nics: vec![crate::hypervisor::GuestNic {
                network: model::NetworkId(1),
                mac: Mac([2, 0x54, 0, 0, 1, 4]),
                bridge: "here".into(),
                mtu: 1450,
            }],
            ssh_keys: vec![],
            user_data: String::new(),
        }
    }

    #[test]
    fn files_bridges_and_placement_change_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let here = GuestDirs::open(dir.path()).unwrap().paths(VmId(17));
        let to = destination();
        let there = DomainPaths { disk: to.disk.clone(), seed: to.seed.clone(), console: to.console.clone() };
        let mut moved = spec();
        moved.epoch = to.epoch;
        moved.nics[0].bridge = "bridge<&>".into();
        let xml = domain_xml::domain_xml(&spec(), &here, HypervisorKind::Qemu);
        let found = moved_xml(&xml, &here, &to).unwrap();
        assert_eq!(found, domain_xml::domain_xml(&moved, &there, HypervisorKind::Qemu));
        assert!(moved_xml(&xml, &there, &to).is_err(), "none of its files are in it");
        for bad in ["", "<domain", "<domain/>"] {
            assert!(moved_xml(bad, &here, &to).is_err(), "{bad}");
        }
    }
}
