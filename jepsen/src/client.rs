//! One attempt at one controller, and what is known afterwards. Never a retry: a history tells what each attempt saw.

use std::{future::Future, time::Duration};

use api::{
    error::{ApiError, CODE_KEY, ErrorKind},
    proto::{GetTagRequest, ListRequest, SetTagRequest, Tag, WatchReply, WatchRequest, trefoil_client::TrefoilClient},
    tls,
};
use tonic::{Request, Status, Streaming, metadata::AsciiMetadataValue, transport::Channel};

use crate::cluster::Access;

/// What one attempt came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer<T> {
    Ok(T),
    /// Proved not to have happened: a controller refused it.
    Fail(String),
    /// Anything else: it may have happened, may happen later, or never.
    Info(String),
}

pub type Api = TrefoilClient<Channel>;

/// Rows a page when listing; the API's own maximum.
const PAGE: u32 = 1000;

#[derive(Clone)]
pub struct Client {
    /// The controller that it speaks to, as the history names it.
    pub name: String,
    api: Api,
    token: AsciiMetadataValue,
    tenant: String,
    timeout: Duration,
}

impl Client {
    /// # Errors
    /// When the endpoint or the token cannot be one.
    pub fn new(name: &str, endpoint: &str, access: &Access, tenant: &str, timeout: Duration) -> anyhow::Result<Self> {
        let channel = tls::connect(endpoint, tls::client_tls_ca(&access.ca_pem))?;
        Ok(Self {
            name: name.to_owned(),
            api: TrefoilClient::new(channel),
            token: format!("Bearer {}", access.token).parse()?,
            tenant: tenant.to_owned(),
            timeout,
        })
    }

    /// The same one, which gives up waiting after this.
    #[must_use]
    pub fn within(self, timeout: Duration) -> Self {
        Self { timeout, ..self }
    }

    pub fn tenant(&self) -> String {
        self.tenant.clone()
    }

    /// Any call; under a request id when it changes something, else under an empty one.
    pub async fn ask<Q, A, F>(&self, request_id: &str, message: Q, call: impl FnOnce(Api, Request<Q>) -> F) -> Answer<A>
    where
        F: Future<Output = Result<tonic::Response<A>, Status>>,
    {
        let mut request = self.request(message);
        if !request_id.is_empty()
            && let Ok(id) = request_id.parse()
        {
            request.metadata_mut().insert("trefoil-request", id);
        }
        answer(tokio::time::timeout(self.timeout, call(self.api.clone(), request)).await)
    }

    /// Writes a tag under this request id; the answer is its new version.
    pub async fn set_tag(&mut self, request_id: &str, key: &str, value: &str, expected: Option<u64>) -> Answer<u64> {
        let message = SetTagRequest {
            tenant: self.tenant.clone(),
            key: key.to_owned(),
            value: value.to_owned(),
            expected_version: expected,
        };
        let call = |mut api: Api, request| async move { api.set_tag(request).await };
        self.ask(request_id, message, call).await.map(|tag| tag.version)
    }

    /// Reads a tag; `None` when it does not exist.
    pub async fn get_tag(&mut self, key: &str) -> Answer<Option<Tag>> {
        let request = self.request(GetTagRequest { tenant: self.tenant.clone(), key: key.to_owned(), stale: false });
        match tokio::time::timeout(self.timeout, self.api.get_tag(request)).await {
            Ok(Err(status)) if code_of(&status) == Some("not-found") => Answer::Ok(None),
            other => answer(other).map(Some),
        }
    }

    /// Every key of the tenant that begins with the prefix.
    pub async fn list_keys(&mut self, prefix: &str) -> Answer<Vec<String>> {
        let mut keys = Vec::new();
        let mut after = String::new();
        loop {
            let message =
                ListRequest { tenant: self.tenant.clone(), limit: PAGE, after: after.clone(), consistency: None };
            let call = self.api.list_tags(self.request(message));
            match answer(tokio::time::timeout(self.timeout, call).await) {
                Answer::Ok(page) => {
                    keys.extend(page.tags.into_iter().map(|tag| tag.key).filter(|key| key.starts_with(prefix)));
                    if page.next.is_empty() {
                        return Answer::Ok(keys);
                    }
                    after = page.next;
                }
                Answer::Fail(why) => return Answer::Fail(why),
                Answer::Info(why) => return Answer::Info(why),
            }
        }
    }

    /// All that changes in the cloud after an index, or from now on.
    pub async fn watch(&mut self, after: Option<u64>) -> Answer<Streaming<WatchReply>> {
        let call = self.api.watch(self.request(WatchRequest { tenant: String::new(), after }));
        answer(tokio::time::timeout(self.timeout, call).await)
    }

    fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        request.metadata_mut().insert("authorization", self.token.clone());
        request.set_timeout(self.timeout);
        request
    }
}

impl<T> Answer<T> {
    pub fn map<U>(self, change: impl FnOnce(T) -> U) -> Answer<U> {
        match self {
            Self::Ok(value) => Answer::Ok(change(value)),
            Self::Fail(why) => Answer::Fail(why),
            Self::Info(why) => Answer::Info(why),
        }
    }
}

fn code_of(status: &Status) -> Option<&str> {
    status.metadata().get(CODE_KEY).and_then(|code| code.to_str().ok())
}

/// Only a controller's own refusal proves that nothing happened. What the transport says proves nothing here.
fn answer<T>(outcome: Result<Result<tonic::Response<T>, Status>, tokio::time::error::Elapsed>) -> Answer<T> {
    let status = match outcome {
        Ok(Ok(response)) => return Answer::Ok(response.into_inner()),
        Ok(Err(status)) => status,
        Err(_) => return Answer::Info("no answer in time".into()),
    };
    let by_controller = code_of(&status).is_some();
    let error = ApiError::from(status);
    let why = format!("{}: {}", error.code, error.message);
    let refused = by_controller && error.kind != ErrorKind::Unknown && error.code != "internal";
    if refused { Answer::Fail(why) } else { Answer::Info(why) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn only_a_controllers_refusal_proves_anything() {
        let refusal = |code: &str| answer::<()>(Ok(Err(Status::from(ApiError::new(code, "a reason")))));
        assert!(matches!(refusal("version-mismatch"), Answer::Fail(_)));
        assert!(matches!(refusal("no-quorum"), Answer::Fail(_)));
        assert!(matches!(refusal("timeout"), Answer::Info(_)));
        assert!(matches!(refusal("internal"), Answer::Info(_)));
        for status in [Status::unavailable("connect"), Status::unknown("broken"), Status::not_found("no code")] {
            assert!(matches!(answer::<()>(Ok(Err(status))), Answer::Info(_)));
        }
    }
}
