/// What the CLI prints as JSON. Messages that carry bytes are not among them.
const PRINTED: &[&str] = &[
    "Bill",
    "BillLine",
    "ControllerStatus",
    "CreateUserReply",
    "Image",
    "IssueJoinTokenReply",
    "ListImagesReply",
    "ListNetworksReply",
    "ListNodesReply",
    "ListPricesReply",
    "ListSettingsReply",
    "ListTagsReply",
    "ListTemplatesReply",
    "ListTenantsReply",
    "ListUsersReply",
    "ListVmsReply",
    "DrainStatus",
    "Left",
    "Loss",
    "LostNode",
    "Migration",
    "Network",
    "Nic",
    "Node",
    "Orphan",
    "Price",
    "Probe",
    "Progress",
    "BrokenRule",
    "QuorumCheckReply",
    "QuorumStatusReply",
    "Quota",
    "ReadAt",
    "RecoveryStatus",
    "Refounding",
    "Rehearsal",
    "Rehearsed",
    "Setting",
    "SuggestMovesReply",
    "Suggestion",
    "SuspectNode",
    "Tag",
    "Template",
    "Tenant",
    "UpgradeQuorumReply",
    "User",
    "Vm",
    "VmBackups",
    "VmUsage",
    "Waiting",
];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto");
    let descriptors = protox::compile(["proto/trefoil.proto"], ["proto"])?;
    let mut servers =
        tonic_prost_build::configure().bytes(".").build_client(false).codec_path("crate::codec::ServerCodec");
    for message in PRINTED {
        servers = servers.type_attribute(format!(".trefoil.v1.{message}"), "#[derive(serde::Serialize)]");
    }
    servers.compile_fds(descriptors.clone())?;
    let folder = std::path::PathBuf::from(std::env::var("OUT_DIR")?).join("clients");
    std::fs::create_dir_all(&folder)?;
    let clients = tonic_prost_build::configure().build_server(false).out_dir(folder);
    clients.extern_path(".trefoil.v1", "crate::proto").compile_fds(descriptors)?;
    Ok(())
}
