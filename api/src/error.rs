//! What a caller is told when a call does not succeed: a stable code, one sentence, and what kind of trouble it is.
//!
//! On the wire it is a gRPC status with the code in the metadata `trefoil-code`. A status without that metadata was
//! made by the transport, not by a controller, and is mapped here.

use std::fmt;

use model::Rejection;
use tonic::{Code, Status, metadata::AsciiMetadataValue};

/// The metadata key of the code.
pub const CODE_KEY: &str = "trefoil-code";

/// What the caller can do about it; decides the gRPC code and the exit status of the CLI.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// Refused or failed; asking again in the same way will not help.
    Refused,
    /// The request itself is wrong.
    Usage,
    NotFound,
    /// It clashes with what is there: the name, the version, something in use.
    Conflict,
    /// Not done; asking again later can help.
    Unavailable,
    /// Perhaps done: asking again with the same request id is safe and gives the answer.
    Unknown,
    /// Without a valid token, or with one that may not do this.
    Denied,
}

impl ErrorKind {
    /// Of a stable code; `None` for one that this version does not know.
    pub fn of_code(code: &str) -> Option<Self> {
        Some(match code {
            "invalid-argument" | "too-large" => Self::Usage,
            "not-found" => Self::NotFound,
            "already-exists" | "in-use" | "version-mismatch" | "request-reused" | "stale" | "precondition"
            | "compacted" => Self::Conflict,
            "quota-exceeded" | "no-room" | "no-address" | "internal" | "unimplemented" | "failed" | "inconclusive"
            | "level-too-low" | "damaged" | "too-new" => Self::Refused,
            "unavailable" | "no-quorum" | "overloaded" => Self::Unavailable,
            "timeout" | "unproven" => Self::Unknown,
            "unauthenticated" | "forbidden" | "bad-join-token" => Self::Denied,
            _ => return None,
        })
    }

    /// Of the CLI; documented, so that scripts can rely on it.
    pub fn exit_status(self) -> u8 {
        match self {
            Self::Refused => 1,
            Self::Usage => 2,
            Self::NotFound => 3,
            Self::Conflict => 4,
            Self::Unavailable => 5,
            Self::Unknown => 6,
            Self::Denied => 7,
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApiError {
    pub kind: ErrorKind,
    /// Stable across versions; programs match on it.
    pub code: String,
    /// One sentence for a person.
    pub message: String,
}

impl ApiError {
    /// `code` is one of this API's; an unknown one counts as refused.
    pub fn new(code: &str, message: impl Into<String>) -> Self {
        let kind = ErrorKind::of_code(code).unwrap_or(ErrorKind::Refused);
        Self { kind, code: code.into(), message: message.into() }
    }

    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new("invalid-argument", message)
    }
    pub fn not_found(message: impl Into<String>) -> Self {
        Self::new("not-found", message)
    }
    pub fn unauthenticated(message: impl Into<String>) -> Self {
        Self::new("unauthenticated", message)
    }
    pub fn forbidden(message: impl Into<String>) -> Self {
        Self::new("forbidden", message)
    }
    /// No majority answers; nothing was changed.
    pub fn no_quorum(message: impl Into<String>) -> Self {
        Self::new("no-quorum", message)
    }
    /// Whether it happened is not known.
    pub fn timeout(message: impl Into<String>) -> Self {
        Self::new("timeout", message)
    }
    pub fn overloaded(message: impl Into<String>) -> Self {
        Self::new("overloaded", message)
    }
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new("internal", message)
    }

    /// The same request, under the same request id, may succeed on this or another controller.
    pub fn is_retryable(&self) -> bool {
        matches!(self.kind, ErrorKind::Unavailable | ErrorKind::Unknown)
    }

    fn grpc_code(&self) -> Code {
        match (self.kind, self.code.as_str()) {
            (_, "already-exists") => Code::AlreadyExists,
            (_, "overloaded" | "quota-exceeded" | "no-room" | "no-address") => Code::ResourceExhausted,
            (_, "unauthenticated") => Code::Unauthenticated,
            (_, "internal") => Code::Internal,
            (_, "version-mismatch" | "stale") => Code::Aborted,
            (_, "unimplemented") => Code::Unimplemented,
            (ErrorKind::Refused | ErrorKind::Conflict, _) => Code::FailedPrecondition,
            (ErrorKind::Usage, _) => Code::InvalidArgument,
            (ErrorKind::NotFound, _) => Code::NotFound,
            (ErrorKind::Unavailable, _) => Code::Unavailable,
            (ErrorKind::Unknown, _) => Code::DeadlineExceeded,
            (ErrorKind::Denied, _) => Code::PermissionDenied,
        }
    }
}

impl fmt::Display for ApiError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for ApiError {}

impl From<Rejection> for ApiError {
    fn from(rejection: Rejection) -> Self {
        Self::new(rejection.code(), rejection.to_string())
    }
}

impl From<ApiError> for Status {
    fn from(error: ApiError) -> Self {
        let mut status = Self::new(error.grpc_code(), &error.message);
        // A code is plain ASCII; one that is not would be a mistake of ours, and the gRPC code still tells the kind.
        if let Ok(code) = AsciiMetadataValue::try_from(&error.code) {
            status.metadata_mut().insert(CODE_KEY, code);
        }
        status
    }
}

impl From<Status> for ApiError {
    fn from(status: Status) -> Self {
        let sent = status.metadata().get(CODE_KEY).and_then(|code| code.to_str().ok());
        if let Some(code) = sent {
            let kind = ErrorKind::of_code(code).unwrap_or_else(|| kind_of_grpc(status.code()));
            return Self { kind, code: code.into(), message: status.message().into() };
        }
        from_transport(&status)
    }
}

/// A status that no controller made: the connection, HTTP/2 or tonic itself speaks.
fn from_transport(status: &Status) -> ApiError {
    let (message, never_connected) = with_causes(status);
    if never_connected {
        return ApiError::new("unavailable", message);
    }
    match status.code() {
        // It broke, or an answer did not come: the request may have been carried out. Tonic also says unavailable
        // when a connection is reset or its keepalive runs out in the middle of a call.
        Code::Unavailable
        | Code::Unknown
        | Code::Internal
        | Code::Cancelled
        | Code::DeadlineExceeded
        | Code::DataLoss
        // A connection is closed with it that asks for too much; what was under way on it may have been carried out.
        | Code::ResourceExhausted
        | Code::Aborted => ApiError::timeout(message),
        Code::OutOfRange => ApiError::new("too-large", message),
        Code::Unimplemented => ApiError::new("unimplemented", message),
        Code::Unauthenticated => ApiError::unauthenticated(message),
        Code::PermissionDenied => ApiError::forbidden(message),
        Code::NotFound => ApiError::not_found(message),
        Code::InvalidArgument => ApiError::invalid(message),
        Code::Ok | Code::AlreadyExists | Code::FailedPrecondition => ApiError::internal(message),
    }
}

fn kind_of_grpc(code: Code) -> ErrorKind {
    match code {
        Code::InvalidArgument | Code::OutOfRange => ErrorKind::Usage,
        Code::NotFound => ErrorKind::NotFound,
        Code::AlreadyExists | Code::Aborted => ErrorKind::Conflict,
        Code::Unavailable => ErrorKind::Unavailable,
        Code::DeadlineExceeded | Code::Cancelled | Code::Unknown => ErrorKind::Unknown,
        Code::Unauthenticated | Code::PermissionDenied => ErrorKind::Denied,
        _ => ErrorKind::Refused,
    }
}

/// Tonic says "transport error"; what happened is in its sources. Also tells whether one of them is that no
/// connection was made, so that the request was never sent.
fn with_causes(status: &Status) -> (String, bool) {
    let mut message = status.message().to_owned();
    let mut never_connected = false;
    let mut source = std::error::Error::source(status);
    // Chains are four or five long; the bound is against a cycle.
    for _ in 0..8 {
        let Some(cause) = source else { break };
        never_connected |= cause.is::<tonic::ConnectError>();
        let text = cause.to_string();
        if !message.contains(&text) {
            message.push_str(if message.is_empty() { "" } else { ": " });
            message.push_str(&text);
        }
        source = cause.source();
    }
    (message, never_connected)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_rejection_survives_the_wire() {
        let (noun, name) = (model::Noun::Vm, "a\0b\u{1b}é".to_owned());
        let rejections = [
            Rejection::NotFound { noun, name: name.clone() },
            Rejection::Exists { noun, name: name.clone() },
            Rejection::Invalid { field: "name".into(), value: name.clone(), allowed: "short".into() },
            Rejection::InUse { noun, name, by: "vm-1".into() },
            Rejection::Quota { tenant: "t".into(), what: "vms".into(), limit: 1, used: 1, asked: 1 },
            Rejection::NoRoom { node: "node-1".into(), reason: "memory".into() },
            Rejection::Version { key: "k".into(), expected: 1, actual: 2 },
            Rejection::RequestReused,
            Rejection::BadToken,
            Rejection::Forbidden("ann".into()),
            Rejection::Stale("epoch".into()),
            Rejection::NoAddress { network: "n".into() },
        ];
        for rejection in rejections {
            let code = rejection.code();
            assert!(ErrorKind::of_code(code).is_some(), "{code} has no kind");
            let error = ApiError::from(rejection);
            assert_eq!(ApiError::from(Status::from(error.clone())), error, "{code}");
            assert!(!error.is_retryable(), "{code}");
        }
    }

    #[test]
    fn the_kind_decides_the_exit_status_and_whether_to_try_again() {
        let status = |code| ApiError::new(code, "").kind.exit_status();
        let codes = ["quota-exceeded", "invalid-argument", "not-found", "in-use", "no-quorum", "timeout", "forbidden"];
        assert_eq!(codes.map(status), [1, 2, 3, 4, 5, 6, 7]);
        assert!(
            ["unavailable", "no-quorum", "timeout", "overloaded"].iter().all(|c| ApiError::new(c, "").is_retryable())
        );
    }

    #[test]
    fn a_newer_controllers_code_keeps_its_kind() {
        let mut status = Status::already_exists("x");
        status.metadata_mut().insert(CODE_KEY, AsciiMetadataValue::from_static("from-the-future"));
        let error = ApiError::from(status);
        assert_eq!((error.code.as_str(), error.kind), ("from-the-future", ErrorKind::Conflict));
    }

    #[test]
    fn what_the_transport_says_is_unknown_unless_nothing_was_sent() {
        let refused = tonic::ConnectError("connection refused".into());
        assert_eq!(ApiError::from(Status::from_error(refused.into())).code, "unavailable");
        assert_eq!(ApiError::from(Status::unavailable("keep-alive timed out")).code, "timeout");
        assert_eq!(ApiError::from(Status::unknown("transport error")).code, "timeout");
        assert_eq!(ApiError::from(Status::cancelled("Timeout expired")).kind, ErrorKind::Unknown);
        assert_eq!(ApiError::from(Status::resource_exhausted("enhance your calm")).kind, ErrorKind::Unknown);
        assert_eq!(ApiError::from(Status::internal("h2 protocol error")).kind, ErrorKind::Unknown);
    }
}
