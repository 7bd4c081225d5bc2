//! A restore that is only tried: what is booted, what was seen of it, and what may be concluded from that.
//!
//! ```text
//!   proof of life    its guest agent answers · its console asks for a login, or says what was expected     ok
//!   proof of death   its console tells of a panic or an emergency shell · it went off · it read nothing    failed
//!   neither in time  it read its disk, perhaps wrote to it: a boot loader, a kernel, no more is known      unknown
//! ```
//!
//! A guest that writes to its disk has mounted a file system, but so has a kernel that replays a journal and then finds
//! no programs: that is no proof. Deliberately not here: how a guest is booted and looked at; each hypervisor has its own.

use std::time::Duration;

use model::{ImageId, Verdict};

use super::GuestSpec;

/// A boot loader and the smallest kernel are some mebibytes; a BIOS that finds nothing to boot reads a few sectors.
const LEAST_READ_BYTES: u64 = 1 << 20;

/// What a console says when it is over. Each is written by a kernel, a boot loader or an init to a person who must come.
const LAST_WORDS: &[&str] = &[
    "Kernel panic",
    "You are in emergency mode",
    "Cannot open access to console, the root account is locked",
    "(initramfs)",
    "dracut:/#",
    "grub rescue>",
    "No bootable device",
];

/// More of a line than this is not worth telling.
const MOST_LINE_CHARS: usize = 120;

/// What is to be booted.
#[derive(Clone, Debug)]
pub struct Rehearsal {
    /// Names it on this host.
    pub image: ImageId,
    /// Without a network: nothing that it does can be heard by anybody.
    pub spec: GuestSpec,
    /// How long it may take to come up.
    pub limit: Duration,
    /// What its console says when it has; empty: its guest agent or a login prompt tells.
    pub expect: String,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rehearsed {
    pub verdict: Verdict,
    pub took: Duration,
    /// One sentence.
    pub reason: String,
}

/// A look at a guest.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Signs {
    pub on: bool,
    pub agent_answers: bool,
    pub console: String,
    /// Of its own disk, since it was switched on.
    pub read_bytes: u64,
    pub written_bytes: u64,
}

/// `None` while there is something to wait for.
pub fn judge(signs: &Signs, expect: &str, late: bool) -> Option<(Verdict, String)> {
    let line = |phrase: &str| signs.console.lines().find(|line| line.contains(phrase)).map(shown);
    if !expect.is_empty() {
        if let Some(line) = line(expect) {
            return Some((Verdict::Booted, format!("its console said '{line}'")));
        }
    } else if signs.agent_answers {
        return Some((Verdict::Booted, "its guest agent answered".into()));
    } else if let Some(line) = line("login:") {
        return Some((Verdict::Booted, format!("its console asked '{line}'")));
    }
    if let Some(line) = LAST_WORDS.iter().find_map(|words| line(words)) {
        return Some((Verdict::Failed, format!("its console said '{line}'")));
    }
    if !signs.on {
        return Some((Verdict::Failed, "it went off by itself".into()));
    }
    if !late {
        return None;
    }
    if signs.read_bytes < LEAST_READ_BYTES && signs.console.trim().is_empty() {
        return Some((
            Verdict::Failed,
            format!("it read only {} of its disk: nothing was booted", kib(signs.read_bytes)),
        ));
    }
    let said = match signs.console.lines().rev().find(|line| !line.trim().is_empty()) {
        Some(line) => format!("its console said last '{}'", shown(line)),
        None => "its console said nothing".into(),
    };
    let (read, wrote) = (kib(signs.read_bytes), kib(signs.written_bytes));
    Some((Verdict::Unknown, format!("it read {read} of its disk and wrote {wrote}; {said}")))
}

fn kib(bytes: u64) -> String {
    format!("{} KiB", bytes.div_ceil(1024))
}

/// It ends on somebody's terminal.
fn shown(line: &str) -> String {
    let plain = line.trim().chars().map(|c| if c.is_control() { ' ' } else { c });
    plain.take(MOST_LINE_CHARS).collect::<String>().trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn on(console: &str) -> Signs {
        Signs { on: true, console: console.into(), read_bytes: 40 << 20, written_bytes: 8 << 10, ..Signs::default() }
    }

    #[track_caller]
    fn check(signs: &Signs, expect: &str, verdict: Verdict, reason: &str) {
        for late in [false, true] {
            assert_eq!(judge(signs, expect, late), Some((verdict, reason.into())));
        }
    }

    #[test]
    fn life_and_death_are_known_at_once() {
        let answers = Signs { agent_answers: true, ..on("") };
        check(&answers, "", Verdict::Booted, "its guest agent answered");
        check(&on("\r\nDebian 12 web ttyS0\r\n\r\nweb login: "), "", Verdict::Booted, "its console asked 'web login:'");
        check(&on("ready\u{1b}[0m: web\n"), "ready", Verdict::Booted, "its console said 'ready [0m: web'");
        let panic = on("[ 1.0] Kernel panic - not syncing: VFS: Unable to mount root fs\nrebooting");
        let said = "its console said '[ 1.0] Kernel panic - not syncing: VFS: Unable to mount root fs'";
        check(&panic, "", Verdict::Failed, said);
        check(&Signs { on: false, ..on("booting") }, "", Verdict::Failed, "it went off by itself");
    }

    #[test]
    fn what_is_expected_is_waited_for_whatever_else_is_seen() {
        let answers = Signs { agent_answers: true, ..on("web login: ") };
        assert_eq!(judge(&answers, "database is up", false), None);
        let reason = "it read 40960 KiB of its disk and wrote 8 KiB; its console said last 'web login:'";
        assert_eq!(judge(&answers, "database is up", true), Some((Verdict::Unknown, reason.into())));
    }

    #[test]
    fn a_guest_that_is_silent_in_the_end_is_not_called_well_and_one_that_booted_nothing_is_called_dead() {
        assert_eq!(judge(&on(""), "", false), None);
        let reason = "it read 40960 KiB of its disk and wrote 8 KiB; its console said nothing";
        assert_eq!(judge(&on(""), "", true), Some((Verdict::Unknown, reason.into())));
        let blank = Signs { read_bytes: 1536, written_bytes: 0, ..on(" \r\n") };
        assert_eq!(judge(&blank, "", false), None);
        let reason = "it read only 2 KiB of its disk: nothing was booted";
        assert_eq!(judge(&blank, "", true), Some((Verdict::Failed, reason.into())));
    }
}
