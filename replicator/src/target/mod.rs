//! The target: receives, journals, commits, promotes.
//!
//! [`Target`] is the daemon's view. Below it, [`site`] holds all volumes and is independent of
//! sockets and TLS ([`server`] has those), [`keeper`] is one volume with its storage, [`volume`]
//! its state machine; [`disk`] is the storage itself, so that all of it also runs over a simulated
//! one.

pub mod budget;
pub mod conversation;
pub mod disk;
mod entry;
pub mod index;
mod jobs;
pub mod journal;
pub mod keeper;
pub mod layers;
pub mod merge;
mod observation;
pub mod opens;
pub mod pins;
pub mod point;
pub mod points;
pub mod promote;
pub mod recover;
pub mod replica;
pub mod retention;
pub mod run;
pub mod segments;
pub mod server;
pub mod session;
pub mod site;
pub mod space;
pub mod state;
pub mod store;
pub mod tend;
pub mod unpacked;
pub mod view;
pub mod volume;

pub use observation::{Observation, VolumeObservation};

use anyhow::Context;
use nix::fcntl::{Flock, FlockArg};
use opens::OpenPoints;
use retention::RetentionClock;
use secondsite_control::api::{TargetAssignment, TargetReport};
use secondsite_control::pki::{self, Identity};
use secondsite_control::recovery::Recovery;
use server::Server;
use site::{Site, SiteConfig};
use std::fs::File;
use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::sync::{Arc, OnceLock, Weak};
use store::Folders;

/// A replica volume that is a block device of this host (`[[device]]` in target.toml).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReplicaDevice {
    /// Name of the server.
    pub server: String,
    /// Name of the volume.
    pub volume: String,
    /// The device node.
    pub path: PathBuf,
}

/// What a target needs to know besides its assignment.
pub struct TargetConfig {
    /// Key and certificate.
    pub identity: Arc<Identity>,
    /// Where replicas and journals lie.
    pub store: PathBuf,
    /// Where agents connect.
    pub listen: SocketAddr,
    /// Replica volumes on devices; all others are sparse files in the store.
    pub devices: Vec<ReplicaDevice>,
    /// Space of the store that is never used, bytes.
    pub reserve_bytes: u64,
    /// Memory for frames on their way over all sessions, bytes.
    pub memory_bytes: u64,
    /// Where opened points are served over NBD.
    pub nbd_socket: PathBuf,
    /// Most that is written to a volume of an opened point, bytes.
    pub scratch_bytes: u64,
    /// Tells how old points are.
    pub clock: Arc<RetentionClock>,
}

/// Threads that open volumes and promote; each takes its share of disk and memory.
const WORKERS: usize = 2;
/// Held as long as a target serves the store.
const LOCK_FILE: &str = "target.lock";

/// The target's data plane. All methods return at once.
pub struct Target {
    server: Arc<Server>,
    site: Arc<Site>,
    opens: Arc<OpenPoints>,
    listening: SocketAddr,
    _lock: Flock<File>,
}

impl Target {
    /// Listens, and recovers what the assignment names. `changed` is called (from any thread) when
    /// the report changed.
    pub fn start(
        config: TargetConfig,
        assignment: TargetAssignment,
        changed: Box<dyn Fn() + Send + Sync>,
    ) -> anyhow::Result<Self> {
        let store = &config.store;
        std::fs::create_dir_all(store.join("servers"))
            .with_context(|| format!("making the store {}", store.display()))?;
        let store = store.canonicalize().with_context(|| format!("store {}", store.display()))?;
        let lock = lock_store(&store)?;
        allow_many_files();
        let tls = config.identity.server_config(true)?;
        let listener = TcpListener::bind(config.listen)
            .with_context(|| format!("listening on {}", config.listen))?;
        listener.set_nonblocking(true)?;
        let listening = listener.local_addr()?;
        let folder = store.clone();
        let site = SiteConfig {
            store: Box::new(Folders(store.clone())),
            devices: config.devices,
            reserve_bytes: config.reserve_bytes,
            memory_bytes: config.memory_bytes,
            verify: pki::verify_signature,
            clock: config.clock,
        };
        let resume: Arc<OnceLock<Weak<OpenPoints>>> = Arc::default();
        let opens = resume.clone();
        let changed = move || {
            if let Some(opens) = opens.get().and_then(Weak::upgrade) {
                opens.resume();
            }
            changed();
        };
        let site = Arc::new(Site::new(site, assignment, Box::new(changed)));
        // Before a worker runs: what was open is held from here on.
        let (socket, scratch) = (config.nbd_socket, config.scratch_bytes);
        let opens = Arc::new(OpenPoints::start(site.clone(), &folder, socket, scratch)?);
        let _ = resume.set(Arc::downgrade(&opens));
        let server = Server::new(site.clone(), tls);
        for _ in 0..WORKERS {
            let site = site.clone();
            server.spawn("promote", None, move |_| site.work())?;
        }
        server.spawn("listen", None, move |server| server.listen(&listener))?;
        Ok(Self { server, site, opens, listening, _lock: lock })
    }

    /// Where it listens; tells the port if the configuration left it open.
    pub fn listening(&self) -> SocketAddr {
        self.listening
    }

    /// Follows this assignment from now on; sessions it no longer allows end.
    pub fn assign(&self, assignment: TargetAssignment) {
        self.site.assign(assignment);
    }

    /// What is there.
    pub fn report(&self) -> TargetReport {
        self.site.report()
    }

    /// How many volumes there are, have an agent, cannot go on here. Asks no disk.
    pub fn counts(&self) -> (usize, usize, usize) {
        self.site.counts()
    }

    /// What metrics show.
    pub fn observe(&self) -> Observation {
        self.site.observe(self.server.handshake_failures())
    }

    /// A renewed certificate, for new sessions.
    pub fn set_identity(&self, identity: Arc<Identity>) {
        match identity.server_config(true) {
            Ok(tls) => self.server.set_tls(tls),
            Err(error) => tracing::error!("the renewed certificate cannot be used: {error:#}"),
        }
    }

    /// Its recovery points.
    pub fn recovery(&self) -> Arc<dyn Recovery> {
        self.opens.clone()
    }

    /// Ends all sessions and threads.
    pub fn stop(self) {
        self.server.stop();
    }
}

/// One target a store: two would each believe to be the only writer.
fn lock_store(store: &std::path::Path) -> anyhow::Result<Flock<File>> {
    let path = store.join(LOCK_FILE);
    let file = File::create(&path).with_context(|| format!("making {}", path.display()))?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, error)| {
        anyhow::anyhow!("another target serves the store {} ({error})", store.display())
    })
}

/// A descriptor a session and a segment: takes what the hard limit allows.
fn allow_many_files() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(error) = raised {
        tracing::warn!("the limit of open files stays as it is: {error}");
    }
}
