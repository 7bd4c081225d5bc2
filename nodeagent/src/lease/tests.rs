//! What the agent leaves in force on the page. The rule itself is tested where it is, in `model::permit`.

use model::{Capacity, Digest, ImageFormat, ImageWish, NodeId, Power, Recovery, RequestId, VmId};

use super::*;

fn assignment(incarnation: u64, vms: Vec<VmWish>) -> Assignment {
    let (networks, images) = (Vec::new(), Vec::new());
    let (cluster, node, generation, rehearsals) = ("cloud".into(), NodeId(1), incarnation, vec![]);
    Assignment { cluster, node, incarnation, generation, vms, networks, images, rehearsals, spared: None }
}

fn exclusive(vm: u64, epoch: u64) -> VmWish {
    let (digest, format) = (Digest([5; 32]), ImageFormat::Raw);
    VmWish {
        vm: VmId(vm),
        epoch,
        request: RequestId::default(),
        attempt: 0,
        power: Power::Running,
        backup: None,
        moves: None,
        recovery: Recovery::Exclusive,
        stop_grace_millis: 0,
        reboots: 0,
        tenant: "acme".into(),
        name: "web".into(),
        size: Capacity::default(),
        image: ImageWish { digest, format, size_bytes: 1, virtual_bytes: 1, sources: Vec::new(), parents: Vec::new() },
        nics: Vec::new(),
        ssh_keys: Vec::new(),
        user_data: String::new(),
    }
}

#[test]
fn a_restarted_agent_takes_up_the_permit_and_does_not_lengthen_it() {
    let dir = tempfile::tempdir().unwrap();
    let first = Leases::open(dir.path()).unwrap();
    first.assigned(&assignment(1, vec![exclusive(1, 10)]));
    first.granted(1, 100);
    drop(first);
    let second = Leases::open(dir.path()).unwrap();
    assert_eq!((second.permit().incarnation, second.permit().until), (1, 100));
    second.granted(1, 200);
    assert_eq!(second.permit().until, 100, "it has no assignment yet");
    second.assigned(&assignment(2, Vec::new()));
    second.granted(2, 300);
    let denied = Machine { vm: VmId(1), epoch: 10, standing: Standing::Denied };
    assert_eq!(second.permit().machines, [denied], "what the last agent knew is not lost");
}
