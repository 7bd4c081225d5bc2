//! Tags: a tenant's own small values, written by compare and set.

use super::{Applied, Moment, check};
use crate::{Noun, Rejection, Reply, State, Tag, TenantId, setting};

const MOST_KEY_BYTES: usize = 256;
const MOST_VALUE_BYTES: usize = 4096;

impl State {
    pub(super) fn set_tag(
        &mut self,
        m: Moment,
        tenant: TenantId,
        key: &str,
        value: &str,
        expected: Option<u64>,
    ) -> Applied {
        check::line("key", key, MOST_KEY_BYTES)?;
        if !value.is_empty() {
            check::line("value", value, MOST_VALUE_BYTES)?;
        }
        let owner = self.visible_tenant(m, tenant)?;
        let key = (tenant, key.to_owned());
        let (limit, used) = (self.setting(setting::TENANT_TAGS), self.usage(tenant).tags);
        if used >= limit && !self.tags.contains(&key) {
            let (tenant, what) = (owner.name.clone(), "tags".into());
            return Err(Rejection::Quota { tenant, what, limit, used, asked: 1 });
        }
        self.expect_version(&key, expected)?;
        self.put_tag(key, Tag { value: value.into(), version: m.index });
        Ok(Reply::Version(m.index))
    }

    pub(super) fn delete_tag(&mut self, m: Moment, tenant: TenantId, key: &str, expected: Option<u64>) -> Applied {
        self.visible_tenant(m, tenant)?;
        let key = (tenant, key.to_owned());
        if !self.tags.contains(&key) {
            return Err(check::missing(Noun::Tag, &key.1));
        }
        self.expect_version(&key, expected)?;
        self.drop_tag(&key);
        Ok(Reply::Done)
    }

    fn expect_version(&self, key: &(TenantId, String), expected: Option<u64>) -> Result<(), Rejection> {
        let actual = self.tags.get(key).map_or(0, |tag| tag.version);
        match expected {
            Some(expected) if expected != actual => Err(Rejection::Version { key: key.1.clone(), expected, actual }),
            _ => Ok(()),
        }
    }
}
