//! Bills and prices.

use api::{error::ApiError, proto};
use model::{Command, OperatorCommand, State, Timestamp};
use tonic::Request;

use super::Service;
use crate::{access, access::Caller, core::Freshness, name, view};

impl Service {
    pub(super) async fn bill_get(&self, request: Request<proto::GetBillRequest>) -> Result<proto::Bill, ApiError> {
        let caller = access::caller(&request)?;
        let body = request.into_inner();
        let to = if body.to_millis == 0 { Timestamp(u64::MAX) } else { Timestamp(body.to_millis) };
        let from = Timestamp(body.from_millis);
        if from >= to {
            return Err(ApiError::invalid(format!("from_millis is '{}', but must be before to_millis", from.0)));
        }
        let now = self.core.replica.now();
        let look = |state: &State| {
            let tenant = name::tenant(state, &caller, &body.tenant)?;
            Ok(view::bill(tenant, model::bill::bill(state, tenant.id, from, to, now)))
        };
        let (bill, read_at) = self.core.read(body.stale.into(), look).await?;
        bill.map(|bill| proto::Bill { read_at: Some(read_at), ..bill })
    }

    pub(super) async fn price_list(
        &self,
        request: Request<proto::ListRequest>,
    ) -> Result<proto::ListPricesReply, ApiError> {
        access::caller(&request)?;
        let look = |state: &State| {
            let price = |(from, nano): (&Timestamp, &u64)| proto::Price { nano_per_hour: *nano, from_millis: from.0 };
            state.prices().iter().map(price).collect()
        };
        let (prices, _) = self.core.read(Freshness::Linearizable, look).await?;
        Ok(proto::ListPricesReply { prices })
    }
}

/// 0 is from now on; a time that passes while the request is under way counts as now, not as a refusal.
pub(super) fn set_price(state: &State, caller: &Caller, body: &proto::SetPriceRequest) -> Result<Command, ApiError> {
    caller.must_be_operator()?;
    let from = if body.from_millis == 0 { Timestamp::default() } else { Timestamp(body.from_millis) };
    if from != Timestamp::default() && from < state.now() {
        return Err(ApiError::invalid(format!(
            "from_millis is '{}', but must not have passed: prices never change backwards",
            from.0
        )));
    }
    Ok(Command::Operator(OperatorCommand::SetPrice { nano_per_hour: body.nano_per_hour, from }))
}
