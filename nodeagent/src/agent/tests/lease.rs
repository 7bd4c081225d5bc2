//! A whole agent with a machine that must not run twice: it runs while a leader grants leases, and not without.

use model::{Recovery, lease::Grant};

use super::*;

/// What happened to the machine, as the simulation's log of effects has it.
fn effects(path: &std::path::Path) -> Vec<String> {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let effect =
        |line: &str| serde_json::from_str::<serde_json::Value>(line).ok()?["effect"].as_str().map(str::to_owned);
    text.lines().filter_map(effect).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_exclusive_machine_runs_while_leases_are_granted_and_an_agents_restart_pauses_nobody() {
    let ca = CertificateAuthority::create("c").unwrap();
    let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let (_, source) = other_host(&ca, dirs[1].path(), Some(BASE)).await;
    let mut wish = assignment(vec![source]);
    wish.vms[0].recovery = Recovery::Exclusive;
    let controller = Controller::start(&ca, 1, wish).await;
    let log = dirs[0].path().join("effects");
    let seen = |expected: &[&str]| effects(&log) == expected;

    let agent = start_agent(&ca, dirs[0].path(), &[&controller]);
    until("all but the start is done", || dirs[0].path().join("vms/vm-1/guest.json").exists()).await;
    let heard = controller.0.beats.lock().unwrap().len();
    until("the host has beaten for a while", || controller.0.beats.lock().unwrap().len() > heard + 4).await;
    assert!(seen(&[]), "no lease, no start: {:?}", effects(&log));
    controller.grant(true);
    until("it is started", || seen(&["start"])).await;

    agent.abort();
    let _ = agent.await;
    let agent = start_agent(&ca, dirs[0].path(), &[&controller]);
    let greeted = controller.hellos();
    until("the next agent has a session", || controller.hellos() > greeted).await;
    let heard = controller.0.beats.lock().unwrap().len();
    // Longer than the lease that the first agent left.
    until("the next agent beats", || controller.0.beats.lock().unwrap().len() > heard + 14).await;
    assert!(seen(&["start"]), "a restart inside the lease: {:?}", effects(&log));

    controller.grant(false);
    until("it is stopped when the lease ends", || seen(&["start", "pause"])).await;
    controller.grant(true);
    until("it goes on when the lease is back", || seen(&["start", "pause", "continue"])).await;

    // Given up and attached again: the new assignment no longer names it.
    controller.grant(false);
    until("it is stopped again", || seen(&["start", "pause", "continue", "pause"])).await;
    {
        let mut assignment = controller.0.assignment.lock().unwrap();
        assignment.vms.clear();
        assignment.generation += 1;
    }
    let greeted = controller.hellos();
    controller.0.end.notify_one();
    until("it has another session", || controller.hellos() > greeted).await;
    controller.grant(true);
    until("it is set aside", || seen(&["start", "pause", "continue", "pause", "stop"])).await;
    assert!(std::fs::read_dir(dirs[0].path().join("quarantine")).unwrap().next().is_some(), "its disk is kept");
    agent.abort();
}

impl Controller {
    fn grant(&self, grants: bool) {
        self.0.grants.store(grants, Ordering::SeqCst);
    }
}

impl Played {
    pub(super) fn granted(&self) -> Option<Grant> {
        self.grants.load(Ordering::SeqCst).then_some(Grant { age_nanos: 1_000_000 })
    }
}
