//! A connection that sends in one system call what several calls answered in the same moment.
//!
//! A batch of the log answers many calls of one connection at once. HTTP/2 would flush after each answer: a TLS record
//! and a system call here, and a wake-up in the client, for each. So a flush first goes to the end of the queue of tasks
//! that are ready, once; whoever answers before its turn comes shares it. When nothing else is ready, that is at once.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::{Buf, BytesMut};
use futures::{Stream, StreamExt};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};
use tonic::transport::server::{Connected, TcpConnectInfo, TcpIncoming};

/// Gathered before it is sent without waiting for a flush: four TLS records, so that a stream of an image is sent in
/// large pieces too.
const MOST_BYTES: usize = 64 << 10;

/// Every connection that comes in, gathering.
pub(crate) fn gathering(incoming: TcpIncoming) -> impl Stream<Item = io::Result<Gathering>> {
    incoming.map(|stream| stream.map(|stream| Gathering { stream, unsent: BytesMut::new(), waited: false }))
}

pub(crate) struct Gathering {
    stream: TcpStream,
    unsent: BytesMut,
    /// The flush that is asked for has been to the end of the queue.
    waited: bool,
}

impl Gathering {
    fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.unsent.is_empty() {
            let sent = ready!(Pin::new(&mut self.stream).poll_write(cx, &self.unsent))?;
            if sent == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.unsent.advance(sent);
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Gathering {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        if self.unsent.len() >= MOST_BYTES {
            ready!(self.poll_send(cx))?;
        }
        self.unsent.extend_from_slice(bytes);
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.unsent.is_empty() {
            return Poll::Ready(Ok(()));
        }
        if !self.waited {
            self.waited = true;
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        ready!(self.poll_send(cx))?;
        self.waited = false;
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_send(cx))?;
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

impl AsyncRead for Gathering {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl Connected for Gathering {
    type ConnectInfo = TcpConnectInfo;

    fn connect_info(&self) -> TcpConnectInfo {
        self.stream.connect_info()
    }
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpListener,
    };

    use super::*;

    async fn pair() -> (Gathering, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (accepted, connected) = tokio::join!(listener.accept(), TcpStream::connect(address));
        let stream = accepted.unwrap().0;
        (Gathering { stream, unsent: BytesMut::new(), waited: false }, connected.unwrap())
    }

    #[tokio::test]
    async fn what_is_written_before_a_flush_is_sent_by_it_and_whole() {
        let (mut gathering, mut peer) = pair().await;
        for part in [&b"one "[..], b"two ", b"three"] {
            gathering.write_all(part).await.unwrap();
        }
        assert_eq!(gathering.unsent.len(), 13, "nothing is sent before the flush");
        gathering.flush().await.unwrap();
        assert!(gathering.unsent.is_empty());
        let mut heard = [0; 13];
        peer.read_exact(&mut heard).await.unwrap();
        assert_eq!(&heard, b"one two three");
    }

    #[tokio::test]
    async fn a_flush_lets_others_go_first_once() {
        let (mut gathering, _peer) = pair().await;
        let mut cx = Context::from_waker(std::task::Waker::noop());
        gathering.write_all(b"x").await.unwrap();
        assert!(Pin::new(&mut gathering).poll_flush(&mut cx).is_pending());
        assert!(Pin::new(&mut gathering).poll_flush(&mut cx).is_ready());
        assert!(gathering.unsent.is_empty());
    }

    #[tokio::test]
    async fn a_long_stream_is_sent_without_a_flush_and_ends_with_the_shutdown() {
        let (mut gathering, mut peer) = pair().await;
        let bytes = vec![7; 20 * MOST_BYTES];
        let sent = tokio::spawn(async move {
            for part in bytes.chunks(MOST_BYTES / 4) {
                gathering.write_all(part).await.unwrap();
                assert!(gathering.unsent.len() < 2 * MOST_BYTES);
            }
            gathering.shutdown().await.unwrap();
        });
        let mut heard = Vec::new();
        peer.read_to_end(&mut heard).await.unwrap();
        sent.await.unwrap();
        assert_eq!(heard.len(), 20 * MOST_BYTES);
    }
}
