//! `secondsite filter --status`: what runs, for people and for scripts.

use super::client::{Client, FilterError};
use crate::cli::failure::{Exit, Failure};
use crate::cli::{Context, output};
use secondsite_control::api::SCHEMA_VERSION;
use std::path::Path;
use std::time::Duration;

/// How long the filter may take to answer.
const LIMIT: Duration = Duration::from_secs(10);

impl From<FilterError> for Failure {
    fn from(error: FilterError) -> Self {
        let exit = match error {
            FilterError::Refused { .. } => Exit::Failed,
            _ => Exit::Unavailable,
        };
        Self::new(exit, error.to_string()).hint("systemctl status secondsite-filter")
    }
}

/// Shows the volumes.
pub(super) fn show(context: &Context, dir: &Path) -> Result<(), Failure> {
    let client = Client::connect(dir, LIMIT)?;
    let hello = client.hello()?;
    let volumes = client.list()?;
    if context.json {
        output::document(&serde_json::json!({
            "schema_version": SCHEMA_VERSION,
            "version": hello.version,
            "pid": hello.pid,
            "volumes": volumes,
        }));
        return Ok(());
    }
    output::talk(&format!("filter {}, process {}", hello.version, hello.pid));
    if volumes.is_empty() {
        output::talk("no volume is filtered");
        return Ok(());
    }
    let path = |path: Option<&Path>| path.map_or("-".into(), |path| path.display().to_string());
    let rows = volumes.iter().map(|volume| {
        vec![
            volume.id.clone(),
            format!("/dev/secondsite/{}", volume.name),
            path(volume.device.as_deref()),
            path(Some(&volume.backing)),
            volume.survives(),
            volume.state.clone(),
        ]
    });
    output::data(&output::table(
        &["VOLUME", "NAME", "DEVICE", "BACKING", "KEEPS", "STATE"],
        rows.collect(),
    ));
    Ok(())
}

/// Says one line and prints the answer.
pub(super) fn ask(dir: &Path, line: &str) -> Result<(), Failure> {
    let words: Vec<_> = line.split_whitespace().collect();
    match words.as_slice() {
        ["add", id, backing, name, block_bytes, reserve] => {
            let reserve = (*reserve != "-").then(|| Path::new(*reserve));
            let block = block_bytes.parse().unwrap_or(0);
            let volume =
                super::client::add(dir, LIMIT, id, Path::new(backing), name, block, reserve)?;
            output::data(&format!("{}\n", volume.state));
        }
        ["remove", id] => super::client::remove(dir, LIMIT, id)?,
        _ => output::data(&format!("{}\n", Client::connect(dir, LIMIT)?.ask(line)?)),
    }
    Ok(())
}
