//! Which controller is asked next, when it is given up, and what is said then.

use std::sync::Mutex;

use super::*;
use crate::error::ErrorKind;

/// Runs `rounds` over two controllers with the given answers, and tells which attempts were made.
async fn run(asked: Asked, deadline: Duration, answers: &[Result<u8, &str>]) -> (Result<(usize, u8), ApiError>, usize) {
    let attempts = Mutex::new(0);
    let attempt = |index: usize, _| {
        *attempts.lock().unwrap() += 1;
        let answer = answers[index.min(answers.len() - 1)];
        async move { answer.map_err(|code| ApiError::new(code, "text")) }
    };
    let outcome = rounds(2, deadline, asked, attempt).await;
    let attempts = attempts.into_inner().unwrap();
    (outcome, attempts)
}

const LONG: Duration = Duration::from_secs(30);
const SHORT: Duration = Duration::from_millis(50);

#[tokio::test]
async fn every_controller_is_asked_until_one_answers() {
    let answers = [Err("unavailable"), Err("no-quorum"), Err("timeout"), Err("overloaded"), Ok(7)];
    let (outcome, attempts) = run(Asked::Change(RequestId(1)), LONG, &answers).await;
    assert_eq!((outcome, attempts), (Ok((4, 7)), 5));
}

#[tokio::test]
async fn a_refusal_is_an_answer() {
    let (outcome, attempts) =
        run(Asked::Change(RequestId(1)), LONG, &[Err("unavailable"), Err("already-exists")]).await;
    assert_eq!((outcome.unwrap_err().code.as_str(), attempts), ("already-exists", 2));
}

#[tokio::test]
async fn giving_up_says_whether_it_may_have_happened() {
    let answers = [Err("timeout"), Err("no-quorum")];
    let (outcome, _) = run(Asked::Change(RequestId(1)), SHORT, &answers).await;
    let error = outcome.unwrap_err();
    assert_eq!(error.kind, ErrorKind::Unknown);
    assert!(error.message.contains(&RequestId(1).to_string()), "{error}");

    let (outcome, _) = run(Asked::Read, SHORT, &answers).await;
    assert_eq!(outcome.unwrap_err().code, "no-quorum", "a read is never in doubt");
    let (outcome, _) = run(Asked::Read, SHORT, &[Err("no-quorum"), Err("timeout")]).await;
    assert_eq!(outcome.unwrap_err().code, "no-quorum", "that another one was silent says less");
    let (outcome, _) = run(Asked::Read, SHORT, &[Err("timeout")]).await;
    assert_eq!(outcome.unwrap_err().kind, ErrorKind::Unavailable);

    let (outcome, attempts) = run(Asked::Change(RequestId(1)), SHORT, &[Err("no-quorum")]).await;
    assert_eq!(outcome.unwrap_err().code, "no-quorum");
    assert!(attempts >= 2, "both controllers were asked");
}

#[tokio::test]
async fn a_join_that_was_not_answered_may_have_happened() {
    let (outcome, _) = run(Asked::Join, SHORT, &[Err("timeout")]).await;
    let error = outcome.unwrap_err();
    assert_eq!(error.kind, ErrorKind::Unknown);
    assert!(error.message.contains("the token is used"), "{error}");
    let (outcome, _) = run(Asked::Join, SHORT, &[Err("no-quorum")]).await;
    assert_eq!(outcome.unwrap_err().code, "no-quorum");
}

#[tokio::test]
async fn who_is_turned_away_may_have_been_served_before() {
    for code in ["unauthenticated", "forbidden", "request-reused"] {
        let answers = [Err("timeout"), Err(code)];
        let (outcome, _) = run(Asked::Change(RequestId(1)), LONG, &answers).await;
        assert_eq!(outcome.unwrap_err().kind, ErrorKind::Unknown, "{code}");
        let (outcome, _) = run(Asked::Change(RequestId(1)), LONG, &[Err("unavailable"), Err(code)]).await;
        assert_eq!(outcome.unwrap_err().code, code, "nothing was in doubt");
        let (outcome, _) = run(Asked::Read, LONG, &answers).await;
        assert_eq!(outcome.unwrap_err().code, code);
    }
    let (outcome, _) = run(Asked::Change(RequestId(1)), LONG, &[Err("timeout"), Err("version-mismatch")]).await;
    assert_eq!(outcome.unwrap_err().code, "version-mismatch", "the quorum said it of all attempts");
}

#[tokio::test]
async fn a_controller_that_is_not_there_is_reported_as_unavailable() {
    let ca = tls::CertificateAuthority::create("test").unwrap();
    let dir = tempfile::tempdir().unwrap();
    let endpoints = ["a.sock", "b.sock"].map(|name| format!("unix:{}", dir.path().join(name).display()));
    let client = Client::new(&endpoints, &ca.ca_pem, "trefoil-user-x").unwrap().with_deadline(SHORT);
    let create = |mut stub: TrefoilClient<Channel>, request| async move { stub.create_vm(request).await };
    let error = client.mutate(RequestId(1), proto::CreateVmRequest::default(), create).await.unwrap_err();
    assert_eq!((error.kind, error.code.as_str()), (ErrorKind::Unavailable, "unavailable"), "{error}");
    assert!(error.message.contains(".sock"), "{error}");
}

#[test]
fn a_token_with_a_line_break_is_refused_before_it_is_sent() {
    let error = Client::new(&["h:1".into()], "", "a\nb").err().unwrap();
    assert_eq!(error.kind, ErrorKind::Usage);
}
