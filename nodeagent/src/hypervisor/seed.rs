//! The seed disk: what a guest reads about itself at its first boot, in the form of cloud-init's NoCloud source.
//!
//! A FAT volume labelled `CIDATA` with `meta-data` and `user-data`. Keys travel in `meta-data`, so that they reach the
//! guest whatever its owner wrote as `user-data`; there is no `network-config`, since addresses come by DHCP.
//! The same guest gives the same bytes.

use std::io::{Cursor, Write};

use fatfs::{FileSystem, FormatVolumeOptions, FsOptions, format_volume};

use super::{GuestSpec, HypervisorError, Result, domain_xml::domain_name};

/// Room for the FAT's own tables and the directory.
const OVERHEAD_BYTES: usize = 128 << 10;

/// Volumes are whole mebibytes, as partitioning tools and hypervisors like them.
const STEP_BYTES: usize = 1 << 20;

/// Far above what the API lets through, and far below what FAT16 could hold.
const MAX_TEXT_BYTES: usize = 16 << 20;

/// # Errors
/// Permanent, when the texts are absurdly long.
pub fn seed_image(spec: &GuestSpec) -> Result<Vec<u8>> {
    let meta_data = meta_data(spec);
    let user_data = user_data(spec);
    let text_bytes = meta_data.len() + user_data.len();
    if text_bytes > MAX_TEXT_BYTES {
        return Err(HypervisorError::Permanent(format!("{} bytes of user data are too many for a seed", text_bytes)));
    }
    write_volume(&[("meta-data", &meta_data), ("user-data", &user_data)], text_bytes)
        .map_err(|e| HypervisorError::Permanent(format!("cannot make the seed disk: {e}")))
}

/// The instance id is the machine's, not the placement's: a guest that keeps its disk is not configured a second time.
/// JSON strings are YAML strings.
fn meta_data(spec: &GuestSpec) -> String {
    let instance = domain_name(&spec.cluster, spec.vm);
    let mut text = format!("instance-id: {instance}\nlocal-hostname: {}\n", host_name(spec));
    if !spec.ssh_keys.is_empty() {
        text.push_str(&format!("public-keys: {}\n", json(&spec.ssh_keys)));
    }
    text
}

/// The owner's text as it is; without one, the keys once more for readers that look only here.
fn user_data(spec: &GuestSpec) -> String {
    match (spec.user_data.is_empty(), spec.ssh_keys.is_empty()) {
        (false, _) => spec.user_data.clone(),
        (true, true) => "#cloud-config\n{}\n".into(),
        (true, false) => format!("#cloud-config\nssh_authorized_keys: {}\n", json(&spec.ssh_keys)),
    }
}

fn json(texts: &[String]) -> String {
    serde_json::to_string(texts).expect("strings are JSON")
}

/// Unquoted, because small guests read it with `sed`; so whatever cannot stand in a host name is replaced.
fn host_name(spec: &GuestSpec) -> String {
    let legal = |c: char| if c.is_ascii_alphanumeric() || c == '-' || c == '.' { c } else { '-' };
    let name: String = spec.hostname.chars().map(legal).take(253).collect();
    let name = name.trim_matches(['-', '.']);
    if name.is_empty() { spec.vm.to_string() } else { name.into() }
}

fn write_volume(files: &[(&str, &str)], text_bytes: usize) -> std::io::Result<Vec<u8>> {
    let size = (text_bytes + OVERHEAD_BYTES).next_multiple_of(STEP_BYTES);
    let mut volume = Cursor::new(vec![0; size]);
    // The serial number is fixed, and fatfs without its clock writes 1980 everywhere: equal guests, equal bytes.
    format_volume(&mut volume, FormatVolumeOptions::new().volume_label(*b"CIDATA     ").volume_id(0x7472_6566))?;
    let system = FileSystem::new(&mut volume, FsOptions::new())?;
    for (name, text) in files {
        let mut file = system.root_dir().create_file(name)?;
        file.write_all(text.as_bytes())?;
        file.flush()?;
    }
    system.unmount()?;
    Ok(volume.into_inner())
}

#[cfg(test)]
mod tests {
    use std::{io::Read, path::PathBuf};

    use model::{Capacity, ImageFormat, VmId};

    use super::*;

    fn spec(hostname: &str, ssh_keys: &[&str], user_data: &str) -> GuestSpec {
        GuestSpec {
            cluster: "demo".into(),
            vm: VmId(17),
            epoch: 1,
            tenant: "acme".into(),
            hostname: hostname.into(),
            size: Capacity::default(),
            base: PathBuf::new(),
            base_format: ImageFormat::Raw,
            base_parents: vec![],
            base_virtual_bytes: 0,
            nics: vec![],
            ssh_keys: ssh_keys.iter().map(|k| k.to_string()).collect(),
            user_data: user_data.into(),
        }
    }

    fn read(image: Vec<u8>, name: &str) -> String {
        let system = FileSystem::new(Cursor::new(image), FsOptions::new()).unwrap();
        assert_eq!(system.read_volume_label_from_root_dir().unwrap().as_deref(), Some("CIDATA"));
        let mut text = String::new();
        system.root_dir().open_file(name).unwrap().read_to_string(&mut text).unwrap();
        text
    }

    #[track_caller]
    fn check(spec: &GuestSpec, meta_data: &str, user_data: &str) {
        let image = seed_image(spec).unwrap();
        assert_eq!(image, seed_image(spec).unwrap(), "equal guests have equal seeds");
        assert_eq!(read(image.clone(), "meta-data"), meta_data);
        assert_eq!(read(image, "user-data"), user_data);
    }

    #[test]
    fn a_guest_reads_its_name_its_keys_and_its_owners_text() {
        let id = format!("instance-id: {}\n", domain_name("demo", VmId(17)));
        check(&spec("web-1", &[], ""), &format!("{id}local-hostname: web-1\n"), "#cloud-config\n{}\n");
        check(
            &spec("web-1", &["ssh-ed25519 AAAA \"ada\""], ""),
            &format!("{id}local-hostname: web-1\npublic-keys: [\"ssh-ed25519 AAAA \\\"ada\\\"\"]\n"),
            "#cloud-config\nssh_authorized_keys: [\"ssh-ed25519 AAAA \\\"ada\\\"\"]\n",
        );
        check(
            &spec("web-1", &["k"], "#!/bin/sh\necho hello\n"),
            &format!("{id}local-hostname: web-1\npublic-keys: [\"k\"]\n"),
            "#!/bin/sh\necho hello\n",
        );
    }

    #[test]
    fn hostile_texts_stay_in_their_place() {
        let hostile = spec("a\nroot: x\0", &["k\nroot: {}"], "\0\u{1b}#!");
        let meta = read(seed_image(&hostile).unwrap(), "meta-data");
        assert_eq!(meta.lines().count(), 3, "{meta}");
        assert!(meta.contains("local-hostname: a-root--x\n"), "{meta}");
        assert_eq!(read(seed_image(&hostile).unwrap(), "user-data"), "\0\u{1b}#!");
        assert!(read(seed_image(&spec("\u{fffd}", &[], "")).unwrap(), "meta-data").contains("local-hostname: vm-17\n"));
    }

    #[test]
    fn long_texts_fit_and_absurd_ones_are_refused() {
        let long = "x".repeat(3 << 20);
        assert_eq!(read(seed_image(&spec("a", &[], &long)).unwrap(), "user-data"), long);
        let absurd = "x".repeat(MAX_TEXT_BYTES + 1);
        assert!(matches!(seed_image(&spec("a", &[], &absurd)), Err(HypervisorError::Permanent(_))));
    }
}
