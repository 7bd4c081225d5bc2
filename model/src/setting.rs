//! The numbers an operator may change, each with its default, its range and what it is for.

/// One row of the table below.
pub struct Setting {
    pub name: &'static str,
    pub default: u64,
    pub min: u64,
    pub max: u64,
    pub about: &'static str,
}

const fn setting(name: &'static str, default: u64, min: u64, max: u64, about: &'static str) -> Setting {
    Setting { name, default, min, max, about }
}

const MINUTE: u64 = 60_000;
const DAY: u64 = 24 * 60 * MINUTE;

pub const WEIGHT_CPU: &str = "weight-cpu";
pub const WEIGHT_MEMORY: &str = "weight-memory";
pub const WEIGHT_DISK: &str = "weight-disk";
pub const OVERCOMMIT_CPU: &str = "overcommit-cpu-permille";
pub const OVERCOMMIT_MEMORY: &str = "overcommit-memory-permille";
pub const OVERCOMMIT_DISK: &str = "overcommit-disk-permille";
pub const IMAGE_REPLICAS: &str = "image-replicas";
pub const BACKUP_FULL_EVERY: &str = "backup-full-every";
pub const BILL_RUNNING: &str = "bill-running-permille";
pub const BILL_SUSPENDED: &str = "bill-suspended-permille";
pub const BILL_STOPPED: &str = "bill-stopped-permille";
pub const BILL_IMAGE: &str = "bill-image-milli-per-gib";
pub const BILL_IMAGE_TIER: &str = "bill-image-tier-gib";
pub const BILL_IMAGE_ABOVE: &str = "bill-image-above-tier-permille";
pub const CREATE_DEADLINE: &str = "create-deadline-millis";
pub const CHANGE_DEADLINE: &str = "change-deadline-millis";
pub const MIGRATE_DEADLINE: &str = "migrate-deadline-millis";
pub const MOVES_AT_ONCE: &str = "moves-at-once";
pub const DELETE_DEADLINE: &str = "delete-deadline-millis";
pub const VM_ATTEMPTS: &str = "vm-attempts";
pub const NODE_SILENCE: &str = "node-silence-millis";
pub const BRAKE_WINDOW: &str = "brake-window-millis";
pub const BRAKE_SHARE: &str = "brake-share-permille";
pub const BRAKE_COUNT: &str = "brake-count";
pub const TENANT_TAGS: &str = "tenant-tags";
pub const REQUEST_MEMORY: &str = "request-memory-millis";
pub const REQUEST_COUNT: &str = "request-memory-count";

/// A guest's QEMU holds each file of a chain open, and looks through all of them for what was never written.
pub const MOST_FULL_EVERY: u64 = 32;

pub const SETTINGS: &[Setting] = &[
    setting(WEIGHT_CPU, 1, 0, 1000, "how much used CPU counts when the idlest node is chosen"),
    setting(WEIGHT_MEMORY, 1, 0, 1000, "how much used memory counts when the idlest node is chosen"),
    setting(WEIGHT_DISK, 1, 0, 1000, "how much used disk counts when the idlest node is chosen"),
    setting(OVERCOMMIT_CPU, 4000, 100, 64_000, "vCPUs that may be promised, in thousandths of the node's CPUs"),
    setting(OVERCOMMIT_MEMORY, 1000, 100, 4000, "memory that may be promised, in thousandths of the node's memory"),
    setting(OVERCOMMIT_DISK, 2000, 100, 16_000, "disk that may be promised, in thousandths of the node's disk"),
    setting(IMAGE_REPLICAS, 2, 1, 9, "copies of a new image, or one a node when there are fewer nodes"),
    setting(
        BACKUP_FULL_EVERY,
        7,
        1,
        MOST_FULL_EVERY,
        "one of so many backups of a machine is a full one, those between hold what was written since; 1: all are full",
    ),
    setting(BILL_RUNNING, 1000, 0, 10_000, "weight of a running machine, in thousandths of its template's"),
    setting(BILL_SUSPENDED, 500, 0, 10_000, "weight of a suspended machine, in thousandths of its template's"),
    setting(BILL_STOPPED, 100, 0, 10_000, "weight of a stopped machine, in thousandths of its template's"),
    setting(BILL_IMAGE, 100, 0, 1_000_000, "weight of a stored image, in thousandths a GiB, rounded up"),
    setting(BILL_IMAGE_TIER, 100, 1, 1_000_000, "GiB of an image from which on the lower weight counts"),
    setting(BILL_IMAGE_ABOVE, 500, 0, 1000, "weight above the tier, in thousandths of the weight below it"),
    setting(CREATE_DEADLINE, 10 * MINUTE, 1000, DAY, "how long a creation may take on its node"),
    setting(
        CHANGE_DEADLINE,
        3 * MINUTE,
        1000,
        DAY,
        "how long suspend, resume, start, stop (beyond its grace) or reboot may take",
    ),
    setting(MIGRATE_DEADLINE, 60 * MINUTE, 1000, DAY, "how long a machine may be on its way to another node"),
    setting(
        MOVES_AT_ONCE,
        2,
        1,
        64,
        "how many machines may be on their way from a node that is drained, or to one of the others",
    ),
    setting(
        DELETE_DEADLINE,
        2 * MINUTE,
        1000,
        DAY,
        "how long a machine may be deleting before it is gone for its owner",
    ),
    setting(VM_ATTEMPTS, 5, 1, 100, "how often a failed step of a machine is tried before it stays failed"),
    setting(NODE_SILENCE, 2000, 500, DAY, "how long a node may be unheard before it gets no new machines"),
    setting(
        BRAKE_WINDOW,
        10 * MINUTE,
        1000,
        DAY,
        "nodes lost within this time count together when recovery decides to freeze",
    ),
    setting(BRAKE_SHARE, 200, 0, 1000, "recovery freezes when more nodes than this, in thousandths of all, are lost"),
    setting(BRAKE_COUNT, 3, 1, 10_000, "recovery does not freeze while fewer nodes than this are lost"),
    setting(
        TENANT_TAGS,
        100_000,
        0,
        10_000_000,
        "how many tags a tenant may have; every controller keeps all in memory",
    ),
    setting(REQUEST_MEMORY, 60 * MINUTE, MINUTE, DAY, "how long the reply to a request is kept for a retry"),
    setting(REQUEST_COUNT, 200_000, 1000, 10_000_000, "how many replies are kept for retries; the oldest go first"),
];

/// What decides the weights of what is used now.
pub const BILLED_BY: &[&str] =
    &[BILL_RUNNING, BILL_SUSPENDED, BILL_STOPPED, BILL_IMAGE, BILL_IMAGE_TIER, BILL_IMAGE_ABOVE];

pub fn find(name: &str) -> Option<&'static Setting> {
    SETTINGS.iter().find(|s| s.name == name)
}
