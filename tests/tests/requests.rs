//! What comes from outside: retries, mistakes, nonsense. One clear sentence and a stable code; nothing is lost.

use std::{
    io::Write,
    net::{TcpStream, UdpSocket},
    time::Duration,
};

use api::{
    client::{Client, new_request_id},
    proto::{ListRequest, SetTagRequest},
};
use jepsen::chance::Chance;
use serde_json::Value;
use tests::stage::{Stage, Stub, TENANT, until};

fn tag(key: &str, value: &str) -> SetTagRequest {
    SetTagRequest { tenant: TENANT.into(), key: key.into(), value: value.into(), expected_version: None }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_retry_gets_the_first_answer_also_after_a_failover_and_another_body_is_refused() {
    let mut stage = Stage::set(0).await;
    let call = |mut stub: Stub, request| async move { stub.set_tag(request).await };
    let id = new_request_id();
    let first = stage.client.mutate(id, tag("k", "a"), call).await.unwrap();
    stage.set_tag("k", "b").await.unwrap();
    let again = stage.client.mutate(id, tag("k", "a"), call).await.unwrap();
    assert_eq!(again.version, first.version, "the retry is the same request");
    assert_eq!(stage.tag("k").await.unwrap(), "b", "and changes nothing");

    let leader = stage.cluster.leader().await.expect("a leader");
    stage.cluster.kill(leader).unwrap();
    let after = stage.client.mutate(id, tag("k", "a"), call).await.unwrap();
    assert_eq!(after.version, first.version, "the new leader knows it too");
    let refused = stage.client.mutate(id, tag("k", "c"), call).await.unwrap_err();
    assert_eq!(refused.code, "request-reused");
    assert_eq!(stage.tag("k").await.unwrap(), "b");
    stage.cluster.restart(leader).unwrap();
    stage.settled().await;
    stage.strike().await;
}

/// The largest number that the wire can carry.
const MOST: &str = "18446744073709551615";
/// Longer than any key.
const LONG: &str = match std::str::from_utf8(&[b'k'; 300]) {
    Ok(text) => text,
    Err(_) => "",
};

/// What is typed, the exit status, the code, and words of the sentence.
const BAD_INPUT: &[(&[&str], i32, &str, &str)] = &[
    (&["vm", "show", "nobody"], 3, "not-found", "nobody"),
    (&["vm", "create", "a", "--image", "none", "--template", "tiny", "--network", "blue"], 3, "not-found", "none"),
    (&["vm", "create", "a", "--image", "disk", "--template", "none", "--network", "blue"], 3, "not-found", "none"),
    (&["vm", "create", "a", "--image", "disk", "--template", "tiny", "--network", "none"], 3, "not-found", "none"),
    (
        &["vm", "create", "A B", "--image", "disk", "--template", "tiny", "--network", "blue"],
        2,
        "invalid-argument",
        "name",
    ),
    (
        &["vm", "create", "a\u{1b}[2J", "--image", "disk", "--template", "tiny", "--network", "blue"],
        2,
        "invalid-argument",
        "name",
    ),
    (&["network", "create", "n", "--range", "10.0.0.0"], 2, "invalid-argument", "range"),
    (&["network", "create", "n", "--range", "10.0.0.0/33"], 2, "invalid-argument", "range"),
    (&["network", "create", "n", "--range", "300.0.0.0/24"], 2, "invalid-argument", "range"),
    (&["network", "create", "blue", "--range", "10.1.0.0/24"], 4, "already-exists", "blue"),
    (&["network", "create", "n", "--range", "10.0.0.128/25"], 2, "invalid-argument", "overlap"),
    (&["network", "create", "n", "--range", "10.0.0.0/8"], 2, "invalid-argument", "overlap"),
    (&["template", "create", "t", "--vcpus", MOST, "--memory", "1GiB", "--disk", "0"], 2, "invalid-argument", "vcpus"),
    (&["template", "create", "t", "--vcpus", "1", "--memory", MOST, "--disk", "0"], 2, "invalid-argument", "memory"),
    (&["template", "create", "t", "--vcpus", "1", "--memory", "1GiB", "--disk", MOST], 2, "invalid-argument", "disk"),
    (&["template", "create", "t", "--vcpus", "0", "--memory", "0", "--disk", "0"], 2, "invalid-argument", "vcpus"),
    (&["setting", "set", "vm-attempts", MOST], 2, "invalid-argument", "vm-attempts"),
    (&["tag", "set", "a\u{7}b", "v"], 2, "invalid-argument", "key"),
    (&["tag", "set", LONG, "v"], 2, "invalid-argument", "key"),
    (&["tag", "set", "k", "line\nline"], 2, "invalid-argument", "value"),
    (&["tenant", "create", "acme"], 4, "already-exists", "acme"),
    (&["tenant", "create", ""], 2, "invalid-argument", "name"),
    (&["tag", "set", "k", "v", "--expected-version", "77"], 4, "version-mismatch", "version"),
    (&["setting", "set", "no-such-setting", "1"], 3, "not-found", "no-such-setting"),
    (&["setting", "set", "vm-attempts", "99999999"], 2, "invalid-argument", "vm-attempts"),
    (&["network", "delete", "none"], 3, "not-found", "none"),
    (&["vm", "list", "--token", "nonsense"], 7, "unauthenticated", "token"),
    (&["vm", "list", "--tenant", "nobody"], 3, "not-found", "nobody"),
];

#[tokio::test(flavor = "multi_thread")]
async fn bad_input_gets_one_sentence_a_code_and_an_exit_status() {
    let stage = Stage::furnished(1).await;
    let mut wrong = Vec::new();
    for (arguments, exit, code, words) in BAD_INPUT {
        let mut all = arguments.to_vec();
        all.extend(["--output", "json"]);
        let output = stage.trefoil(&all);
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        let said: Value = text.lines().last().and_then(|line| serde_json::from_str(line).ok()).unwrap_or_default();
        let sentence = said["error"].as_str().unwrap_or_default();
        let right = output.status.code() == Some(*exit) && said["code"] == *code && sentence.contains(words);
        if !right || sentence.contains('\u{1b}') {
            wrong.push(format!("trefoil {}: status {:?}, said {text}", arguments.join(" "), output.status.code()));
        }
    }
    assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), BAD_INPUT.len(), wrong.join("\n"));
    stage.strike().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_shell_cannot_type_is_refused_too() {
    let stage = Stage::furnished(1).await;
    let odd = "a\0b";
    let refusals = [
        stage.create_network(odd, "10.1.0.0/24").await.unwrap_err(),
        stage.create_vm(odd, "tiny").await.unwrap_err(),
        stage.create_vm("web", odd).await.unwrap_err(),
        stage.vm(odd).await.unwrap_err(),
        stage.set_tag(odd, "v").await.unwrap_err(),
        stage.set_tag("k", odd).await.unwrap_err(),
    ];
    for refused in refusals {
        assert!(["invalid-argument", "not-found"].contains(&refused.code.as_str()), "{refused:?}");
        assert!(!refused.message.contains('\0'), "{refused:?}");
    }
    stage.strike().await;
}

/// `SetTag` of a version to come.
#[derive(Clone, PartialEq, prost::Message)]
struct NewerSetTag {
    #[prost(string, tag = "1")]
    tenant: String,
    #[prost(string, tag = "2")]
    key: String,
    #[prost(string, tag = "3")]
    value: String,
    #[prost(uint64, tag = "99")]
    valid_millis: u64,
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_with_a_field_that_nobody_knows_is_refused_and_nothing_is_done() {
    let stage = Stage::set(0).await;
    let tls = api::tls::client_tls_ca(&stage.cluster.access().ca_pem);
    let channel = api::tls::connect(&stage.cluster.endpoint(0), tls).unwrap();
    let set = |valid_millis| {
        let body = NewerSetTag { tenant: TENANT.into(), key: "k".into(), value: "v".into(), valid_millis };
        let request = stage.client.request(Some(new_request_id()), body, Duration::from_secs(10));
        let mut call = tonic::client::Grpc::new(channel.clone());
        async move {
            call.ready().await.unwrap();
            let codec = tonic_prost::ProstCodec::<NewerSetTag, api::proto::Tag>::default();
            let path = "/trefoil.v1.Trefoil/SetTag".parse().unwrap();
            call.unary(request, path, codec).await.map_err(api::error::ApiError::from)
        }
    };
    let refused = set(60_000).await.unwrap_err();
    assert_eq!(refused.code, "invalid-argument", "{refused:?}");
    assert!(refused.message.contains("does not know"), "{refused:?}");
    assert_eq!(stage.tag("k").await.unwrap_err().code, "not-found", "nothing was written");
    set(0).await.expect("without the field it is a request of today");
    stage.strike().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_configuration_with_a_field_that_nobody_knows_is_refused() {
    let mut stage = Stage::set(0).await;
    let file = stage.file("client.toml", b"endpoint = \"127.0.0.1:1\"\n");
    let output = stage.trefoil(&["vm", "list", "--config", &file, "--output", "json"]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert!(said.contains("invalid-argument") && said.contains("endpoint"), "{said}");

    let config = stage.cluster.data(2).join("controller.toml");
    assert!(stage.cluster.terminate(2).unwrap());
    let good = std::fs::read_to_string(&config).unwrap();
    std::fs::write(&config, format!("colour = 7\n{good}")).unwrap();
    stage.cluster.restart(2).unwrap();
    let ended = until("a controller refuses to run with it", async || {
        stage.cluster.ended(2).ok_or_else(|| "it runs".to_owned())
    })
    .await;
    assert!(!ended.success());
    let said = stage.cluster.printed(2).unwrap();
    assert!(said.contains("colour"), "{said}");
    std::fs::write(&config, good).unwrap();
    stage.cluster.restart(2).unwrap();
    stage.settled().await;
    stage.strike().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_larger_than_any_node_waits_with_the_reason() {
    let stage = Stage::furnished(1).await;
    stage.trefoil_ok(&["template", "create", "giant", "--vcpus", "1024", "--memory", "4TiB", "--disk", "1GiB"]);
    stage.create_vm("web", "giant").await.unwrap();
    until("it says why it waits", async || {
        let vm = stage.vm("web").await.map_err(|error| error.to_string())?;
        let told = vm.status == "pending" && vm.reason.contains("no node has room");
        if told { Ok(()) } else { Err(format!("{} {}", vm.status, vm.reason)) }
    })
    .await;
    stage.trefoil_ok(&["vm", "delete", "web"]);
    assert!(stage.vms().await.is_empty());
    stage.strike().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_is_no_image_is_refused() {
    let stage = Stage::furnished(1).await;
    let text = stage.file("text.qcow2", b"this is not an image");
    let mut broken = b"QFI\xfb\0\0\0\x03".to_vec();
    broken.extend([0xff; 96]);
    let broken = stage.file("broken.qcow2", &broken);
    let empty = stage.file("empty.raw", b"");
    for (file, more) in [(&text, None), (&broken, None), (&empty, Some(["--format", "raw"]))] {
        let mut arguments = vec!["image", "import", file.as_str(), "--name", "x", "--output", "json"];
        arguments.extend(more.into_iter().flatten());
        let output = stage.trefoil(&arguments);
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{file}: {said}");
        assert!(said.contains("invalid-argument"), "{file}: {said}");
    }
    stage.strike().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_join_token_is_good_once() {
    let stage = Stage::set(1).await;
    let token = stage.cluster.join_token("agent").await.unwrap();
    let first = stage.join_host("one", &token);
    assert!(first.status.success(), "{}", String::from_utf8_lossy(&first.stderr));
    let second = stage.join_host("two", &token);
    let said = String::from_utf8_lossy(&second.stderr);
    assert_eq!(second.status.code(), Some(7), "{said}");
    assert!(said.contains("bad-join-token"), "{said}");
    stage.strike().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_larger_than_the_limit_is_refused() {
    let stage = Stage::set(0).await;
    let call = |mut stub: Stub, request| async move { stub.set_tag(request).await };
    for length in [100 << 10, 64 << 20] {
        let client = stage.client.clone().with_deadline(Duration::from_secs(10));
        let refused = client.mutate(new_request_id(), tag("k", &"x".repeat(length)), call).await.unwrap_err();
        assert!(["too-large", "invalid-argument"].contains(&refused.code.as_str()), "{length} bytes: {refused:?}");
    }
    stage.set_tag("k", "short").await.expect("and it goes on");
    stage.strike().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nonsense_on_the_ports_disturbs_nobody() {
    let mut stage = Stage::furnished(1).await;
    let mut chance = Chance::new(7);
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    for controller in 0..3 {
        let address = stage.cluster.address(controller).to_owned();
        for _ in 0..500 {
            let bytes: Vec<u8> = (0..chance.below(1500)).map(|_| chance.number() as u8).collect();
            socket.send_to(&bytes, &address).unwrap();
        }
        for _ in 0..20 {
            let mut stream = TcpStream::connect(&address).unwrap();
            let bytes: Vec<u8> = (0..1 + chance.below(4000)).map(|_| chance.number() as u8).collect();
            // The other side may hang up before it has heard all of it.
            let _ = stream.write_all(&bytes);
        }
        // And one that says nothing and stays.
        std::mem::forget(TcpStream::connect(&address).unwrap());
    }
    stage.create_vm("web", "tiny").await.unwrap();
    stage.vm_is("web", "running").await;
    stage.settled().await;
    stage.strike().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_is_let_in_without_a_valid_token_and_members_see_their_tenant_alone() {
    let stage = Stage::set(0).await;
    let access = stage.cluster.access();
    let nobody = Client::new(&stage.cluster.endpoints(), &access.ca_pem, "trefoil-user-AAAA").unwrap();
    let list = |client: Client, tenant: &str| {
        let body = ListRequest { tenant: tenant.into(), limit: 10, ..Default::default() };
        async move { client.read(body, |mut stub: Stub, request| async move { stub.list_tags(request).await }).await }
    };
    assert_eq!(list(nobody, TENANT).await.unwrap_err().code, "unauthenticated");

    stage.cluster.create_tenant("other").await.unwrap();
    let user = stage.trefoil_ok(&["user", "create", "ann", "--role", "member"]);
    let token = user["token"].as_str().expect("the token is shown once");
    let member = Client::new(&stage.cluster.endpoints(), &access.ca_pem, token).unwrap();
    assert!(list(member.clone(), TENANT).await.is_ok());
    assert!(list(member.clone(), "").await.is_ok(), "a member may leave the tenant out");
    let refused = list(member, "other").await.unwrap_err();
    assert!(["forbidden", "not-found"].contains(&refused.code.as_str()), "{refused:?}");
    stage.strike().await;
}
