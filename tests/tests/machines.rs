//! Machines on simulated hosts: their whole life, and what does not happen to them when processes die.

use api::{
    client::new_request_id,
    proto::{
        Bill, CreateTenantRequest, CreateVmRequest, DeleteVmRequest, GetBillRequest, ListRequest, ListVmsRequest,
        Quota, Template, Vm,
    },
};
use tests::stage::{Stage, Stub, TENANT, until};

async fn delete(stage: &Stage, name: &str) {
    let body = DeleteVmRequest { tenant: TENANT.into(), vm: name.into(), force: false };
    let call = |mut stub: Stub, request| async move { stub.delete_vm(request).await };
    stage.client.mutate(new_request_id(), body, call).await.expect("a machine can always be deleted");
    until(&format!("'{name}' is gone"), async || match stage.vm(name).await {
        Err(error) if error.code == "not-found" => Ok(()),
        Err(error) => Err(error.to_string()),
        Ok(vm) => Err(vm.status),
    })
    .await;
}

async fn create_template(stage: &Stage, name: &str, vcpus: u64, memory_bytes: u64) {
    let body = Template { name: name.into(), vcpus, memory_bytes, disk_bytes: 0, weight_milli: 1000 };
    let call = |mut stub: Stub, request| async move { stub.create_template(request).await };
    stage.client.mutate(new_request_id(), body, call).await.expect("a template is created");
}

/// The largest host.
async fn memory_of_a_host(stage: &Stage) -> u64 {
    let body = ListRequest { limit: 10, ..Default::default() };
    let call = |mut stub: Stub, request| async move { stub.list_nodes(request).await };
    let nodes = stage.client.read(body, call).await.expect("nodes can be listed").nodes;
    nodes.iter().map(|node| node.memory_bytes).max().expect("there is a node")
}

/// More than one message of the stream holds.
#[tokio::test(flavor = "multi_thread")]
async fn a_long_list_has_every_machine_once() {
    const MACHINES: usize = 600;
    let stage = Stage::furnished(1).await;
    stage.create_network("wide", "10.8.0.0/20").await.expect("a network is created");
    let create = |number: usize| {
        let body = CreateVmRequest { network: "wide".into(), ..Stage::machine(&format!("m{number}"), "tiny") };
        let call = |mut stub: Stub, request| async move { stub.create_vm(request).await };
        stage.client.mutate(new_request_id(), body, call)
    };
    let created = futures::future::try_join_all((0..MACHINES).map(create)).await.expect("machines are created");
    let mut ids: Vec<String> = created.into_iter().map(|vm| vm.id).collect();
    ids.sort_by_key(|id| (id.len(), id.clone()));
    let listed = stage.trefoil_ok(&["vm", "list"]);
    let listed: Vec<&str> = listed["vms"].as_array().unwrap().iter().map(|vm| vm["id"].as_str().unwrap()).collect();
    assert_eq!(listed, ids);
    let asked = ListVmsRequest { tenant: TENANT.into(), after: ids[299].clone(), ..Default::default() };
    let rest = stage.client.all_vms(asked).await.unwrap();
    assert_eq!(rest.vms.iter().map(|vm| vm.id.clone()).collect::<Vec<_>>(), ids[300..]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_lives_its_whole_life_and_the_bill_adds_up() {
    let stage = Stage::furnished(2).await;
    let created = stage.create_vm("web", "tiny").await.unwrap();
    let running = stage.vm_is("web", "running").await;
    assert_eq!((running.id.as_str(), running.hypervisor.as_str()), (created.id.as_str(), "simulated"));
    assert!(running.epoch > 0 && !running.node.is_empty() && running.nics[0].ip.starts_with("10.0.0."));

    for (wanted, status) in
        [("suspended", "suspended"), ("running", "running"), ("stopped", "stopped"), ("running", "running")]
    {
        stage.set_power("web", wanted).await.unwrap();
        let vm = stage.vm_is("web", status).await;
        assert_eq!(
            (&vm.node, vm.epoch, &vm.nics),
            (&running.node, running.epoch, &running.nics),
            "it stays where it was"
        );
    }
    stage.reboot("web").await.unwrap();
    stage.vm_is("web", "running").await;

    delete(&stage, "web").await;
    let bill = bill(&stage).await;
    adds_up(&bill);
    let statuses: Vec<&str> =
        bill.lines.iter().filter(|line| line.resource == created.id).map(|line| line.status.as_str()).collect();
    for status in ["running", "suspended", "stopped"] {
        assert!(statuses.contains(&status), "no line for {status} in {statuses:?}");
    }
    assert!(
        !bill.lines.iter().any(|line| line.resource == created.id && line.open),
        "what is deleted costs nothing more"
    );
    stage.strike().await;
}

async fn bill(stage: &Stage) -> Bill {
    let body = GetBillRequest { tenant: TENANT.into(), ..Default::default() };
    let call = |mut stub: Stub, request| async move { stub.get_bill(request).await };
    stage.client.read(body, call).await.expect("the bill can be read")
}

/// The total is the exact sum, rounded once; no resource is paid for twice at a time.
fn adds_up(bill: &Bill) {
    const EXACT_PER_NANO: u128 = 1000 * 3_600_000;
    let sum: u128 = bill.lines.iter().map(|line| line.exact.parse::<u128>().expect("an integer")).sum();
    assert_eq!(u128::from(bill.total_nano), (sum + EXACT_PER_NANO / 2) / EXACT_PER_NANO);
    assert!(bill.total_nano > 0);
    for (number, line) in bill.lines.iter().enumerate() {
        let overlaps = |other: &&api::proto::BillLine| {
            other.resource == line.resource && other.from_millis < line.to_millis && line.from_millis < other.to_millis
        };
        assert_eq!(bill.lines[number + 1..].iter().find(overlaps), None, "twice at a time: {line:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_leader_dies_during_a_creation_and_it_is_created_once() {
    let mut stage = Stage::furnished(2).await;
    let client = stage.client.clone();
    let creation = tokio::spawn(async move {
        let call = |mut stub: Stub, request| async move { stub.create_vm(request).await };
        client.mutate(new_request_id(), Stage::machine("web", "tiny"), call).await
    });
    let leader = stage.cluster.leader().await.expect("a leader");
    assert!(stage.cluster.kill(leader).unwrap());
    let created = creation.await.unwrap().expect("the client asks the others under the same id");
    let running = stage.vm_is("web", "running").await;
    assert_eq!(running.id, created.id);
    assert_eq!(stage.vms().await.len(), 1, "it is there once");
    stage.cluster.restart(leader).unwrap();
    stage.settled().await;
    assert_eq!(stage.vm_is("web", "running").await.epoch, running.epoch, "it was placed once");
    stage.strike().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_dies_finds_its_guests_again() {
    let mut stage = Stage::furnished(1).await;
    // It waits for its host, however long a busy machine takes to start the agent again.
    let body = CreateVmRequest { recovery: "restart-in-place".into(), ..Stage::machine("web", "tiny") };
    let call = |mut stub: Stub, request| async move { stub.create_vm(request).await };
    stage.client.mutate(new_request_id(), body, call).await.unwrap();
    let before = stage.vm_is("web", "running").await;
    assert!(stage.cluster.kill_agent(0).unwrap());
    stage.cluster.restart_agent(0).unwrap();
    stage.cluster.settled(tests::stage::PATIENCE).await.unwrap();
    stage.set_power("web", "suspended").await.unwrap();
    let after = stage.vm_is("web", "suspended").await;
    assert_eq!((after.epoch, after.attempts), (before.epoch, 0), "it was adopted, not made again");
    stage.strike().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn machines_of_a_lost_host_are_made_again_elsewhere_and_not_taken_back() {
    let mut stage = Stage::furnished(2).await;
    stage.create_vm("web", "tiny").await.unwrap();
    let before = stage.vm_is("web", "running").await;
    let (host, after) = made_again_elsewhere(&mut stage, &before).await;
    assert!(after.epoch > before.epoch && after.nics == before.nics, "a new placement under the same address");
    assert_eq!(after.loss.expect("the loss is told").node, before.node);
    let status = stage.trefoil_ok(&["recovery", "status"]);
    assert_eq!((&status["brake"], &status["lost"][0]["name"]), (&"armed".into(), &before.node.as_str().into()));

    stage.cluster.restart_agent(host).unwrap();
    until("nothing is lost any more", async || {
        let status = stage.trefoil_ok(&["recovery", "status"]);
        if status["lost"] == serde_json::json!([]) { Ok(()) } else { Err(status.to_string()) }
    })
    .await;
    stage.settled().await;
    let still = stage.vm_is("web", "running").await;
    assert_eq!((still.epoch, still.node), (after.epoch, after.node), "it is not taken back");
    stage.strike().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_of_a_lost_host_is_made_from_its_last_backup() {
    let mut stage = Stage::furnished(2).await;
    stage.create_vm("web", "tiny").await.unwrap();
    let before = stage.vm_is("web", "running").await;
    assert_eq!(before.backups.as_ref().unwrap().safe_at_millis, 0, "nothing is safe yet");
    stage.trefoil_ok(&["backup", "create", "web", "--wait"]);
    until("the backup is on another host", async || {
        let backups = stage.vm("web").await.map_err(|error| error.to_string())?.backups.unwrap_or_default();
        if backups.safe_at_millis > 0 { Ok(()) } else { Err(format!("{backups:?}")) }
    })
    .await;
    let listed = stage.trefoil_ok(&["backup", "list", "--vm", "web"]);
    assert_eq!((listed.as_array().map(Vec::len), &listed[0]["backup_of"]), (Some(1), &before.id.as_str().into()));

    let (_, after) = made_again_elsewhere(&mut stage, &before).await;
    assert_eq!(after.backups.unwrap().restored_from, listed[0]["name"].as_str().unwrap());
    assert_eq!(after.loss.unwrap().data_from_millis, listed[0]["taken_at_millis"].as_u64().unwrap());
    let name = listed[0]["name"].as_str().unwrap();
    stage.trefoil_ok(&["backup", "restore", name, "copy", "--template", "tiny", "--network", "blue"]);
    stage.vm_is("copy", "running").await;
    stage.strike().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn increments_stand_on_a_full_backup_and_a_lost_machine_is_made_from_the_newest() {
    let mut stage = Stage::furnished(2).await;
    stage.create_vm("web", "tiny").await.unwrap();
    let before = stage.vm_is("web", "running").await;
    for _ in 0..3 {
        stage.trefoil_ok(&["backup", "create", "web", "--wait"]);
    }
    let listed = stage.trefoil_ok(&["backup", "list", "--vm", "web"]);
    let told = |at: usize| {
        let (parent, links) = (&listed[at]["parent"], &listed[at]["chain_length"]);
        (parent.as_str().unwrap_or_default().to_owned(), links.as_u64().unwrap())
    };
    let name = |at: usize| listed[at]["name"].as_str().unwrap().to_owned();
    assert_eq!([told(0), told(1), told(2)], [(String::new(), 1), (name(0), 2), (name(1), 3)]);
    let bytes = |at: usize, key: &str| listed[at][key].as_u64().unwrap();
    let sum: u64 = (0..3).map(|at| bytes(at, "size_bytes")).sum();
    assert_eq!(bytes(2, "chain_bytes"), sum, "all that it takes");

    let refused = |arguments: &[&str], code: &str, words: &str| {
        let said = String::from_utf8_lossy(&stage.trefoil(arguments).stderr).into_owned();
        assert!(said.contains(code) && said.contains(words), "{arguments:?}: {said}");
    };
    refused(
        &["image", "delete", &name(0), "--output", "json"],
        "\"in-use\"",
        &format!("backup {} stands on it", name(1)),
    );
    let copy = stage.folder().join("copy.qcow2").display().to_string();
    refused(&["image", "export", &name(2), &copy, "--output", "json"], "\"precondition\"", &name(0));
    stage.trefoil_ok(&["image", "export", &name(0), &copy]);

    until("the newest and all that it stands on are on the other host", async || {
        let backups = stage.vm("web").await.map_err(|error| error.to_string())?.backups.unwrap_or_default();
        if backups.safe_image == name(2) { Ok(()) } else { Err(format!("{backups:?}")) }
    })
    .await;
    let (_, after) = made_again_elsewhere(&mut stage, &before).await;
    assert_eq!(after.backups.unwrap().restored_from, name(2));
    assert_eq!(after.loss.unwrap().data_from_millis, listed[2]["taken_at_millis"].as_u64().unwrap());

    // Nobody knows what it wrote over there; and the next was asked for as a full one.
    stage.trefoil_ok(&["backup", "create", "web", "--wait"]);
    stage.trefoil_ok(&["backup", "create", "web", "--full", "--wait"]);
    stage.trefoil_ok(&["backup", "create", "web", "--wait"]);
    stage.trefoil_ok(&["backup", "schedule", "web", "--every", "24h", "--full-every", "2"]);
    stage.trefoil_ok(&["backup", "create", "web", "--wait"]);
    let listed = stage.trefoil_ok(&["backup", "list", "--vm", "web"]);
    let links: Vec<u64> =
        listed.as_array().unwrap().iter().map(|image| image["chain_length"].as_u64().unwrap()).collect();
    assert_eq!(links, [1, 2, 3, 1, 1, 2, 1]);
    stage.strike().await;
}

/// Its host, which ends, and how it runs on the other of two.
async fn made_again_elsewhere(stage: &mut Stage, before: &Vm) -> (usize, Vm) {
    let host = (0..2).find(|host| format!("host-{}", host + 1) == before.node).expect("the host has a name");
    assert!(stage.cluster.kill_agent(host).unwrap());
    until("it runs on the other host", async || match stage.vm(&before.name).await {
        Ok(vm) if vm.status == "running" && vm.node != before.node => Ok(()),
        Ok(vm) => Err(format!("{} on {}: {}", vm.status, vm.node, vm.reason)),
        Err(error) => Err(error.to_string()),
    })
    .await;
    (host, stage.vm(&before.name).await.unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_finds_no_room_is_pending_and_placed_when_there_is_room() {
    let stage = Stage::furnished(1).await;
    let memory = memory_of_a_host(&stage).await;
    create_template(&stage, "most", 1, memory / 10 * 6).await;
    create_template(&stage, "giant", 1, memory * 2).await;
    stage.create_vm("first", "most").await.unwrap();
    stage.vm_is("first", "running").await;
    stage.create_vm("second", "most").await.unwrap();
    let waiting = stage.vm_is("second", "pending").await;
    until("the reason is told", async || {
        let reason = stage.vm("second").await.map_err(|e| e.to_string())?.reason;
        if reason.is_empty() { Err("no reason".into()) } else { Ok(()) }
    })
    .await;
    assert!(waiting.node.is_empty());
    delete(&stage, "first").await;
    stage.vm_is("second", "running").await;

    // Larger than any node: it waits with a reason, and can be deleted.
    stage.create_vm("third", "giant").await.unwrap();
    stage.vm_is("third", "pending").await;
    delete(&stage, "third").await;
    stage.strike().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_quota_is_never_exceeded() {
    let stage = Stage::furnished(1).await;
    let quota =
        Quota { vms: 3, vcpus: 100, memory_bytes: 1 << 40, disk_bytes: 1 << 40, networks: 10, image_bytes: 1 << 40 };
    let body = CreateTenantRequest { name: TENANT.into(), quota: Some(quota) };
    let call = |mut stub: Stub, request| async move { stub.set_quota(request).await };
    stage.client.mutate(new_request_id(), body, call).await.expect("the quota is set");
    // Ten race for three places.
    let attempts = (0..10).map(|number| {
        let client = stage.client.clone();
        tokio::spawn(async move {
            let call = |mut stub: Stub, request| async move { stub.create_vm(request).await };
            client.mutate(new_request_id(), Stage::machine(&format!("web-{number}"), "tiny"), call).await
        })
    });
    let mut refused = 0;
    for attempt in attempts.collect::<Vec<_>>() {
        match attempt.await.unwrap() {
            Ok(_) => {}
            Err(error) => {
                assert_eq!(error.code, "quota-exceeded", "{error}");
                refused += 1;
            }
        }
    }
    assert_eq!((refused, stage.vms().await.len()), (7, 3));
    stage.strike().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn machines_of_two_hosts_survive_the_death_of_all_controllers() {
    let mut stage = Stage::furnished(2).await;
    for name in ["one", "two"] {
        stage.create_vm(name, "tiny").await.unwrap();
    }
    let before = [stage.vm_is("one", "running").await, stage.vm_is("two", "running").await];
    for controller in 0..3 {
        stage.cluster.kill(controller).unwrap();
    }
    for controller in 0..3 {
        stage.cluster.restart(controller).unwrap();
    }
    stage.settled().await;
    for vm in before {
        let after = stage.vm_is(&vm.name, "running").await;
        assert_eq!((&after.id, after.epoch, &after.node), (&vm.id, vm.epoch, &vm.node));
    }
    stage.strike().await;
}
