//! What operators decide: tenants, users, templates, settings, prices, join tokens.

use super::{Applied, Moment, check};
use crate::{
    Actor, Capacity, Digest, JoinRole, JoinToken, Noun, Quota, Rejection, Reply, Role, State, Template, Tenant,
    TenantId, Timestamp, User, setting,
};

/// Less memory boots nothing.
const LEAST_MEMORY_BYTES: u64 = 16 << 20;
const MOST_TOKEN_MILLIS: u64 = 7 * 24 * 60 * 60 * 1000;
/// 10^15 nano-units are a million units an hour.
const MOST_PRICE_NANO: u64 = 1_000_000_000_000_000;
/// More than all hosts of the world have. Sums below it are far from saturating, so they are the same however they came about.
const MOST_PROMISED: u64 = 1 << 62;

impl State {
    pub(super) fn create_tenant(&mut self, m: Moment, name: &str, quota: Quota) -> Applied {
        check::label("name", name)?;
        check::not_an_id::<TenantId>("name", name)?;
        if self.tenant_named(name).is_some() {
            return Err(check::exists(Noun::Tenant, name));
        }
        let id = self.cluster_mut(|cluster| {
            cluster.last_tenant += 1;
            TenantId(cluster.last_tenant)
        });
        self.put_tenant(Tenant { id, name: name.into(), quota, created_at: m.now });
        Ok(Reply::Tenant(id))
    }

    /// As much of a quota as is ever given.
    pub(super) fn limit(&self, quota: u64) -> u64 {
        if self.is_careful() { quota.min(MOST_PROMISED) } else { quota }
    }

    pub(super) fn set_quota(&mut self, id: TenantId, quota: Quota) -> Applied {
        let changed = self.tenants.update(&id, |tenant| tenant.quota = quota);
        changed.map(|()| Reply::Done).ok_or_else(|| check::missing(Noun::Tenant, id))
    }

    pub(super) fn delete_tenant(&mut self, id: TenantId) -> Applied {
        let tenant = self.tenants.get(&id).ok_or_else(|| check::missing(Noun::Tenant, id))?;
        let usage = self.usage(id);
        let users = self.users.values().filter(|user| user.role == Role::Member(id)).count();
        let images = self.images.values().filter(|image| image.tenant == id).count();
        let ghosts = self.vms.values().filter(|vm| vm.tenant == id && vm.ghost).count();
        if usage.vms as usize + usage.networks as usize + images + usage.tags as usize + users + ghosts > 0 {
            let by = format!(
                "{} machines ({ghosts} more still held by hosts), {} networks, {images} images, {} tags, {users} users",
                usage.vms, usage.networks, usage.tags
            );
            return Err(check::in_use(Noun::Tenant, &tenant.name, by));
        }
        self.remove_tenant(id);
        Ok(Reply::Done)
    }

    pub(super) fn create_user(&mut self, m: Moment, name: &str, role: Role, token: Digest) -> Applied {
        check::dotted("name", name)?;
        if self.users.contains(&name.to_owned()) {
            return Err(check::exists(Noun::User, name));
        }
        if let Role::Member(tenant) = role
            && !self.tenants.contains(&tenant)
        {
            return Err(check::missing(Noun::Tenant, tenant));
        }
        if self.user_of_token(&token).is_some() {
            return Err(check::exists(Noun::User, "with this token"));
        }
        self.put_user(User { name: name.into(), role, token, created_at: m.now });
        Ok(Reply::Done)
    }

    pub(super) fn delete_user(&mut self, m: Moment, name: &str) -> Applied {
        if !self.users.contains(&name.to_owned()) {
            return Err(check::missing(Noun::User, name));
        }
        if matches!(m.actor, Actor::User { name: own, .. } if own == name) {
            return Err(check::in_use(Noun::User, name, "it is the one that asks".into()));
        }
        self.remove_user(name);
        Ok(Reply::Done)
    }

    pub(super) fn create_template(&mut self, name: &str, size: Capacity, weight_milli: u64) -> Applied {
        check::label("name", name)?;
        check::size(size, LEAST_MEMORY_BYTES)?;
        check::between("weight_milli", weight_milli, 0, 1_000_000)?;
        if self.templates.contains(&name.to_owned()) {
            return Err(check::exists(Noun::Template, name));
        }
        self.templates.put(name.into(), Template { name: name.into(), size, weight_milli });
        Ok(Reply::Done)
    }

    pub(super) fn delete_template(&mut self, name: &str) -> Applied {
        if !self.templates.contains(&name.to_owned()) {
            return Err(check::missing(Noun::Template, name));
        }
        self.drop_template(name);
        Ok(Reply::Done)
    }

    pub(super) fn set_setting(&mut self, m: Moment, name: &str, value: u64) -> Applied {
        let setting = setting::find(name).ok_or_else(|| check::missing(Noun::Setting, name))?;
        check::between(setting.name, value, setting.min, setting.max)?;
        self.settings.put(name.into(), value);
        if setting::BILLED_BY.contains(&setting.name) {
            self.weigh_anew(m.now);
        }
        Ok(Reply::Done)
    }

    pub(super) fn set_price(&mut self, m: Moment, nano_per_hour: u64, from: Timestamp) -> Applied {
        check::between("nano_per_hour", nano_per_hour, 0, MOST_PRICE_NANO)?;
        let from = if from == Timestamp::default() { m.now } else { from };
        if from < m.now {
            return Err(check::invalid(
                "from",
                from.0,
                format!("a time from now on (milliseconds, at least {})", m.now.0),
            ));
        }
        self.prices.put(from, nano_per_hour);
        Ok(Reply::Done)
    }

    pub(super) fn issue_join_token(&mut self, m: Moment, token: Digest, role: JoinRole, valid_millis: u64) -> Applied {
        check::between("valid_millis", valid_millis, 1000, MOST_TOKEN_MILLIS)?;
        if self.join_tokens.contains(&token) {
            return Err(Rejection::BadToken);
        }
        let stale: Vec<_> =
            self.join_tokens.iter().filter(|(_, t)| t.expires_at < m.now).map(|(digest, _)| *digest).collect();
        stale.iter().for_each(|digest| self.drop_join_token(digest));
        self.join_tokens.put(token, JoinToken { role, expires_at: m.now.plus_millis(valid_millis), used_by: None });
        Ok(Reply::Done)
    }

    pub(super) fn usable_token(&self, m: Moment, token: &Digest, role: JoinRole) -> Result<(), Rejection> {
        let usable = |token: &&JoinToken| token.role == role && token.used_by.is_none() && token.expires_at >= m.now;
        self.join_tokens.get(token).filter(usable).map(|_| ()).ok_or(Rejection::BadToken)
    }

    pub(super) fn use_token(&mut self, token: &Digest, by: String) {
        self.join_tokens.update(token, |token| token.used_by = Some(by));
    }

    pub(super) fn visible_tenant(&self, m: Moment, id: TenantId) -> Result<&Tenant, Rejection> {
        self.tenants.get(&id).filter(|_| m.may_see(id)).ok_or_else(|| check::missing(Noun::Tenant, id))
    }
}
