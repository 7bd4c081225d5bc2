//! Every id is its own type, minted by `apply` from a counter and written `noun-number`.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};

macro_rules! id {
    ($(#[$doc:meta])* $name:ident, $prefix:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        pub struct $name(pub u64);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($prefix, "-{}"), self.0)
            }
        }

        impl FromStr for $name {
            type Err = ();
            /// Accepts exactly what `Display` writes.
            fn from_str(s: &str) -> Result<Self, ()> {
                let digits = s.strip_prefix(concat!($prefix, "-")).ok_or(())?;
                if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
                    return Err(());
                }
                digits.parse().map(Self).map_err(|_| ())
            }
        }
    };
}

id!(
    /// A customer: owns machines, networks and images, and gets the bill.
    TenantId, "tenant"
);
id!(
    /// A virtual machine.
    VmId, "vm"
);
id!(
    /// A host that runs an agent.
    NodeId, "node"
);
id!(
    /// A tenant network.
    NetworkId, "net"
);
id!(
    /// A disk image in the replicated store.
    ImageId, "img"
);
id!(
    /// A member of the quorum. Never given out twice: a controller whose disk was lost returns under a new one.
    ControllerId, "controller"
);

/// Names one request for ever, chosen by the client (a UUIDv7): a retry under the same id is the same request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(pub u128);

/// As text where people read it: JSON has no numbers of 128 bits.
impl Serialize for RequestId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if serializer.is_human_readable() { serializer.collect_str(self) } else { self.0.serialize(serializer) }
    }
}

impl<'de> Deserialize<'de> for RequestId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        if !deserializer.is_human_readable() {
            return u128::deserialize(deserializer).map(Self);
        }
        String::deserialize(deserializer)?.parse().map_err(|()| D::Error::custom("it is no request id"))
    }
}

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let h = format!("{:032x}", self.0);
        write!(f, "{}-{}-{}-{}-{}", &h[..8], &h[8..12], &h[12..16], &h[16..20], &h[20..])
    }
}

impl FromStr for RequestId {
    type Err = ();
    /// Accepts 32 hexadecimal digits, with or without the dashes of a UUID.
    fn from_str(s: &str) -> Result<Self, ()> {
        let hex: String = s.chars().filter(|c| *c != '-').collect();
        if hex.len() != 32 || !hex.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(());
        }
        u128::from_str_radix(&hex, 16).map(Self).map_err(|_| ())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_read_back_what_they_write_and_nothing_else() {
        assert_eq!("vm-17".parse(), Ok(VmId(17)));
        assert_eq!(VmId(17).to_string(), "vm-17");
        for bad in ["vm-", "vm-+1", "vm-1x", "node-1", "17", "vm-99999999999999999999"] {
            assert_eq!(bad.parse::<VmId>(), Err(()), "{bad}");
        }
        let request = RequestId(0x0190_aabb_ccdd_7000_8000_0000_0000_0001);
        assert_eq!(request.to_string().parse(), Ok(request));
    }
}
