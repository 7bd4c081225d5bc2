//! A list of machines as one stream, taken up again where it broke.

use std::time::Duration;

use futures::{Stream, StreamExt};
use tokio::time::{Instant, sleep, timeout};
use tonic::Status;

use super::{ATTEMPT_TIMEOUT, Client, LAST_BACKOFF};
use crate::{
    error::ApiError,
    proto::{ListVmsReply, ListVmsRequest},
};

impl Client {
    /// Every machine that is asked for, from `asked.after` on. `read_at` is of the beginning: what was acknowledged before is in
    /// the list.
    ///
    /// # Errors
    /// What a controller answered, or that none gave the rest before the deadline since the last rows.
    pub async fn all_vms(&self, asked: ListVmsRequest) -> Result<ListVmsReply, ApiError> {
        let open = |asked| self.read(asked, |mut stub, request| async move { stub.stream_vms(request).await });
        gather(asked, self.deadline, open).await
    }
}

async fn gather<S, Fut>(
    mut asked: ListVmsRequest,
    deadline: Duration,
    open: impl Fn(ListVmsRequest) -> Fut,
) -> Result<ListVmsReply, ApiError>
where
    Fut: Future<Output = Result<S, ApiError>>,
    S: Stream<Item = Result<ListVmsReply, Status>> + Unpin,
{
    let mut all = ListVmsReply::default();
    let mut give_up = Instant::now() + deadline;
    loop {
        let mut rows = open(asked.clone()).await?;
        let broken = loop {
            let mut reply = match timeout(ATTEMPT_TIMEOUT, rows.next()).await {
                Ok(Some(Ok(reply))) => reply,
                Ok(Some(Err(status))) => break status.into(),
                Ok(None) => break ApiError::new("unavailable", "the controller ended the list too soon"),
                Err(_) => break ApiError::new("unavailable", "the controller said no more of the list"),
            };
            give_up = Instant::now() + deadline;
            all.vms.append(&mut reply.vms);
            all.read_at = all.read_at.or(reply.read_at);
            if reply.next.is_empty() {
                return Ok(all);
            }
            asked.after = reply.next;
            asked.at_least = all.read_at.filter(|at| !at.stale).map_or(0, |at| at.index);
        };
        if !broken.is_retryable() || Instant::now() >= give_up {
            return Err(broken);
        }
        sleep(LAST_BACKOFF).await;
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use futures::{future, stream};

    use super::*;
    use crate::proto::{ReadAt, Vm};

    fn page(ids: &[&str], next: &str, index: u64) -> Result<ListVmsReply, Status> {
        let vms = ids.iter().map(|id| Vm { id: (*id).into(), ..Vm::default() }).collect();
        let read_at = Some(ReadAt { index, ..ReadAt::default() });
        Ok(ListVmsReply { vms, next: next.into(), read_at })
    }

    /// What the streams that are opened one after the other say, and what was asked of each.
    async fn told(
        mut streams: Vec<Vec<Result<ListVmsReply, Status>>>,
    ) -> (Result<ListVmsReply, ApiError>, Vec<(String, u64)>) {
        streams.reverse();
        let (streams, opened) = (RefCell::new(streams), RefCell::new(Vec::new()));
        let open = |asked: ListVmsRequest| {
            opened.borrow_mut().push((asked.after, asked.at_least));
            future::ready(Ok(stream::iter(streams.borrow_mut().pop().expect("it was opened too often"))))
        };
        let all = gather(ListVmsRequest::default(), Duration::from_secs(60), open).await;
        (all, opened.into_inner())
    }

    #[tokio::test]
    async fn a_list_goes_on_where_it_broke() {
        let lost = || Err(Status::unavailable("the connection broke"));
        let (all, opened) =
            told(vec![vec![page(&["a", "b"], "b", 7), lost()], vec![page(&["c"], "c", 8)], vec![page(&["d"], "", 9)]])
                .await;
        let all = all.unwrap();
        assert_eq!(all.vms.iter().map(|vm| vm.id.as_str()).collect::<Vec<_>>(), ["a", "b", "c", "d"]);
        assert_eq!((all.read_at.unwrap().index, all.next.as_str()), (7, ""), "as of the beginning");
        assert_eq!(opened, [(String::new(), 0), ("b".into(), 7), ("c".into(), 7)]);
    }

    #[tokio::test]
    async fn a_refusal_ends_it() {
        let refused = Err(Status::from(ApiError::forbidden("not yours")));
        let (all, opened) = told(vec![vec![page(&["a"], "a", 7), refused]]).await;
        assert_eq!((all.unwrap_err().code.as_str(), opened.len()), ("forbidden", 1));
    }
}
