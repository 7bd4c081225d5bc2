//! Machines that are made from increments: from all of the chain that the quorum names, or not at all.

use model::assignment::ParentWish;

use super::*;

/// A qcow2 file as far as its header goes, which stands on `parent`.
fn image(parent: &str, words: &str) -> Vec<u8> {
    let mut bytes = vec![0; 104];
    bytes[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
    if !parent.is_empty() {
        (bytes[15], bytes[19]) = (104, u8::try_from(parent.len()).unwrap());
        bytes.extend(parent.bytes());
    }
    bytes.extend(words.bytes());
    bytes
}

/// A machine on an increment on an increment on a full copy, all in the host's store. And the files, the nearest first.
fn chained(world: &World, named_by_the_last: &str) -> (VmWish, Vec<Digest>) {
    let full = store(world.dir.path(), &image("", "full"));
    let middle = store(world.dir.path(), &image(&full.to_string(), "middle"));
    let named = if named_by_the_last.is_empty() { middle.to_string() } else { named_by_the_last.into() };
    let bytes = image(&named, "last");
    let last = store(world.dir.path(), &bytes);
    let parent = |digest| ParentWish { digest, size_bytes: 1 << 10, sources: vec![] };
    let parents = vec![parent(middle), parent(full)];
    let (format, size_bytes, virtual_bytes) = (ImageFormat::Qcow2, bytes.len() as u64, 1 << 20);
    let wish = ImageWish { digest: last, format, size_bytes, virtual_bytes, sources: vec![], parents };
    (VmWish { image: wish, ..vm(7, Power::Running) }, vec![last, middle, full])
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_machine_runs_on_an_increment_with_all_that_it_stands_on() {
    let world = World::new();
    let (machine, files) = chained(&world, "");
    world.wish(1, vec![machine]);
    world.until_reported(7, Phase::Running).await;
    let bases = world.hypervisor.inner.bases().unwrap();
    let kept = files.iter().all(|digest| bases.iter().any(|base| base.ends_with(digest.to_string())));
    assert!(kept, "all of it stays: {bases:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_machine_is_not_made_from_a_chain_of_which_the_middle_is_damaged() {
    let world = World::new();
    let (machine, files) = chained(&world, "");
    let middle = world.dir.path().join("images").join(files[1].to_string());
    let damaged = std::fs::read(&middle).unwrap().iter().map(|byte| byte ^ 1).collect::<Vec<u8>>();
    std::fs::remove_file(&middle).unwrap();
    std::fs::write(&middle, damaged).unwrap();
    world.wish(1, vec![machine]);
    world.until_reported(7, Phase::Failed).await;
    let reason = world.last().unwrap().reason;
    assert!(reason.contains(&files[1].to_string()) && reason.contains("no host has a good copy"), "{reason}");
    assert_eq!((world.power(), middle.exists()), (None, false), "and nobody uses the damaged one");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_machine_is_not_made_from_an_increment_that_names_another_file_than_its_parent() {
    let world = World::new();
    let (machine, _) = chained(&world, "/etc/shadow");
    world.wish(1, vec![machine]);
    world.until_reported(7, Phase::Failed).await;
    let reason = world.last().unwrap().reason;
    assert!(reason.contains("names the backing file '/etc/shadow'"), "{reason}");
    assert_eq!(world.power(), None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_fetched_and_names_another_file_than_its_parent_is_thrown_away() {
    let mut world = World::new();
    let (machine, files) = chained(&world, "/etc/shadow");
    world.kill_agent().await;
    let (executor, _outbox) = world.executor();
    let fetch = Step::FetchImage(machine.image);
    let fault = act::act(executor.host.clone(), assignment(1, vec![]), fetch, None).await.unwrap_err();
    assert_eq!(fault.kind, FaultKind::Permanent);
    assert!(fault.reason.contains("names the backing file '/etc/shadow'"), "{}", fault.reason);
    assert!(!world.dir.path().join("images").join(files[0].to_string()).exists(), "nobody comes to stand on it");
}
