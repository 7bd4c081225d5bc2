//! For tests: a cloud of one controller that does not listen, with what its calls share.

use std::sync::Arc;

use api::{
    client::{REQUEST_KEY, TOKEN_KEY},
    tls::{CertificateAuthority, Identity},
};
use model::{Actor, Command, OperatorCommand, Reply, RequestId};
use raft::Replica;

use crate::{
    access,
    config::{Config, Timing},
    core::Core,
    found::{self, InitArgs, replica_config},
};

pub(crate) struct Fixture {
    pub core: Arc<Core>,
    /// Of the founder, an operator.
    pub token: String,
    _directory: tempfile::TempDir,
}

impl Fixture {
    pub async fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let data = directory.path().join("data");
        let args = InitArgs {
            data: data.clone(),
            name: "c1".into(),
            listen: ([127, 0, 0, 1], 0).into(),
            advertise: "127.0.0.1:7470".into(),
            operator: "root".into(),
            timing: Timing::Lan,
            snapshot_every: None,
        };
        let token = found::init(args).await.unwrap().operator_token;
        let config = Config::load(&data).unwrap();
        let identity = Identity::load(&data).unwrap().unwrap();
        let authority = CertificateAuthority::load(&data).unwrap().unwrap();
        let replica = Replica::open(replica_config(&config, data, &identity)).await.unwrap();
        let core = Arc::new(Core::new(replica, authority, identity));
        // It leads by then.
        core.propose(Actor::System, None, Command::Operator(OperatorCommand::ArmRecovery { armed: true }))
            .await
            .unwrap();
        Self { core, token, _directory: directory }
    }

    /// How far the log has come.
    pub fn index(&self) -> u64 {
        self.core.replica.read_indexed(|_, index| index)
    }

    pub async fn operator(&self, command: OperatorCommand) -> Reply {
        self.done(Actor::System, Command::Operator(command)).await
    }

    /// A call as it comes through the gate.
    pub async fn call<T>(&self, token: &str, id: RequestId, body: T) -> tonic::Request<T> {
        let mut request = tonic::Request::new(body);
        request.metadata_mut().insert(TOKEN_KEY, format!("Bearer {token}").parse().unwrap());
        request.metadata_mut().insert(REQUEST_KEY, id.to_string().parse().unwrap());
        let caller = access::authenticate(&self.core, request.metadata()).await.unwrap();
        request.extensions_mut().insert(caller);
        request
    }

    pub async fn done(&self, actor: Actor, command: Command) -> Reply {
        let committed = self.core.propose(actor, None, command).await.unwrap();
        self.core.applied(committed.index).await.unwrap();
        committed.applied.unwrap()
    }
}
