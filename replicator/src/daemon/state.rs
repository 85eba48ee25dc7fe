//! What a daemon must know after a restart: JSON documents with a format number, written whole.
//!
//! Invariants: a file is either the old or the new one (beside, fsync, rename, fsync of the folder);
//! a newer format is refused and left as it is.

use crate::cli::failure::{Exit, Failure};
use crate::pulse;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Format of every document here.
const FORMAT: u64 = 1;
const FORMAT_KEY: &str = "format";
const CONTENT_KEY: &str = "content";

/// Reads a document of a role without making its folder; none if it was never written.
pub fn peek<T: DeserializeOwned>(
    state: &Path,
    role: &str,
    name: &str,
) -> Result<Option<T>, Failure> {
    StateDir { dir: state.join(role) }.read(name)
}

/// The state folder of one role.
#[derive(Debug, Clone)]
pub struct StateDir {
    dir: PathBuf,
}

impl StateDir {
    /// Opens (and makes) the folder of `role` below `state`.
    pub fn open(state: &Path, role: &str) -> Result<Self, Failure> {
        let dir = state.join(role);
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&dir)
            .map_err(|error| Failure::io("create", &dir, &error))?;
        Ok(Self { dir })
    }

    /// Path of a document.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(format!("{name}.json"))
    }

    /// Reads a document; none if it was never written.
    pub fn read<T: DeserializeOwned>(&self, name: &str) -> Result<Option<T>, Failure> {
        let path = self.path(name);
        let bytes = match std::fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Failure::io("read", &path, &error)),
        };
        decode(&path, &bytes).map(Some)
    }

    /// Writes a document, durably.
    pub fn write<T: Serialize>(&self, name: &str, content: &T) -> Result<(), Failure> {
        let path = self.path(name);
        let document = encode(content);
        let write = || -> std::io::Result<()> {
            let beside = path.with_added_extension("new");
            let mut file = OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(true)
                .mode(0o600)
                .open(&beside)?;
            file.write_all(&document)?;
            file.sync_all()?;
            std::fs::rename(&beside, &path)?;
            File::open(&self.dir)?.sync_all()
        };
        pulse::outside(write).map_err(|error| Failure::io("write", &path, &error))
    }
}

/// The bytes of a document.
pub fn encode<T: Serialize>(content: &T) -> Vec<u8> {
    let document = serde_json::json!({ FORMAT_KEY: FORMAT, CONTENT_KEY: content });
    format!("{document}\n").into_bytes()
}

/// Reads the bytes of the document at `path`. The format comes first: nothing else of a newer one
/// is looked at.
pub fn decode<T: DeserializeOwned>(path: &Path, bytes: &[u8]) -> Result<T, Failure> {
    let damaged = |why: &dyn std::fmt::Display| {
        Failure::new(Exit::DataDiffers, format!("{} is damaged: {why}", path.display()))
            .hint(format!("move {} away; what it held comes again from control", path.display()))
    };
    let mut document: serde_json::Value =
        serde_json::from_slice(bytes).map_err(|error| damaged(&error))?;
    match document[FORMAT_KEY].as_u64() {
        Some(FORMAT) => {}
        Some(found) if found > FORMAT => {
            let what = format!(
                "{} was written by a newer Secondsite (format {found}, this one reads up to \
                 {FORMAT})",
                path.display()
            );
            return Err(Failure::new(Exit::Config, what)
                .still("the file was left as it is")
                .hint("install the newer Secondsite again"));
        }
        _ => return Err(damaged(&"no format number")),
    }
    // A document that is not an object has no format number, so it has keys.
    serde_json::from_value(document[CONTENT_KEY].take()).map_err(|error| damaged(&error))
}

#[cfg(test)]
mod tests {
    use super::StateDir;
    use crate::cli::failure::Exit;

    #[test]
    fn documents_come_back_and_newer_ones_are_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::open(dir.path(), "agent").unwrap();
        assert_eq!(state.read::<Vec<u32>>("orders").unwrap(), None);
        state.write("orders", &vec![1, 2]).unwrap();
        state.write("orders", &vec![3]).unwrap();
        assert_eq!(state.read::<Vec<u32>>("orders").unwrap(), Some(vec![3]));

        let newer = r#"{"format": 2, "content": {"other": true}}"#;
        std::fs::write(state.path("orders"), newer).unwrap();
        let failure = state.read::<Vec<u32>>("orders").unwrap_err();
        assert_eq!(failure.exit, Exit::Config);
        assert_eq!(std::fs::read_to_string(state.path("orders")).unwrap(), newer);

        std::fs::write(state.path("orders"), "{\"form").unwrap();
        assert_eq!(state.read::<Vec<u32>>("orders").unwrap_err().exit, Exit::DataDiffers);
    }
}
