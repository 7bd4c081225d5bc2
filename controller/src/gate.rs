//! Nobody is served whose token is not known: that is asked before a call's message is taken in, so that a stranger cannot
//! have messages gathered here.

use std::{
    convert::Infallible,
    mem,
    sync::Arc,
    task::{Context, Poll},
};

use tonic::{
    Status,
    body::Body,
    codegen::{BoxFuture, Service, http},
    metadata::MetadataMap,
    server::NamedService,
};

use crate::{access, core::Core};

/// In front of a service each of whose methods needs a user's token.
#[derive(Clone)]
pub(crate) struct Gate<S> {
    core: Arc<Core>,
    inner: S,
}

impl<S> Gate<S> {
    pub fn new(core: Arc<Core>, inner: S) -> Self {
        Self { core, inner }
    }
}

impl<S: NamedService> NamedService for Gate<S> {
    const NAME: &'static str = S::NAME;
}

impl<S> Service<http::Request<Body>> for Gate<S>
where
    S: Service<http::Request<Body>, Response = http::Response<Body>, Error = Infallible> + Clone + Send + 'static,
    S::Future: Send,
{
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<Self::Response, Infallible>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, mut request: http::Request<Body>) -> Self::Future {
        let core = self.core.clone();
        // The one that is ready is the one that is called.
        let next = self.inner.clone();
        let mut inner = mem::replace(&mut self.inner, next);
        Box::pin(async move {
            let metadata = MetadataMap::from_headers(mem::take(request.headers_mut()));
            let caller = access::authenticate(&core, &metadata).await;
            *request.headers_mut() = metadata.into_headers();
            match caller {
                Ok(caller) => {
                    request.extensions_mut().insert(caller);
                    inner.call(request).await
                }
                Err(error) => Ok(Status::from(error).into_http()),
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use api::client::TOKEN_KEY;

    use super::*;
    use crate::{access::Caller, fixture::Fixture};

    /// Remembers who was let in.
    #[derive(Clone, Default)]
    struct Inside(Arc<Mutex<Vec<Option<String>>>>);

    impl Service<http::Request<Body>> for Inside {
        type Response = http::Response<Body>;
        type Error = Infallible;
        type Future = BoxFuture<Self::Response, Infallible>;

        fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
            Poll::Ready(Ok(()))
        }

        fn call(&mut self, request: http::Request<Body>) -> Self::Future {
            let caller = request.extensions().get::<Caller>().map(|caller| caller.name.clone());
            self.0.lock().unwrap().push(caller);
            Box::pin(async { Ok(http::Response::default()) })
        }
    }

    #[tokio::test]
    async fn only_who_has_a_token_of_this_cloud_comes_in() {
        let cloud = Fixture::new().await;
        let inside = Inside::default();
        let mut gate = Gate::new(cloud.core.clone(), inside.clone());
        let mut come = |token: Option<String>| {
            let mut request = http::Request::new(Body::empty());
            if let Some(token) = token {
                request.headers_mut().insert(TOKEN_KEY, token.parse().unwrap());
            }
            gate.call(request)
        };
        let unknown = api::token::user_token([1; 32]);
        for token in [None, Some("Bearer x".into()), Some(format!("Bearer {unknown}"))] {
            let refused = Status::from_header_map(come(token).await.unwrap().headers()).unwrap();
            assert_eq!(refused.code(), tonic::Code::Unauthenticated);
        }
        assert!(inside.0.lock().unwrap().is_empty(), "nothing of them was looked at");
        come(Some(format!("Bearer {}", cloud.token))).await.unwrap();
        assert_eq!(*inside.0.lock().unwrap(), [Some("root".to_owned())]);
    }
}
