//! A list of machines as one stream, taken up again where it broke.

use std::time::Duration;

use futures::{Stream, StreamExt};
use tokio::time::{Instant, sleep, timeout};
use tonic::Status;

use super::{ATTEMPT_TIMEOUT, Client, LAST_BACKOFF};
use crate::{
    error::ApiError,
    proto::{ListVmsReply, ListVmsRequest, ReadAt, Vm},
};

impl Client {
    /// Every machine that is asked for, from `asked.after` on. `read_at` is of the beginning: what was acknowledged before is in
    /// the list.
    ///
    /// # Errors
    /// What a controller answered, or that none gave the rest before the deadline since the last rows.
    pub async fn all_vms(&self, asked: ListVmsRequest) -> Result<ListVmsReply, ApiError> {
        let mut vms = Vec::new();
        let read_at = self.each_vms(asked, |mut some| vms.append(&mut some)).await?;
        Ok(ListVmsReply { vms, read_at, ..ListVmsReply::default() })
    }

    /// The same, handed over some at a time as they come: to keep tens of thousands in one piece costs more than to be told them.
    ///
    /// # Errors
    /// As of `all_vms`; what was handed over before stays valid.
    pub async fn each_vms(&self, asked: ListVmsRequest, take: impl FnMut(Vec<Vm>)) -> Result<Option<ReadAt>, ApiError> {
        let open = |asked| self.read(asked, |mut stub, request| async move { stub.stream_vms(request).await });
        gather(asked, self.deadline, open, take).await
    }
}

async fn gather<S, Fut>(
    mut asked: ListVmsRequest,
    deadline: Duration,
    open: impl Fn(ListVmsRequest) -> Fut,
    mut take: impl FnMut(Vec<Vm>),
) -> Result<Option<ReadAt>, ApiError>
where
    Fut: Future<Output = Result<S, ApiError>>,
    S: Stream<Item = Result<ListVmsReply, Status>> + Unpin,
{
    let mut read_at = None;
    let mut give_up = Instant::now() + deadline;
    loop {
        let mut rows = open(asked.clone()).await?;
        let broken = loop {
            let reply = match timeout(ATTEMPT_TIMEOUT, rows.next()).await {
                Ok(Some(Ok(reply))) => reply,
                Ok(Some(Err(status))) => break status.into(),
                Ok(None) => break ApiError::new("unavailable", "the controller ended the list too soon"),
                Err(_) => break ApiError::new("unavailable", "the controller said no more of the list"),
            };
            give_up = Instant::now() + deadline;
            take(reply.vms);
            read_at = read_at.or(reply.read_at);
            if reply.next.is_empty() {
                return Ok(read_at);
            }
            asked.after = reply.next;
            asked.at_least = read_at.filter(|at| !at.stale).map_or(0, |at| at.index);
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

    fn page(ids: &[&str], next: &str, index: u64) -> Result<ListVmsReply, Status> {
        let vms = ids.iter().map(|id| Vm { id: (*id).into(), ..Vm::default() }).collect();
        let read_at = Some(ReadAt { index, ..ReadAt::default() });
        Ok(ListVmsReply { vms, next: next.into(), read_at })
    }

    /// What the streams that are opened one after the other say: the ids, as of which index; and what was asked of each.
    async fn told(
        mut streams: Vec<Vec<Result<ListVmsReply, Status>>>,
    ) -> (Vec<String>, Result<Option<u64>, ApiError>, Vec<(String, u64)>) {
        streams.reverse();
        let (streams, opened) = (RefCell::new(streams), RefCell::new(Vec::new()));
        let open = |asked: ListVmsRequest| {
            opened.borrow_mut().push((asked.after, asked.at_least));
            future::ready(Ok(stream::iter(streams.borrow_mut().pop().expect("it was opened too often"))))
        };
        let mut ids = Vec::new();
        let take = |vms: Vec<Vm>| ids.extend(vms.into_iter().map(|vm| vm.id));
        let read_at = gather(ListVmsRequest::default(), Duration::from_secs(60), open, take).await;
        (ids, read_at.map(|at| at.map(|at| at.index)), opened.into_inner())
    }

    #[tokio::test]
    async fn a_list_goes_on_where_it_broke() {
        let lost = || Err(Status::unavailable("the connection broke"));
        let (ids, read_at, opened) =
            told(vec![vec![page(&["a", "b"], "b", 7), lost()], vec![page(&["c"], "c", 8)], vec![page(&["d"], "", 9)]])
                .await;
        assert_eq!(ids, ["a", "b", "c", "d"]);
        assert_eq!(read_at.unwrap(), Some(7), "as of the beginning");
        assert_eq!(opened, [(String::new(), 0), ("b".into(), 7), ("c".into(), 7)]);
    }

    #[tokio::test]
    async fn a_refusal_ends_it() {
        let refused = Err(Status::from(ApiError::forbidden("not yours")));
        let (ids, read_at, opened) = told(vec![vec![page(&["a"], "a", 7), refused]]).await;
        assert_eq!((ids.len(), read_at.unwrap_err().code.as_str(), opened.len()), (1, "forbidden", 1));
    }
}
