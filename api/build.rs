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
    "Loss",
    "LostNode",
    "Network",
    "Nic",
    "Node",
    "Price",
    "Progress",
    "QuorumStatusReply",
    "Quota",
    "ReadAt",
    "RecoveryStatus",
    "Setting",
    "Tag",
    "Template",
    "Tenant",
    "User",
    "Vm",
    "VmUsage",
    "Waiting",
];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto");
    let descriptors = protox::compile(["proto/trefoil.proto"], ["proto"])?;
    let mut builder = tonic_prost_build::configure().bytes(".");
    for message in PRINTED {
        builder = builder.type_attribute(format!(".trefoil.v1.{message}"), "#[derive(serde::Serialize)]");
    }
    builder.compile_fds(descriptors)?;
    Ok(())
}
