//! What process tests stand on: one cluster of real processes with simulated hosts, an operator's client, and waiting
//! for named conditions.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    process::Output,
    sync::atomic::{AtomicUsize, Ordering},
    time::{Duration, Instant},
};

use api::{
    client::{Client, new_request_id},
    error::ApiError,
    proto::{
        CreateNetworkRequest, CreateVmRequest, GetVmRequest, ListVmsRequest, Network, SetVmPowerRequest, Vm, VmRef,
        trefoil_client::TrefoilClient,
    },
};
use jepsen::cluster::{Cluster, OFTEN, Options};
use serde_json::Value;
use tonic::transport::Channel;

/// A named condition that is not true by then will not become true.
pub const PATIENCE: Duration = Duration::from_secs(60);
const LOOK_AGAIN: Duration = Duration::from_millis(50);
pub const TENANT: &str = "acme";

pub type Stub = TrefoilClient<Channel>;

pub struct Stage {
    pub cluster: Cluster,
    pub client: Client,
    folder: Folder,
}

/// Removed at the end of a test, kept when it failed.
struct Folder(PathBuf);

impl Drop for Folder {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("logs are kept in {}", self.0.display());
        } else {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }
}

impl Stage {
    /// Three controllers, this many hosts, and a tenant.
    pub async fn set(hosts: usize) -> Self {
        // One name for each test of this process; the process id tells processes apart.
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("tft-{}-{number}", std::process::id()));
        let folder = Folder(path);
        let options = Options { controllers: 3, agents: hosts, offer: None, isolated: false, snapshot_every: OFTEN };
        let cluster = Cluster::start(&folder.0, options).await.expect("the cluster comes up");
        cluster.create_tenant(TENANT).await.expect("a tenant is created");
        let client = cluster.client().expect("a client");
        Self { cluster, client, folder }
    }

    /// As `set`, with an image `disk` and a network `blue`.
    pub async fn furnished(hosts: usize) -> Self {
        let stage = Self::set(hosts).await;
        let file = stage.file("disk.raw", &vec![7; 1 << 20]);
        stage.trefoil_ok(&["image", "import", &file, "--name", "disk", "--format", "raw"]);
        stage.create_network("blue", "10.0.0.0/24").await.expect("a network is created");
        stage
    }

    /// A file of the test's own.
    pub fn file(&self, name: &str, bytes: &[u8]) -> String {
        let path = self.folder.0.join(name);
        std::fs::write(&path, bytes).expect("the disk takes a file");
        path.display().to_string()
    }

    pub fn folder(&self) -> &Path {
        &self.folder.0
    }

    /// The command line as the operator, in the tenant.
    pub fn trefoil(&self, arguments: &[&str]) -> Output {
        let mut command = self.cluster.trefoil(arguments);
        command.env("TREFOIL_TENANT", TENANT).output().expect("the binary runs")
    }

    /// As `trefoil`, which must end well; the answer.
    pub fn trefoil_ok(&self, arguments: &[&str]) -> Value {
        let mut all = arguments.to_vec();
        all.extend(["--output", "json"]);
        let output = self.trefoil(&all);
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "trefoil {}: {error}", arguments.join(" "));
        serde_json::from_slice(&output.stdout).expect("the answer is JSON")
    }

    pub async fn create_network(&self, name: &str, range: &str) -> Result<Network, ApiError> {
        let body = CreateNetworkRequest { tenant: TENANT.into(), name: name.into(), range: range.into() };
        let call = |mut stub: Stub, request| async move { stub.create_network(request).await };
        self.client.mutate(new_request_id(), body, call).await
    }

    /// What is asked for to have a machine of this name and template in `blue` from `disk`.
    pub fn machine(name: &str, template: &str) -> CreateVmRequest {
        CreateVmRequest {
            tenant: TENANT.into(),
            name: name.into(),
            image: "disk".into(),
            template: template.into(),
            network: "blue".into(),
            ..Default::default()
        }
    }

    pub async fn create_vm(&self, name: &str, template: &str) -> Result<Vm, ApiError> {
        let call = |mut stub: Stub, request| async move { stub.create_vm(request).await };
        self.client.mutate(new_request_id(), Self::machine(name, template), call).await
    }

    pub async fn vm(&self, name: &str) -> Result<Vm, ApiError> {
        let body = GetVmRequest { tenant: TENANT.into(), vm: name.into(), stale: false };
        self.client.read(body, |mut stub: Stub, request| async move { stub.get_vm(request).await }).await
    }

    pub async fn vms(&self) -> Vec<Vm> {
        let body = ListVmsRequest { tenant: TENANT.into(), limit: 1000, ..Default::default() };
        let call = |mut stub: Stub, request| async move { stub.list_vms(request).await };
        self.client.read(body, call).await.expect("machines can be listed").vms
    }

    pub async fn set_power(&self, name: &str, wanted: &str) -> Result<Vm, ApiError> {
        let body =
            SetVmPowerRequest { tenant: TENANT.into(), vm: name.into(), wanted: wanted.into(), grace_millis: 10_000 };
        let call = |mut stub: Stub, request| async move { stub.set_vm_power(request).await };
        self.client.mutate(new_request_id(), body, call).await
    }

    pub async fn reboot(&self, name: &str) -> Result<Vm, ApiError> {
        let body = VmRef { tenant: TENANT.into(), vm: name.into() };
        let call = |mut stub: Stub, request| async move { stub.reboot_vm(request).await };
        self.client.mutate(new_request_id(), body, call).await
    }

    /// What `agent join` of another host says; it is not run.
    pub fn join_host(&self, name: &str, token: &str) -> Output {
        let data = self.folder().join(name).display().to_string();
        let address = format!("127.0.0.1:{}", jepsen::cluster::free_port().expect("a port is free"));
        let place = ["agent", "join", "--data", &data, "--name", name, "--listen", &address, "--advertise", &address];
        let kind = ["--underlay", "127.0.0.1", "--hypervisor", "simulated", "--token", token, "--output", "json"];
        self.trefoil(&[&place[..], &kind].concat())
    }

    /// Waits until the machine has this status.
    pub async fn vm_is(&self, name: &str, status: &str) -> Vm {
        let what = format!("machine '{name}' is {status}");
        until(&what, async || match self.vm(name).await {
            Ok(vm) if vm.status == status => Ok(vm),
            Ok(vm) => Err(format!("{} {}", vm.status, vm.reason)),
            Err(error) => Err(error.to_string()),
        })
        .await
    }

    /// Writes a tag; its version.
    pub async fn set_tag(&self, key: &str, value: &str) -> Result<u64, ApiError> {
        let body = api::proto::SetTagRequest {
            tenant: TENANT.into(),
            key: key.into(),
            value: value.into(),
            expected_version: None,
        };
        let call = |mut stub: Stub, request| async move { stub.set_tag(request).await };
        Ok(self.client.mutate(new_request_id(), body, call).await?.version)
    }

    pub async fn tag(&self, key: &str) -> Result<String, ApiError> {
        let body = api::proto::GetTagRequest { tenant: TENANT.into(), key: key.into(), stale: false };
        let call = |mut stub: Stub, request| async move { stub.get_tag(request).await };
        Ok(self.client.read(body, call).await?.value)
    }

    /// By machine: the hosts on which it is on now. Every moment until now is looked at.
    ///
    /// # Panics
    /// When a machine was ever on at two hosts at once.
    pub fn running(&self) -> BTreeMap<String, BTreeSet<String>> {
        let mut on: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        let effects = std::fs::read_to_string(self.cluster.effects()).expect("agents write what they do");
        for line in effects.lines() {
            let line: Value = serde_json::from_str(line).expect("an effect is a JSON object");
            let text = |key: &str| line[key].as_str().expect("it says who and what").to_owned();
            let hosts = on.entry(text("vm")).or_default();
            match text("effect").as_str() {
                "start" | "resume" | "continue" => drop(hosts.insert(text("host"))),
                "stop" | "suspend" | "pause" | "remove" => drop(hosts.remove(&text("host"))),
                other => panic!("'{other}' is no effect that is known here"),
            }
            assert!(hosts.len() <= 1, "{} is on at {hosts:?}: {effects}", text("vm"));
        }
        on
    }

    /// After the cloud was restored: the operator has another token.
    pub fn renew_client(&mut self) {
        self.client = self.cluster.client().expect("a client");
    }

    /// Waits until all running controllers agree, then compares the hashes of their states.
    pub async fn settled(&mut self) {
        self.cluster.settled(PATIENCE).await.expect("the controllers agree on a leader");
        self.cluster.hashes_agree(PATIENCE).await.expect("equal indexes have equal states");
    }

    /// Ends it; a process that does not end when it is asked fails the test.
    pub async fn strike(self) {
        self.cluster.stop().await.expect("every process ends when it is asked");
    }
}

/// Asks until there is an answer; what was seen last is in the failure.
///
/// # Panics
/// When the condition is not true in time.
pub async fn until<T>(what: &str, mut ask: impl AsyncFnMut() -> Result<T, String>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match ask().await {
            Ok(answer) => return answer,
            Err(seen) => assert!(Instant::now() < deadline, "waited in vain for: {what}; seen last: {seen}"),
        }
        tokio::time::sleep(LOOK_AGAIN).await;
    }
}
