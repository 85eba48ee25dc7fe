//! Where all volumes of a target lie: folders of a file system, or the disks of a simulation.
//!
//! Ids are made by control and parsed here: no name of a peer becomes part of a path.

use super::disk::{Disk, Folder, free_bytes};
use super::{journal, segments, state};
use secondsite_format::ids::{ServerId, VolumeId};
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

/// Folder of a store that holds a folder a server.
const SERVERS: &str = "servers";

/// See the module.
pub trait Store: Send + Sync {
    /// Volumes with a `state.json`.
    fn volumes(&self) -> Vec<(ServerId, VolumeId)>;
    /// The folder of a volume, made durably if it is missing.
    fn open(&self, server: ServerId, volume: VolumeId) -> io::Result<Arc<dyn Disk>>;
    /// What to call that folder when talking to people.
    fn path(&self, server: ServerId, volume: VolumeId) -> PathBuf;
    /// Bytes that can still be written.
    fn free_bytes(&self) -> io::Result<u64>;
}

/// A [`Store`] in a folder: `servers/SERVER/VOLUME`.
pub struct Folders(pub PathBuf);

impl Store for Folders {
    fn volumes(&self) -> Vec<(ServerId, VolumeId)> {
        let list = |path: PathBuf| {
            let entries = std::fs::read_dir(path).into_iter().flatten().flatten();
            entries.filter_map(|entry| entry.file_name().into_string().ok()).collect::<Vec<_>>()
        };
        let root = self.0.join(SERVERS);
        let mut found = Vec::new();
        for server in list(root.clone()) {
            for volume in list(root.join(&server)) {
                let file = root.join(&server).join(&volume).join(state::FILE);
                if let (Ok(server), Ok(volume), true) =
                    (server.parse(), volume.parse(), file.exists())
                {
                    found.push((server, volume));
                }
            }
        }
        found
    }

    fn open(&self, server: ServerId, volume: VolumeId) -> io::Result<Arc<dyn Disk>> {
        let folder =
            Folder::create(&self.0, &below(server, volume), &[journal::FOLDER, segments::HISTORY])?;
        Ok(Arc::new(folder))
    }

    fn path(&self, server: ServerId, volume: VolumeId) -> PathBuf {
        self.0.join(below(server, volume))
    }

    fn free_bytes(&self) -> io::Result<u64> {
        free_bytes(&self.0)
    }
}

fn below(server: ServerId, volume: VolumeId) -> String {
    format!("{SERVERS}/{server}/{volume}")
}
