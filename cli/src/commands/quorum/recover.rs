//! `trefoil quorum recover`: when a majority of the controllers is lost for ever, one that is left goes on alone.

use std::{collections::BTreeSet, path::PathBuf};

use anyhow::{Result, bail};
use controller::{RecoverArgs, Survivor};
use serde_json::json;

use crate::{
    moment::moment_text,
    output::{self, Format, details},
};

pub async fn recover(data: PathBuf, fenced: Option<Vec<u64>>, format: Format) -> Result<()> {
    let Some(fenced) = fenced else {
        let survivor = controller::survivor(&data)?;
        output::print(format, &told(&survivor), || describe(&survivor))?;
        bail!(
            "nothing was recovered yet; when none of the others runs or can ever run again, add --i-have-fenced {}",
            list(&survivor.others)
        );
    };
    let survivor = controller::recover(RecoverArgs { data, fenced: fenced.into_iter().collect() }).await?;
    output::print(format, &told(&survivor), || {
        format!(
            "{}\ncontroller-{} is the whole quorum now, in cluster epoch {}: run it, then let others join",
            describe(&survivor),
            survivor.id,
            survivor.epoch
        )
    })?;
    Ok(())
}

fn describe(survivor: &Survivor) -> String {
    details(
        &[
            ("cloud", survivor.cluster.clone()),
            ("controller", format!("controller-{}", survivor.id)),
            ("others", list(&survivor.others)),
            ("log", format!("last {}, term {}, known as agreed {}", survivor.last, survivor.term, survivor.applied)),
            ("last change", moment_text(survivor.at_millis)),
            ("cluster epoch", survivor.epoch.to_string()),
        ],
        None,
    )
}

fn told(survivor: &Survivor) -> serde_json::Value {
    json!({
        "id": survivor.id,
        "cluster": survivor.cluster,
        "last_index": survivor.last,
        "term": survivor.term,
        "applied_index": survivor.applied,
        "last_change_millis": survivor.at_millis,
        "others": survivor.others,
        "epoch": survivor.epoch,
    })
}

fn list(ids: &BTreeSet<u64>) -> String {
    ids.iter().map(u64::to_string).collect::<Vec<_>>().join(",")
}
