//! What libvirt is told about a guest: the domain XML as a pure function, and the mark by which it is found again.
//!
//! Every machine is the same modest PC: BIOS, i440FX, one virtio disk over the base image, a read-only seed disk, virtio
//! NICs, a serial console that is logged, the guest agent's channel. Deliberately not here: talking to libvirt, and
//! anything that differs from host to host except the kind of hypervisor.

use std::{
    borrow::Cow,
    io,
    path::{Path, PathBuf},
};

use model::{HypervisorKind, ImageId, VmId};
use quick_xml::{
    NsReader, Writer, XmlVersion,
    events::{BytesText, Event},
    name::{Namespace, ResolveResult},
};

use super::{GuestNic, GuestSpec};
use crate::network::tap;

/// Namespace of the mark inside a domain's `<metadata>`. The number rises when the mark changes its meaning.
pub const MARK_NAMESPACE: &str = "urn:trefoil:guest:1";

/// QEMU's cache of translated code under software emulation. The default (an eighth of the host's memory is a common
/// result) costs more than a small guest itself; with 32 MiB a 96 MiB guest was seen to need 170 MB instead of 205.
const TRANSLATION_CACHE_MIB: &str = "32";

/// How often the balloon asks the guest for its memory use: as often as a host's status is sent.
const BALLOON_PERIOD_SECONDS: &str = "5";

/// What libvirt calls the guest's own disk, and the seed.
pub const DISK: &str = "vda";
const SEED: &str = "vdb";

/// Where a guest's files are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DomainPaths {
    pub disk: PathBuf,
    pub seed: PathBuf,
    pub console: PathBuf,
}

/// What a domain carries about whose it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mark {
    pub cluster: String,
    pub vm: VmId,
    pub epoch: u64,
    pub tenant: String,
}

/// `trefoil-1a2b3c4d-vm-17`: unique on a host even when two clouds share it, and short enough for every socket path
/// that libvirt makes from it.
pub fn domain_name(cluster: &str, vm: VmId) -> String {
    format!("{}{vm}", name_prefix(cluster))
}

/// What the names of all domains of a cloud begin with.
pub fn name_prefix(cluster: &str) -> String {
    format!("trefoil-{}-", &blake3::hash(cluster.as_bytes()).to_hex()[..8])
}

/// The same machine has the same UUID on every host and after every redefinition: guests bind licences and disks to it.
pub fn domain_uuid(cluster: &str, vm: VmId) -> String {
    uuid_of("guest", cluster, &vm.to_string())
}

/// A UUID of version 8 (RFC 9562: contents of the maker's own choice) from what it names.
pub(super) fn uuid_of(what: &str, cluster: &str, name: &str) -> String {
    let mut hasher = blake3::Hasher::new_derive_key("trefoil 2026 domain uuid");
    for part in [what, cluster, name] {
        hasher.update(&(part.len() as u64).to_le_bytes()).update(part.as_bytes());
    }
    let digest = hasher.finalize();
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&digest.as_bytes()[..16]);
    bytes[6] = bytes[6] & 0x0f | 0x80;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    let hex = format!("{:032x}", u128::from_be_bytes(bytes));
    format!("{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..])
}

/// The definition of a guest. Whatever the strings contain, the result is well-formed.
pub fn domain_xml(spec: &GuestSpec, paths: &DomainPaths, kind: HypervisorKind) -> String {
    let name = (domain_name(&spec.cluster, spec.vm), domain_uuid(&spec.cluster, spec.vm));
    guest_xml(spec, paths, kind, name, |w| mark(w, spec))
}

/// The same machine under another name, and without a mark: it is nobody's.
pub fn rehearsal_xml(spec: &GuestSpec, image: ImageId, paths: &DomainPaths, kind: HypervisorKind) -> String {
    let uuid = uuid_of("rehearsal", &spec.cluster, &image.to_string());
    guest_xml(spec, paths, kind, (rehearsal_name(&spec.cluster, image), uuid), |_| Ok(()))
}

pub fn rehearsal_name(cluster: &str, image: ImageId) -> String {
    format!("{}{image}", rehearsal_prefix(cluster))
}

/// What the names of all rehearsals of a cloud begin with.
pub fn rehearsal_prefix(cluster: &str) -> String {
    format!("{}rehearsal-", name_prefix(cluster))
}

fn guest_xml(
    spec: &GuestSpec,
    paths: &DomainPaths,
    kind: HypervisorKind,
    (name, uuid): (String, String),
    mark: impl FnOnce(&mut Xml) -> io::Result<()>,
) -> String {
    document(|w| {
        element(w, "domain", &[("type", type_of(kind))], |w| {
            text(w, "name", &[], &name)?;
            text(w, "uuid", &[], &uuid)?;
            text(w, "title", &[], &spec.hostname)?;
            mark(w)?;
            text(w, "memory", &[("unit", "b")], &spec.size.memory_bytes.to_string())?;
            text(w, "vcpu", &[("placement", "static")], &spec.size.vcpus.to_string())?;
            machine(w, kind)?;
            lifecycle(w)?;
            element(w, "devices", &[], |w| devices(w, spec, paths))
        })
    })
}

/// A machine that only runs its boot sector: what the kind of hypervisor is tried with.
pub fn probe_xml(name: &str, uuid: &str, kind: HypervisorKind, disk: &Path, output: &Path) -> String {
    document(|w| {
        element(w, "domain", &[("type", type_of(kind))], |w| {
            text(w, "name", &[], name)?;
            text(w, "uuid", &[], uuid)?;
            text(w, "memory", &[("unit", "MiB")], "16")?;
            text(w, "vcpu", &[], "1")?;
            machine(w, kind)?;
            element(w, "devices", &[], |w| {
                file_disk(w, "raw", disk, ("vda", "virtio"), false)?;
                element(w, "serial", &[("type", "file")], |w| {
                    leaf(w, "source", &[("path", &output.to_string_lossy()), ("append", "off")])
                })?;
                leaf(w, "controller", &[("type", "usb"), ("model", "none")])?;
                leaf(w, "memballoon", &[("model", "none")])
            })
        })
    })
}

/// What a backup copies, and where to: the guest's own disk, whole, or what was written since a checkpoint.
pub fn backup_xml(file: &Path, since: Option<&str>) -> String {
    document(|w| {
        element(w, "domainbackup", &[("mode", "push")], |w| {
            since.map_or(Ok(()), |checkpoint| text(w, "incremental", &[], checkpoint))?;
            element(w, "disks", &[], |w| {
                element(w, "disk", &[("name", DISK), ("backup", "yes"), ("type", "file")], |w| {
                    leaf(w, "driver", &[("type", "qcow2")])?;
                    leaf(w, "target", &[("file", &file.to_string_lossy())])
                })?;
                leaf(w, "disk", &[("name", SEED), ("backup", "no")])
            })
        })
    })
}

/// What is written to the guest's own disk is counted from here on.
pub fn checkpoint_xml(name: &str) -> String {
    document(|w| {
        element(w, "domaincheckpoint", &[], |w| {
            text(w, "name", &[], name)?;
            element(w, "disks", &[], |w| {
                leaf(w, "disk", &[("name", DISK), ("checkpoint", "bitmap")])?;
                leaf(w, "disk", &[("name", SEED), ("checkpoint", "no")])
            })
        })
    })
}

/// Also the name of the bitmap in the disk's file.
pub fn checkpoint_name(number: u128) -> String {
    format!("trefoil-{number}")
}

/// The mark in a domain's XML, or in what libvirt returns for [`MARK_NAMESPACE`]: that element alone, stripped of its
/// namespace. `None` when there is none or it is not one that this version understands.
pub fn read_mark(xml: &str) -> Option<Mark> {
    let mut reader = NsReader::from_str(xml);
    loop {
        match reader.read_resolved_event().ok()? {
            (
                ResolveResult::Bound(Namespace(MARK_NAMESPACE)) | ResolveResult::Unbound,
                Event::Start(e) | Event::Empty(e),
            ) if e.local_name().as_ref() == "guest" => {
                let value = |name: &str| -> Option<String> {
                    let attribute = e.try_get_attribute(name).ok()??;
                    Some(attribute.normalized_value(XmlVersion::Implicit1_0).ok()?.into_owned())
                };
                return Some(Mark {
                    cluster: value("cluster")?,
                    vm: value("vm")?.parse().ok()?,
                    epoch: value("epoch")?.parse().ok()?,
                    tenant: value("tenant")?,
                });
            }
            (_, Event::Eof) => return None,
            _ => {}
        }
    }
}

type Xml = Writer<Vec<u8>>;

fn type_of(kind: HypervisorKind) -> &'static str {
    match kind {
        HypervisorKind::Kvm => "kvm",
        HypervisorKind::Qemu | HypervisorKind::Simulated => "qemu",
    }
}

fn mark(w: &mut Xml, spec: &GuestSpec) -> io::Result<()> {
    element(w, "metadata", &[], |w| {
        leaf(
            w,
            "trefoil:guest",
            &[
                ("xmlns:trefoil", MARK_NAMESPACE),
                ("cluster", &spec.cluster),
                ("vm", &spec.vm.to_string()),
                ("epoch", &spec.epoch.to_string()),
                ("tenant", &spec.tenant),
            ],
        )
    })
}

fn machine(w: &mut Xml, kind: HypervisorKind) -> io::Result<()> {
    element(w, "os", &[], |w| {
        text(w, "type", &[("arch", "x86_64"), ("machine", "pc")], "hvm")?;
        leaf(w, "boot", &[("dev", "hd")])
    })?;
    element(w, "features", &[], |w| {
        leaf(w, "acpi", &[])?;
        leaf(w, "apic", &[])?;
        if kind == HypervisorKind::Kvm {
            return Ok(());
        }
        element(w, "tcg", &[], |w| text(w, "tb-cache", &[("unit", "MiB")], TRANSLATION_CACHE_MIB))
    })?;
    // Distributions no longer start on QEMU's default CPU: they want x86-64-v2 at least.
    leaf(w, "cpu", &[("mode", if kind == HypervisorKind::Kvm { "host-model" } else { "maximum" })])?;
    leaf(w, "clock", &[("offset", "utc")])
}

/// A reboot inside stays inside; a crash switches the machine off, so that the agent sees it and reports it.
fn lifecycle(w: &mut Xml) -> io::Result<()> {
    text(w, "on_poweroff", &[], "destroy")?;
    text(w, "on_reboot", &[], "restart")?;
    text(w, "on_crash", &[], "destroy")
}

fn devices(w: &mut Xml, spec: &GuestSpec, paths: &DomainPaths) -> io::Result<()> {
    file_disk(w, "qcow2", &paths.disk, (DISK, "virtio"), false)?;
    file_disk(w, "raw", &paths.seed, (SEED, "virtio"), true)?;
    spec.nics.iter().try_for_each(|nic| interface(w, nic))?;
    element(w, "serial", &[("type", "pty")], |w| {
        leaf(w, "log", &[("file", &paths.console.to_string_lossy()), ("append", "on")])?;
        leaf(w, "target", &[("type", "isa-serial"), ("port", "0")])
    })?;
    element(w, "console", &[("type", "pty")], |w| leaf(w, "target", &[("type", "serial"), ("port", "0")]))?;
    element(w, "channel", &[("type", "unix")], |w| {
        leaf(w, "target", &[("type", "virtio"), ("name", "org.qemu.guest_agent.0")])
    })?;
    leaf(w, "controller", &[("type", "usb"), ("model", "none")])?;
    element(w, "memballoon", &[("model", "virtio")], |w| leaf(w, "stats", &[("period", BALLOON_PERIOD_SECONDS)]))?;
    element(w, "rng", &[("model", "virtio")], |w| text(w, "backend", &[("model", "random")], "/dev/urandom"))
}

/// Writeback: the guest's flushes reach the disk, the pages of a base that many guests share are cached once, and file
/// systems without O_DIRECT work. Discard keeps the overlay as small as what the guest uses.
fn file_disk(w: &mut Xml, format: &str, file: &Path, target: (&str, &str), read_only: bool) -> io::Result<()> {
    element(w, "disk", &[("type", "file"), ("device", "disk")], |w| {
        leaf(w, "driver", &[("name", "qemu"), ("type", format), ("cache", "writeback"), ("discard", "unmap")])?;
        leaf(w, "source", &[("file", &file.to_string_lossy())])?;
        leaf(w, "target", &[("dev", target.0), ("bus", target.1)])?;
        if read_only { leaf(w, "readonly", &[]) } else { Ok(()) }
    })
}

/// No option ROM: nothing here boots from the network, and the BIOS need not look.
fn interface(w: &mut Xml, nic: &GuestNic) -> io::Result<()> {
    element(w, "interface", &[("type", "bridge")], |w| {
        leaf(w, "mac", &[("address", &nic.mac.to_string())])?;
        leaf(w, "source", &[("bridge", &nic.bridge)])?;
        leaf(w, "target", &[("dev", &tap(nic.mac))])?;
        leaf(w, "model", &[("type", "virtio")])?;
        leaf(w, "mtu", &[("size", &nic.mtu.to_string())])?;
        leaf(w, "rom", &[("enabled", "no")])
    })
}

fn document(body: impl FnOnce(&mut Xml) -> io::Result<()>) -> String {
    let mut w = Writer::new_with_indent(Vec::new(), b' ', 2);
    body(&mut w).expect("writing to memory does not fail");
    let mut bytes = w.into_inner();
    bytes.push(b'\n');
    String::from_utf8(bytes).expect("every part of it was text")
}

type Attributes<'a> = [(&'a str, &'a str)];

fn element(
    w: &mut Xml,
    name: &str,
    with: &Attributes,
    inner: impl FnOnce(&mut Xml) -> io::Result<()>,
) -> io::Result<()> {
    let with = with.iter().map(|(key, value)| (*key, legal(value)));
    w.create_element(name).with_attributes(with).write_inner_content(inner).map(drop)
}

fn leaf(w: &mut Xml, name: &str, with: &Attributes) -> io::Result<()> {
    let with = with.iter().map(|(key, value)| (*key, legal(value)));
    w.create_element(name).with_attributes(with).write_empty().map(drop)
}

fn text(w: &mut Xml, name: &str, with: &Attributes, content: &str) -> io::Result<()> {
    let with = with.iter().map(|(key, value)| (*key, legal(value)));
    w.create_element(name).with_attributes(with).write_text_content(BytesText::new(&legal(content))).map(drop)
}

/// XML 1.0 has no way to write most control characters, not even escaped; they become U+FFFD.
fn legal(value: &str) -> Cow<'_, str> {
    let bad = |c: char| c.is_control() || matches!(c, '\u{fffe}' | '\u{ffff}');
    if value.contains(bad) { Cow::Owned(value.replace(bad, "\u{fffd}")) } else { Cow::Borrowed(value) }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use model::{Capacity, ImageFormat, Mac, NetworkId};

    use super::*;

    fn spec() -> GuestSpec {
        GuestSpec {
            cluster: "demo".into(),
            vm: VmId(17),
            epoch: 4242,
            tenant: "acme".into(),
            hostname: "web-1".into(),
            size: Capacity { vcpus: 2, memory_bytes: 96 << 20, disk_bytes: 1 << 30 },
            base: "/srv/trefoil/images/base".into(),
            base_format: ImageFormat::Qcow2,
            base_parents: vec![],
            base_virtual_bytes: 45 << 20,
            nics: vec![GuestNic {
                network: NetworkId(3),
                mac: Mac([2, 0x54, 0, 0, 1, 4]),
                bridge: "tfbr100".into(),
                mtu: 1450,
            }],
            ssh_keys: vec!["ssh-ed25519 AAAA ada".into()],
            user_data: String::new(),
        }
    }

    fn paths() -> DomainPaths {
        let dir = Path::new("/srv/trefoil/vms/vm-17");
        DomainPaths { disk: dir.join("disk.qcow2"), seed: dir.join("seed.img"), console: dir.join("console.log") }
    }

    /// Compares with the file under `testdata`; with UPDATE_GOLDEN=1 in the environment it is rewritten instead.
    #[track_caller]
    fn check(file: &str, xml: &str) {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata").join(file);
        if std::env::var_os("UPDATE_GOLDEN").is_some_and(|v| v == "1") {
            fs::write(&path, xml).unwrap();
        }
        assert_eq!(xml, fs::read_to_string(&path).unwrap(), "{file} differs: UPDATE_GOLDEN=1 rewrites it");
    }

    #[test]
    fn the_xml_is_the_golden_one() {
        check("domain-qemu.xml", &domain_xml(&spec(), &paths(), HypervisorKind::Qemu));
        check("domain-kvm.xml", &domain_xml(&spec(), &paths(), HypervisorKind::Kvm));
        check("domain-no-nic.xml", &domain_xml(&GuestSpec { nics: vec![], ..spec() }, &paths(), HypervisorKind::Qemu));
        let alone = GuestSpec { nics: vec![], ..spec() };
        check("domain-rehearsal.xml", &rehearsal_xml(&alone, ImageId(12), &paths(), HypervisorKind::Kvm));
        let output = Path::new("/srv/trefoil/probe/output");
        let uuid = uuid_of("probe", "demo", "kvm");
        let part = Path::new("/srv/trefoil/vms/vm-17/backup.part");
        check("backup.xml", &backup_xml(part, None));
        check("backup-increment.xml", &backup_xml(part, Some(&checkpoint_name(17))));
        check("checkpoint.xml", &checkpoint_xml(&checkpoint_name(18)));
        check("probe-kvm.xml", &probe_xml("trefoil-probe", &uuid, HypervisorKind::Kvm, Path::new("/d"), output));
    }

    #[test]
    fn hostile_strings_stay_data() {
        let hostile = GuestSpec {
            tenant: "a\"/><b>&\0\u{1b}\n]]>".into(),
            hostname: "</title><on_crash>preserve</on_crash>".into(),
            cluster: "c'<!--".into(),
            ..spec()
        };
        let xml = domain_xml(&hostile, &paths(), HypervisorKind::Qemu);
        check("domain-hostile.xml", &xml);
        let mark = read_mark(&xml).unwrap();
        assert_eq!(mark.cluster, hostile.cluster);
        assert_eq!(mark.tenant, "a\"/><b>&\u{fffd}\u{fffd}\u{fffd}]]>");
    }

    #[test]
    fn the_mark_reads_back_and_nothing_else_is_taken_for_one() {
        let expected = Mark { cluster: "demo".into(), vm: VmId(17), epoch: 4242, tenant: "acme".into() };
        assert_eq!(read_mark(&domain_xml(&spec(), &paths(), HypervisorKind::Kvm)), Some(expected.clone()));
        let start = format!("xmlns:x='{MARK_NAMESPACE}' cluster='demo' epoch='4242' tenant='acme'");
        assert_eq!(read_mark(&format!("<x:guest {start} vm='vm-17'/>")), Some(expected.clone()));
        assert_eq!(read_mark("<guest cluster='demo' vm='vm-17' epoch='4242' tenant='acme'/>"), Some(expected));
        for other in [
            "",
            "<",
            "<domain/>",
            "<guest cluster='demo' vm='vm-17' epoch='-1' tenant='acme'/>",
            "<t:guest xmlns:t='urn:other' cluster='demo' vm='vm-17' epoch='1' tenant='acme'/>",
            &format!("<x:guest {start} vm='17'/>"),
            &format!("<x:guest {start}/>"),
        ] {
            assert_eq!(read_mark(other), None, "{other}");
        }
    }

    #[test]
    fn names_differ_by_cloud_and_machine() {
        assert_eq!(domain_name("demo", VmId(17)), format!("{}vm-17", name_prefix("demo")));
        assert_ne!(domain_name("demo", VmId(1)), domain_name("other", VmId(1)));
        assert_ne!(domain_uuid("demo", VmId(1)), domain_uuid("demo", VmId(2)));
        assert_ne!(domain_uuid("demo", VmId(1)), domain_uuid("other", VmId(1)));
        assert_eq!(domain_uuid("demo", VmId(1)).as_bytes()[14], b'8');
    }
}
