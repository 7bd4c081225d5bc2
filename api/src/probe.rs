//! Whether something listens at an address: TCP connects, or it does not in time. Nothing is said over the connection, so an
//! agent that hangs is reached all the same, for its kernel answers.

use std::{io::ErrorKind, time::Duration};

use tokio::{net::TcpStream, time::timeout};

/// A lost SYN is sent again after a second; an answer that takes longer than that is none.
const PATIENCE: Duration = Duration::from_millis(1500);

/// # Errors
/// Why it was not reached, in a few words.
pub async fn reach(address: &str) -> Result<(), String> {
    match timeout(PATIENCE, TcpStream::connect(address)).await {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(error)) => Err(match error.kind() {
            // The machine is there, and its kernel says so.
            ErrorKind::ConnectionRefused => "nobody listens there".into(),
            ErrorKind::HostUnreachable | ErrorKind::NetworkUnreachable => "there is no way there".into(),
            _ => error.to_string(),
        }),
        Err(_) => Err("no answer".into()),
    }
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

    #[tokio::test]
    async fn who_listens_is_reached_also_when_it_says_nothing_and_who_does_not_is_not() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        assert_eq!(reach(&address).await, Ok(()));
        drop(listener);
        assert_eq!(reach(&address).await, Err("nobody listens there".into()));
        assert!(reach("no address").await.is_err());
    }
}
