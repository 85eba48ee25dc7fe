//! Recovery points that are open: served over NBD, each with a scratch area for what is written.
//!
//! Invariants: a point is held from before it is looked up until it is closed, so neither promotion
//! nor thinning changes what is read; what is written lies in the scratch area alone. The note of
//! an open point is durable before a client can write to it: after a restart it is served again,
//! under the same address, with what was written. Closing takes the note away first.

use super::keeper::Keeper;
use super::pins::{self, NAME_BYTES_MAX, PINS_MAX};
use super::point::PointDevice;
use super::points::CompletePoint;
use super::site::Site;
use super::tend::{Hold, NotHeld};
use super::unpacked::Unpacked;
use crate::nbd;
use crate::overlay::Overlay;
use jiff::Timestamp;
use secondsite_control::api::{Point, Points, Problem, SCHEMA_VERSION, TargetServer};
use secondsite_control::problem::exit;
use secondsite_control::recovery::{
    CloseReply, CloseRequest, KeepRequest, OpenRequest, OpenedPoint, OpenedVolume, Opens, Recovery,
};
use secondsite_format::ids::{CutId, Epoch, ServerId, VolumeId};
use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

/// Folder of the store that holds scratch areas: `scratch/SERVER/POINT/VOLUME`.
const SCRATCH: &str = "scratch";
/// Added to the name of a scratch area that is being removed.
const CLOSED: &str = "closed";
/// Most that small reads of a volume keep unpacked, bytes.
const UNPACKED_BYTES: u64 = 1 << 30;
/// Most points open at a time.
const OPEN_MAX: usize = 64;

/// A point that is served.
struct Open {
    name: String,
    time_ns: u64,
    consistency: &'static str,
    volumes: BTreeMap<VolumeId, Served>,
    _hold: Hold,
}

struct Served {
    name: String,
    export: String,
    overlay: Arc<Overlay>,
}

type Key = (ServerId, CutId);

/// See the module.
pub struct OpenPoints {
    site: Arc<Site>,
    nbd: nbd::Server,
    /// Why nobody can reach it, if so.
    deaf: Option<String>,
    socket: PathBuf,
    scratch: PathBuf,
    scratch_bytes_max: u64,
    open: Mutex<BTreeMap<Key, Open>>,
    /// Open before a restart, and not served again yet.
    waiting: Mutex<BTreeMap<Key, (Hold, Vec<VolumeId>)>>,
}

fn problem(exit_code: u8, message: impl Into<String>, hint: impl Into<String>) -> Problem {
    Problem { exit_code, message: message.into(), hint: hint.into() }
}

fn io_problem(what: &str, path: &Path, error: impl std::fmt::Display) -> Problem {
    problem(
        exit::IO,
        format!("{what} {}: {error}", path.display()),
        format!("df -h {}", path.display()),
    )
}

/// Points with a scratch area in a store: what must be held from the first moment on.
pub fn left_open(store: &Path) -> Vec<Key> {
    let mut found = Vec::new();
    for server in names(&store.join(SCRATCH)) {
        for point in names(&store.join(SCRATCH).join(&server)) {
            if let (Ok(server), Ok(point)) = (server.parse(), point.parse()) {
                found.push((server, point));
            }
        }
    }
    found
}

/// What closing had begun to remove when the process ended.
fn remove_closed(scratch: &Path) {
    for server in names(scratch) {
        let folder = scratch.join(server);
        for name in names(&folder).iter().filter(|name| name.ends_with(&format!(".{CLOSED}"))) {
            if let Err(error) = std::fs::remove_dir_all(folder.join(name)) {
                tracing::warn!("removing {}: {error}", folder.join(name).display());
            }
        }
    }
}

fn names(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().into_string().ok()).collect()
}

impl OpenPoints {
    /// Serves on `socket`; what was open before a restart is served again by [`Self::resume`].
    pub fn start(
        site: Arc<Site>,
        store: &Path,
        socket: PathBuf,
        scratch_bytes_max: u64,
    ) -> anyhow::Result<Self> {
        let nbd = nbd::Server::new(None)?;
        // Replication goes on without: only opening points needs it.
        let deaf = nbd.listen_unix(&socket).err().map(|error| error.to_string());
        if let Some(error) = &deaf {
            tracing::error!("no recovery point can be opened: {error}");
        }
        let scratch = store.join(SCRATCH);
        remove_closed(&scratch);
        let mut waiting = BTreeMap::new();
        for (server, cut) in left_open(store) {
            let folder = scratch.join(server.to_string()).join(cut.to_string());
            let volumes = names(&folder).iter().filter_map(|name| name.parse().ok()).collect();
            waiting.insert((server, cut), (site.hold_again(server, cut), volumes));
        }
        Ok(Self {
            site,
            nbd,
            deaf,
            socket,
            scratch,
            scratch_bytes_max,
            open: Mutex::default(),
            waiting: Mutex::new(waiting),
        })
    }

    /// Serves again what was open before a restart, as far as its volumes are open by now.
    pub fn resume(&self) {
        let keys: Vec<Key> = self.waiting().keys().copied().collect();
        for key in keys {
            let wanted = match self.waiting().get(&key) {
                Some((_, volumes)) => volumes.clone(),
                None => continue,
            };
            if wanted.iter().any(|volume| self.site.keeper(key.0, *volume).is_none()) {
                continue;
            }
            let Some((hold, volumes)) = self.waiting().remove(&key) else { continue };
            match self.serve(key, &|volume| volumes.contains(&volume), hold) {
                Ok(_) => tracing::info!(server = %key.0, point = %key.1, "served again"),
                Err(problem) => {
                    tracing::error!(server = %key.0, point = %key.1, "{}", problem.message);
                }
            }
        }
    }

    fn waiting(&self) -> MutexGuard<'_, BTreeMap<Key, (Hold, Vec<VolumeId>)>> {
        self.waiting.lock().expect("nothing panics while it holds them")
    }

    fn opened(&self) -> MutexGuard<'_, BTreeMap<Key, Open>> {
        self.open.lock().expect("nothing panics while it holds them")
    }

    fn folder(&self, (server, cut): Key) -> PathBuf {
        self.scratch.join(server.to_string()).join(cut.to_string())
    }

    fn server(&self, name: &str) -> Result<(ServerId, TargetServer), Problem> {
        let assignment = self.site.assignment();
        let found = assignment.servers.iter().find(|server| server.name == name);
        let id = found.and_then(|server| Some((server.id.parse().ok()?, server.clone())));
        id.ok_or_else(|| {
            let message = format!("no server {name} is known to the target of this host");
            problem(exit::USAGE, message, "secondsite status")
        })
    }

    fn find(
        &self,
        (id, server): (ServerId, &TargetServer),
        request: &OpenRequest,
    ) -> Result<CompletePoint, Problem> {
        let points = self.site.points(id);
        let list = format!("secondsite points {}", server.name);
        if points.is_empty() {
            let message = format!("{} has no recovery point yet", server.name);
            return Err(problem(
                exit::UNAVAILABLE,
                message,
                format!("secondsite status {}", server.name),
            ));
        }
        match (&request.point, &request.at) {
            (Some(_), Some(_)) => {
                let message = "a point is named, and a time too: one of them is enough";
                Err(problem(exit::USAGE, message, list))
            }
            (Some(wanted), None) => {
                let cut = self.site.pinned(id, wanted).or_else(|| wanted.parse().ok());
                let found = points.into_iter().find(|point| Some(point.cut_id) == cut);
                found.ok_or_else(|| {
                    let message = format!("{} has no recovery point {wanted}", server.name);
                    problem(exit::UNAVAILABLE, message, list)
                })
            }
            (None, at) => {
                let at_ns = match at {
                    Some(text) => Some(nanoseconds(text)?),
                    None => None,
                };
                let exact = points.iter().filter(|point| point.is_exact());
                let mut before = exact.filter(|point| at_ns.is_none_or(|at| point.time_ns <= at));
                if let Some(found) = before.next_back() {
                    return Ok(found.clone());
                }
                let name = &server.name;
                let message = match (at, points.iter().find(|point| point.is_exact())) {
                    (_, None) => format!("{name} has no exact recovery point"),
                    (Some(at), Some(first)) => format!(
                        "{name} has no exact recovery point of {at} or before; the oldest is {} of {}",
                        first.cut_id,
                        time(first.time_ns)
                    ),
                    (None, Some(_)) => unreachable!("without a time any exact point will do"),
                };
                let nearest = points.iter().find(|point| point.is_exact()).or(points.first());
                let hint = nearest.map(|point| format!("--point {}", point.cut_id));
                Err(problem(exit::UNAVAILABLE, message, hint.unwrap_or(list)))
            }
        }
    }

    /// Serves the volumes of a point that are asked for and not served yet.
    fn serve(
        &self,
        key: Key,
        wanted: &dyn Fn(VolumeId) -> bool,
        hold: Hold,
    ) -> Result<OpenedPoint, Problem> {
        let (server, cut) = key;
        let gone = || {
            let message = format!("recovery point {cut} is no longer there");
            problem(exit::UNAVAILABLE, message, "secondsite points SERVER")
        };
        let point = self.site.points(server).into_iter().find(|point| point.cut_id == cut);
        let point = point.ok_or_else(gone)?;
        let assignment = self.site.assignment();
        let id = server.to_string();
        let row = assignment.servers.iter().find(|row| row.id == id).ok_or_else(gone)?;
        let mut open = self.opened();
        if !open.contains_key(&key) && open.len() == OPEN_MAX {
            let message = format!("{OPEN_MAX} recovery points are open already");
            return Err(problem(exit::LATER, message, "secondsite close SERVER"));
        }
        let known = open.get(&key);
        let mut served = BTreeMap::new();
        for (volume, epoch) in point.epochs().filter(|(volume, _)| wanted(*volume)) {
            if known.is_some_and(|open| open.volumes.contains_key(&volume)) {
                continue;
            }
            let text = volume.to_string();
            let name = row.volumes.iter().find(|row| row.id == text);
            let name = name.map_or(text, |row| row.name.clone());
            let export = format!("{}/{cut}/{name}", row.name);
            match self.serve_volume(key, (volume, epoch), &export) {
                Ok(overlay) => served.insert(volume, Served { name, export, overlay }),
                Err(problem) => {
                    // All or nothing, and nothing of this attempt stays.
                    for (volume, served) in served {
                        self.nbd.remove(&served.export);
                        drop(served);
                        self.forget(&self.folder(key).join(volume.to_string()));
                    }
                    self.forget(&self.folder(key).join(volume.to_string()));
                    if known.is_none() {
                        self.forget(&self.folder(key));
                    }
                    return Err(problem);
                }
            };
        }
        let open = open.entry(key).or_insert_with(|| Open {
            name: row.name.clone(),
            time_ns: point.time_ns,
            consistency: point.consistency_word(),
            volumes: BTreeMap::new(),
            _hold: hold,
        });
        open.volumes.extend(served);
        Ok(self.describe(cut, open))
    }

    fn serve_volume(
        &self,
        key: Key,
        (volume, epoch): (VolumeId, Epoch),
        export: &str,
    ) -> Result<Arc<Overlay>, Problem> {
        let keeper: Arc<Keeper> = self.site.keeper(key.0, volume).ok_or_else(|| {
            let message = format!("volume {volume} is still being checked, or cannot be opened");
            problem(exit::LATER, message, "secondsite status")
        })?;
        let view = keeper
            .view_at(epoch)
            .map_err(|refusal| problem(exit::IO, refusal.message, "secondsite status"))?;
        let view = view.ok_or_else(|| {
            let message = format!("epoch {epoch} of volume {volume} is not there");
            problem(exit::UNAVAILABLE, message, "secondsite points SERVER")
        })?;
        let folder = self.folder(key).join(volume.to_string());
        make_folders(&folder).map_err(|error| io_problem("making", &folder, error))?;
        let mut identity = blake3::Hasher::new();
        identity.update(&key.0.0).update(&key.1.0).update(&volume.0);
        let spare = self.site.spare_bytes();
        let base = match Unpacked::new(&folder, UNPACKED_BYTES.min(spare / 4)) {
            Ok(unpacked) => PointDevice::with_unpacked(view, unpacked),
            Err(error) => {
                tracing::debug!("no place for unpacked frames: {error}");
                PointDevice::new(view)
            }
        };
        let base = Arc::new(base);
        let bytes_max = self.scratch_bytes_max.min(spare / 2);
        let overlay = Overlay::open(&folder, base, identity.finalize().as_bytes(), bytes_max)
            .map_err(|error| io_problem("opening the scratch area", &folder, error))?;
        let overlay = Arc::new(overlay);
        self.nbd
            .add(export, overlay.clone())
            .map_err(|error| problem(exit::FAILED, error.to_string(), ""))?;
        Ok(overlay)
    }

    /// Takes a folder of a scratch area away; the log says what stays.
    fn forget(&self, folder: &Path) {
        match std::fs::remove_dir_all(folder) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!("removing {}: {error}", folder.display());
            }
            _ => {}
        }
    }

    fn describe(&self, cut: CutId, open: &Open) -> OpenedPoint {
        let socket = self.socket.display();
        let volume = |served: &Served| OpenedVolume {
            name: served.name.clone(),
            uri: format!("nbd+unix:///{}?socket={socket}", served.export),
            point: cut.to_string(),
            size_bytes: nbd::Device::bytes(&*served.overlay),
            scratch_bytes: served.overlay.used_bytes(),
            clients: self.nbd.connections(&served.export),
        };
        OpenedPoint {
            server: open.name.clone(),
            point: cut.to_string(),
            time: time(open.time_ns),
            consistency: open.consistency.into(),
            volumes: open.volumes.values().map(volume).collect(),
        }
    }
}

impl Recovery for OpenPoints {
    fn points(&self, server: &str) -> Result<Points, Problem> {
        let (id, row) = self.server(server)?;
        let name = |id: &String| {
            let found = row.volumes.iter().find(|volume| volume.id == *id);
            found.map_or_else(|| id.clone(), |volume| volume.name.clone())
        };
        let points = self.site.point_reports(id).into_iter().map(|point| Point {
            id: point.id,
            time: time(point.time_ns),
            generation: point.generation,
            epochs: point.epochs.iter().map(|(id, epoch)| (name(id), *epoch)).collect(),
            consistency: point.consistency,
            lacking: point.lacking.iter().map(name).collect(),
            reason: point.reason,
            kept: point.kept,
            name: point.name,
        });
        Ok(Points { schema_version: SCHEMA_VERSION, points: points.collect() })
    }

    fn open(&self, server: &str, request: &OpenRequest) -> Result<OpenedPoint, Problem> {
        if let Some(error) = &self.deaf {
            let hint = "systemctl restart secondsite-target";
            return Err(problem(exit::UNAVAILABLE, error.clone(), hint));
        }
        let (id, row) = self.server(server)?;
        let point = self.find((id, &row), request)?;
        let volume = match &request.volume {
            None => None,
            Some(name) => {
                let found = row.volumes.iter().find(|volume| volume.name == *name);
                let volume = found.and_then(|volume| volume.id.parse::<VolumeId>().ok());
                let of_point = volume.filter(|id| point.epochs().any(|(of, _)| of == *id));
                Some(of_point.ok_or_else(|| {
                    let message = format!("recovery point {} has no volume {name}", point.cut_id);
                    problem(exit::USAGE, message, format!("secondsite points {server}"))
                })?)
            }
        };
        let hold = self.site.hold(id, point.cut_id).map_err(|NotHeld::Unknown| {
            let message = format!("recovery point {} is just being thinned away", point.cut_id);
            problem(exit::LATER, message, format!("secondsite points {server}"))
        })?;
        self.serve((id, point.cut_id), &|id| volume.is_none_or(|wanted| wanted == id), hold)
    }

    fn opens(&self) -> Opens {
        let open = self.opened();
        let mut points: Vec<OpenedPoint> =
            open.iter().map(|((_, cut), open)| self.describe(*cut, open)).collect();
        points.sort_by(|a, b| (&a.server, &a.time).cmp(&(&b.server, &b.time)));
        Opens { schema_version: SCHEMA_VERSION, points }
    }

    fn close(&self, server: &str, request: &CloseRequest) -> Result<CloseReply, Problem> {
        let (id, _) = self.server(server)?;
        let wanted = match &request.point {
            None => None,
            Some(text) => {
                let cut = self.site.pinned(id, text).or_else(|| text.parse().ok());
                Some(cut.ok_or_else(|| {
                    let message = format!("{server} has no recovery point {text}");
                    problem(exit::USAGE, message, format!("secondsite points {server}"))
                })?)
            }
        };
        let its = |key: &Key| key.0 == id && wanted.is_none_or(|cut| cut == key.1);
        let keys: Vec<Key> = {
            let open = self.opened();
            let waiting = self.waiting();
            open.keys().chain(waiting.keys()).copied().filter(its).collect()
        };
        if keys.is_empty() && wanted.is_some() {
            let message = format!("this recovery point of {server} is not open");
            return Err(problem(exit::UNAVAILABLE, message, "secondsite open --list"));
        }
        for key in &keys {
            let open = self.opened().remove(key);
            self.waiting().remove(key);
            for served in open.iter().flat_map(|open| open.volumes.values()) {
                self.nbd.remove(&served.export);
            }
            // Under another name it is not served again after a restart. Who still has a request on
            // its way writes to a file without a name.
            let (folder, closed) = (self.folder(*key), self.folder(*key).with_extension(CLOSED));
            match std::fs::rename(&folder, &closed) {
                Ok(()) => self.forget(&closed),
                Err(_) => self.forget(&folder),
            }
            drop(open);
        }
        self.site.look_after(id);
        Ok(CloseReply { closed: keys.iter().map(|(_, cut)| cut.to_string()).collect() })
    }

    fn keep(&self, server: &str, request: &KeepRequest) -> Result<(), Problem> {
        let (id, row) = self.server(server)?;
        let wanted = OpenRequest { point: Some(request.point.clone()), ..OpenRequest::default() };
        let point = self.find((id, &row), &wanted)?;
        if let Some(name) = request.name.as_ref().filter(|name| !pins::is_name(name)) {
            let message = format!(
                "{name:?} is no name for a point: up to {NAME_BYTES_MAX} letters, digits and -_."
            );
            return Err(problem(exit::USAGE, message, ""));
        }
        let done = self.site.change_pins(id, |pins| {
            if request.release {
                pins.remove(&point.cut_id);
                return Ok(());
            }
            let taken = |(cut, name): (&CutId, &Option<String>)| {
                *cut != point.cut_id && name.is_some() && *name == request.name
            };
            if pins.iter().any(taken) {
                return Err(format!("another point of {server} has that name"));
            }
            if pins.len() >= PINS_MAX && !pins.contains_key(&point.cut_id) {
                return Err(format!("{PINS_MAX} points of {server} are kept already"));
            }
            let name = pins.entry(point.cut_id).or_default();
            *name = request.name.clone().or(name.take());
            Ok(())
        });
        done.map_err(|message| {
            problem(exit::FAILED, message, format!("secondsite points {server}"))
        })?;
        self.site.look_after(id);
        Ok(())
    }
}

fn make_folders(folder: &Path) -> io::Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
    // The note that it is open: durable up to the store.
    folder.ancestors().take(4).try_for_each(|folder| std::fs::File::open(folder)?.sync_all())
}

fn nanoseconds(text: &str) -> Result<u64, Problem> {
    let parsed: Result<Timestamp, _> = text.parse();
    parsed.ok().and_then(|at| u64::try_from(at.as_nanosecond()).ok()).ok_or_else(|| {
        let message = format!("{text:?} is no time in RFC 3339");
        problem(exit::USAGE, message, "--at 2026-11-21T10:30:00Z")
    })
}

fn time(ns: u64) -> String {
    let at = Timestamp::from_nanosecond(ns.into()).unwrap_or(Timestamp::UNIX_EPOCH);
    format!("{at:.3}")
}
