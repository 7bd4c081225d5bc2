//! Small values that several nouns share: time, digests, addresses, amounts of hardware.

use std::{fmt, net::Ipv4Addr, str::FromStr};

use serde::{Deserialize, Serialize};

/// Milliseconds since the Unix epoch, stamped by the leader that proposed the entry and never going backwards in `apply`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Timestamp(pub u64);

impl Timestamp {
    pub fn plus_millis(self, millis: u64) -> Self {
        Self(self.0.saturating_add(millis))
    }
    /// Milliseconds from `earlier` to `self`, or 0 when `earlier` is later.
    pub fn millis_since(self, earlier: Self) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
}

/// A BLAKE3 digest: of an image's bytes, of a certificate, of a secret.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Digest(pub [u8; 32]);

impl Digest {
    pub fn of(bytes: &[u8]) -> Self {
        Self(*blake3::hash(bytes).as_bytes())
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl FromStr for Digest {
    type Err = ();
    /// Accepts 64 hexadecimal digits.
    fn from_str(s: &str) -> Result<Self, ()> {
        if s.len() != 64 || !s.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(());
        }
        let mut out = [0; 32];
        for (i, byte) in out.iter_mut().enumerate() {
            *byte = u8::from_str_radix(&s[2 * i..2 * i + 2], 16).map_err(|_| ())?;
        }
        Ok(Self(out))
    }
}

/// An Ethernet address. The quorum mints them locally administered and unicast, `02:54:..`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Mac(pub [u8; 6]);

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// An IPv4 range, `10.0.0.0/24`: the address is the first of the range and the prefix is 8 to 29.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Cidr {
    pub first: Ipv4Addr,
    pub prefix: u8,
}

impl Cidr {
    /// How many addresses the range holds, network and broadcast address included.
    pub fn size(self) -> u32 {
        1u32 << (32 - self.prefix)
    }
    pub fn contains(self, ip: Ipv4Addr) -> bool {
        u32::from(ip).wrapping_sub(u32::from(self.first)) < self.size()
    }
    pub fn overlaps(self, other: Self) -> bool {
        self.contains(other.first) || other.contains(self.first)
    }
    /// The address that the node itself holds in the network: DHCP answers from it.
    pub fn gateway(self) -> Ipv4Addr {
        Ipv4Addr::from(u32::from(self.first) + 1)
    }
    pub fn broadcast(self) -> Ipv4Addr {
        Ipv4Addr::from(u32::from(self.first) + (self.size() - 1))
    }
    pub fn netmask(self) -> Ipv4Addr {
        Ipv4Addr::from(!(self.size() - 1))
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.first, self.prefix)
    }
}

impl FromStr for Cidr {
    type Err = ();
    fn from_str(s: &str) -> Result<Self, ()> {
        let (first, prefix) = s.split_once('/').ok_or(())?;
        let first: Ipv4Addr = first.parse().map_err(|_| ())?;
        let prefix: u8 = prefix.parse().map_err(|_| ())?;
        if !(8..=29).contains(&prefix) {
            return Err(());
        }
        let range = Self { first, prefix };
        let aligned = u32::from(first) & (range.size() - 1) == 0;
        let unicast =
            !first.is_loopback() && !first.is_multicast() && !first.is_unspecified() && !first.is_link_local();
        if aligned && unicast { Ok(range) } else { Err(()) }
    }
}

/// An amount of hardware: what a host has, what a machine takes, what a tenant may use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Capacity {
    pub vcpus: u64,
    pub memory_bytes: u64,
    pub disk_bytes: u64,
}

impl Capacity {
    pub fn plus(self, other: Self) -> Self {
        Self {
            vcpus: self.vcpus.saturating_add(other.vcpus),
            memory_bytes: self.memory_bytes.saturating_add(other.memory_bytes),
            disk_bytes: self.disk_bytes.saturating_add(other.disk_bytes),
        }
    }
    pub fn minus(self, other: Self) -> Self {
        Self {
            vcpus: self.vcpus.saturating_sub(other.vcpus),
            memory_bytes: self.memory_bytes.saturating_sub(other.memory_bytes),
            disk_bytes: self.disk_bytes.saturating_sub(other.disk_bytes),
        }
    }
    pub fn fits_in(self, room: Self) -> bool {
        self.vcpus <= room.vcpus && self.memory_bytes <= room.memory_bytes && self.disk_bytes <= room.disk_bytes
    }
}

/// How much of a resource may be promised, in thousandths of what there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Overcommit {
    pub vcpus_permille: u64,
    pub memory_permille: u64,
    pub disk_permille: u64,
}

impl Overcommit {
    pub fn of(self, capacity: Capacity) -> Capacity {
        let of = |amount: u64, permille: u64| {
            u64::try_from(u128::from(amount) * u128::from(permille) / 1000).unwrap_or(u64::MAX)
        };
        Capacity {
            vcpus: of(capacity.vcpus, self.vcpus_permille),
            memory_bytes: of(capacity.memory_bytes, self.memory_permille),
            disk_bytes: of(capacity.disk_bytes, self.disk_permille),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_is_aligned_unicast_and_of_a_sane_size() {
        let range: Cidr = "10.0.0.0/24".parse().unwrap();
        assert_eq!((range.size(), range.gateway().to_string()), (256, "10.0.0.1".into()));
        assert_eq!(range.netmask().to_string(), "255.255.255.0");
        for bad in ["10.0.0.1/24", "10.0.0.0/30", "10.0.0.0/7", "10.0.0/24", "127.0.0.0/24", "224.0.0.0/24", "10.0.0.0"]
        {
            assert_eq!(bad.parse::<Cidr>(), Err(()), "{bad}");
        }
        assert!(range.overlaps("10.0.0.128/25".parse().unwrap()) && !range.overlaps("10.0.1.0/24".parse().unwrap()));
    }
}
