//! Volumes behind the filter: the filter's process is asked to stand in front of a device, and what
//! it shares with the agent is opened.
//!
//! What is shared belongs to one run of the machine. If the filter had to begin anew (another device
//! under the same name), the memory that the agent has mapped is nobody's any more: [`FilteredDisk`]
//! notices, and the volume is opened anew, with a compare.

use crate::filter::client::{self, Client, FilterError, Listed};
use crate::source::attach::NotAttached;
use crate::source::seams::{Batch, Cutter, Disk, DiskError, Tracker};
use crate::source::volume::lock;
use secondsite_control::api::VolumeAssignment;
use secondsite_control::codes::Reason;
use secondsite_format::ids::VolumeId;
use secondsite_tracker::device::Device;
use secondsite_tracker::ebpf::Audit;
use secondsite_tracker::filter::beside::Beside;
use secondsite_tracker::filter::shared::{Group, Shared, group_path, volume_path};
use secondsite_tracker::marks::Marks;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// How long the filter may take to answer, and to put itself in front of a device.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);
const ADD_LIMIT: Duration = Duration::from_secs(60);
/// Times that it is asked again when it was just being changed.
const TRIES_MAX: u32 = 3;

/// The filter in front of one volume.
pub struct FilterTracker {
    shared: Arc<Shared>,
    beside: Beside,
}

/// Finds the filter of a volume, or has it made.
pub fn behind_filter(
    assigned: &VolumeAssignment,
    backing: &Device,
    dir: &Path,
) -> Result<FilterTracker, NotAttached> {
    let refused = |why: String| (Reason::FilterFailed, why);
    let listed = find(assigned, &backing.path, dir).map_err(|error| match error {
        FilterError::Silent { .. } => (Reason::FilterAbsent, error.to_string()),
        error => refused(error.to_string()),
    })?;
    if listed.block_bytes != assigned.block_bytes {
        return Err(refused(format!(
            "the filter of {} follows blocks of {} bytes, and {} are asked for",
            assigned.name, listed.block_bytes, assigned.block_bytes
        )));
    }
    if listed.device.is_none() {
        return Err(refused(format!("the filter of {}: {}", assigned.name, listed.state)));
    }
    let group = Group::open(&group_path(dir)).map_err(|error| refused(error.to_string()))?;
    let shared = Shared::open(&volume_path(dir, &assigned.id), &group)
        .map_err(|error| refused(error.to_string()))?;
    if shared.form().volume_bytes != backing.size_bytes {
        return Err(refused(format!(
            "the filter of {} goes up to {} bytes, the device up to {}",
            assigned.name,
            shared.form().volume_bytes,
            backing.size_bytes
        )));
    }
    let beside = Beside::open(backing).map_err(|error| refused(error.to_string()))?;
    Ok(FilterTracker { shared: Arc::new(shared), beside })
}

/// The name under `/dev/secondsite`.
pub fn stable_name(assigned: &VolumeAssignment) -> String {
    assigned.name.replace('/', "-")
}

/// The filter ends and begins with every change: one at a time, and again if another agent's change
/// came in between.
fn find(assigned: &VolumeAssignment, backing: &Path, dir: &Path) -> Result<Listed, FilterError> {
    static ONE: Mutex<()> = Mutex::new(());
    let _one = lock(&ONE);
    let mut tries = 0;
    loop {
        let client = Client::connect(dir, ANSWER_LIMIT)?;
        match find_once(client, assigned, backing, dir) {
            Err(FilterError::Silent { .. }) if tries < TRIES_MAX => tries += 1,
            found => return found,
        }
    }
}

fn find_once(
    client: Client,
    assigned: &VolumeAssignment,
    backing: &Path,
    dir: &Path,
) -> Result<Listed, FilterError> {
    let volumes = client.list()?;
    drop(client);
    if let Some(listed) = volumes.into_iter().find(|listed| listed.id == assigned.id) {
        return Ok(listed);
    }
    let reserve = assigned.reserve.as_ref().map(PathBuf::from);
    let (name, block) = (stable_name(assigned), assigned.block_bytes);
    client::add(dir, ADD_LIMIT, &assigned.id, backing, &name, block, reserve.as_deref())
}

/// Takes the filter of a volume out; nothing there is fine. Its users have to be gone.
pub fn take_out(dir: &Path, id: &str) {
    let listed = Client::connect(dir, ANSWER_LIMIT).and_then(|client| client.list());
    let Ok(volumes) = listed else { return };
    if volumes.iter().any(|listed| listed.id == id)
        && let Err(error) = client::remove(dir, ADD_LIMIT, id)
    {
        tracing::warn!(volume = id, %error, "its filter stays: it passes everything through");
    }
}

impl Tracker for FilterTracker {
    fn marks(&self) -> &Arc<Marks> {
        self.shared.marks()
    }
    fn audit(&self) -> Audit {
        self.beside.audit(&self.shared)
    }
    fn rebase(&self) -> Result<(), String> {
        self.beside.rebase(&self.shared)
    }
    fn mounts(&self) -> Vec<PathBuf> {
        Vec::new()
    }
    fn sync(&self, _mount: &Path) -> Result<Duration, String> {
        Err("nothing to write back for".into())
    }
    fn writes_in_flight(&self) -> bool {
        let (completed, submitted) = self.shared.sectors(|| {});
        completed != submitted
    }
    fn filtered(&self) -> Option<&Arc<Shared>> {
        Some(&self.shared)
    }
}

/// The backing device, as long as the filter in front of it is the one whose memory is mapped.
pub struct FilteredDisk {
    /// The backing device.
    pub disk: Box<dyn Disk>,
    /// What is mapped.
    pub shared: Arc<Shared>,
    /// The volume, for messages.
    pub path: PathBuf,
}

impl Disk for FilteredDisk {
    fn check(&mut self) -> Result<(), DiskError> {
        if !self.shared.is_current() {
            let cause = "its filter began anew".into();
            return Err(DiskError::Gone { path: self.path.clone(), cause });
        }
        self.disk.check()
    }
    fn submit(&mut self, batch: Batch) -> Result<(), DiskError> {
        self.disk.submit(batch)
    }
    fn wait(&mut self) -> Result<Batch, DiskError> {
        self.disk.wait()
    }
    fn outstanding(&self) -> usize {
        self.disk.outstanding()
    }
    fn urgent(&mut self, urgent: bool) {
        self.disk.urgent(urgent);
    }
}

/// Asks the filter's process for cuts.
pub struct FilterCutter {
    /// The folder of the filter.
    pub dir: PathBuf,
    /// The connection, until the filter is another process.
    pub client: Option<Client>,
}

impl Cutter for FilterCutter {
    fn cut(&mut self, volumes: &[VolumeId]) -> Result<u64, String> {
        let ids: Vec<String> = volumes.iter().map(ToString::to_string).collect();
        let ids: Vec<&str> = ids.iter().map(String::as_str).collect();
        let client = match self.client.take() {
            Some(client) => client,
            None => Client::connect(&self.dir, ANSWER_LIMIT).map_err(|error| error.to_string())?,
        };
        // Not asked again by itself: a cut whose answer was lost may have been made.
        let flip = client.cut(&ids).map_err(|error| error.to_string())?;
        self.client = Some(client);
        Ok(flip)
    }
}
