//! A deployment in a temporary folder, and machines that join it.

use jiff::Timestamp;
use secondsite_control::api::{
    AgentReport, EnrolReply, EnrolRequest, InventoryDevice, PointReport, ProtectRequest,
    TargetReport, TargetVolumeReport, TrackerChoice, VolumePhase, VolumeReport,
};
use secondsite_control::ca::CERTIFICATE_LIFE_MAX;
use secondsite_control::client::Client;
use secondsite_control::client_error::ClientError;
use secondsite_control::clock::Clock;
use secondsite_control::pki::{self, Identity};
use secondsite_control::run::{ControlConfig, run};
use secondsite_control::setup::{OPERATOR, SetupReply, SetupRequest, TARGET, setup};
use secondsite_control::token::Token;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tempfile::TempDir;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

pub const MACHINE: &str = "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff";
pub const TARGET_ADDRESS: &str = "dr1.example.net:7444";

/// The true time, plus what a test adds.
#[derive(Debug, Default)]
pub struct Ahead(AtomicI64);

impl Ahead {
    pub fn advance(&self, by: Duration) {
        self.0.fetch_add(by.as_nanos() as i64, Ordering::SeqCst);
    }
}

impl Clock for Ahead {
    fn now(&self) -> Timestamp {
        Timestamp::now() + Duration::from_nanos(self.0.load(Ordering::SeqCst) as u64)
    }
}

struct Running {
    shutdown: oneshot::Sender<()>,
    task: JoinHandle<anyhow::Result<()>>,
}

pub struct Site {
    pub dir: TempDir,
    pub clock: Arc<Ahead>,
    pub setup: SetupReply,
    pub config: ControlConfig,
    pub address: String,
    running: Mutex<Option<Running>>,
}

impl Site {
    pub async fn new() -> Self {
        Self::with_life(CERTIFICATE_LIFE_MAX).await
    }

    pub async fn with_life(life: Duration) -> Self {
        let dir = tempfile::Builder::new().prefix("control-").tempdir().unwrap();
        let clock = Arc::new(Ahead::default());
        let listen = "127.0.0.1:0".parse().unwrap();
        let (pki_dir, db) = (dir.path().join("pki"), dir.path().join("state/control.db"));
        let hosts = vec!["127.0.0.1".to_owned(), "localhost".to_owned()];
        let mut request = SetupRequest::new(pki_dir.clone(), db.clone(), listen, hosts.clone());
        request.target_address = Some(TARGET_ADDRESS.to_owned());
        request.certificate_life = life;
        request.clock = clock.clone();
        let (again, setup) = tokio::task::spawn_blocking(move || {
            let reply = setup(&request).unwrap();
            (setup(&request).unwrap_err().to_string(), reply)
        })
        .await
        .unwrap();
        assert!(again.contains("set up already"), "{again}");
        let mut config = ControlConfig::new(listen, db, pki_dir);
        config.hosts = hosts;
        config.certificate_life = life;
        config.clock = clock.clone();
        let running = Mutex::new(None);
        let mut site = Self { dir, clock, setup, config, address: String::new(), running };
        site.start().await;
        site
    }

    pub async fn start(&mut self) {
        let (shutdown, ended) = oneshot::channel();
        let (ready, listens) = oneshot::channel();
        let task = tokio::spawn(run(self.config.clone(), async { _ = ended.await }, |address| {
            _ = ready.send(address)
        }));
        self.address = listens.await.unwrap().to_string();
        *self.running.lock().unwrap() = Some(Running { shutdown, task });
    }

    pub async fn stop(&self) {
        let running = self.running.lock().unwrap().take().unwrap();
        running.shutdown.send(()).unwrap();
        running.task.await.unwrap().unwrap();
    }

    pub fn identity(&self, name: &str) -> Identity {
        Identity::load(&self.config.pki_dir, name).unwrap()
    }

    pub fn client(&self, identity: &Identity) -> Client {
        Client::new(&self.address, identity.client_config().unwrap())
    }

    pub fn operator(&self) -> Client {
        self.client(&self.identity(OPERATOR))
    }

    pub fn target(&self) -> Client {
        self.client(&self.identity(TARGET))
    }

    /// A client that knows nothing but the token's fingerprint.
    pub fn stranger(&self, token: &str) -> Client {
        let authority = token.parse::<Token>().unwrap().authority();
        Client::new(&self.address, pki::client_config_pinned(&authority).unwrap())
    }

    pub async fn enrol(&self, token: &str, name: &str) -> Result<Joined, ClientError> {
        let (key, request_pem) = pki::new_request().unwrap();
        let request = EnrolRequest {
            token: token.to_owned(),
            request_pem,
            name: name.to_owned(),
            machine: MACHINE.to_owned(),
            inventory: inventory(),
        };
        let reply = self.stranger(&self.setup.token).enrol(&request).await?;
        let dir = self.dir.path().join(name);
        pki::install(&dir, "agent", &key, &reply.certificate_pem, &reply.authority_pem).unwrap();
        let client = self.client(&Identity::load(&dir, "agent").unwrap());
        Ok(Joined { reply, dir, client })
    }
}

/// A server that has joined.
pub struct Joined {
    pub reply: EnrolReply,
    pub dir: PathBuf,
    pub client: Client,
}

fn device(name: &str, kind: &str, parent: &str) -> InventoryDevice {
    InventoryDevice {
        name: name.to_owned(),
        path: format!("/dev/{name}"),
        kind: kind.to_owned(),
        size_bytes: 1 << 30,
        used_by: String::new(),
        swap: Vec::new(),
        parent: parent.to_owned(),
        trackers: vec!["ebpf".to_owned(), "compare".to_owned()],
        refused: String::new(),
    }
}

/// A disk with a partition and with swap, and a loop device without BTF's help.
pub fn inventory() -> Vec<InventoryDevice> {
    let mut sda = device("sda", "disk", "");
    sda.swap = vec![("sda3".to_owned(), 1 << 20, 1 << 20)];
    let mut loop3 = device("loop3", "loop", "");
    loop3.trackers.remove(0);
    vec![sda, device("sda1", "part", "sda"), loop3]
}

pub fn protect(volumes: &[&str]) -> ProtectRequest {
    ProtectRequest {
        volumes: volumes.iter().map(|volume| (*volume).to_owned()).collect(),
        goal_seconds: 30,
        keep: "none".to_owned(),
        tracker: TrackerChoice::Auto,
        reserve: None,
        block_bytes: None,
        include_swap: false,
        dry_run: false,
    }
}

pub fn agent_report(volumes: &[&str], phase: VolumePhase) -> AgentReport {
    let row = |id: &&str| VolumeReport {
        id: (*id).to_owned(),
        phase,
        reason: String::new(),
        code: None,
        tracker: "ebpf".to_owned(),
        tracker_reason: String::new(),
        tracker_code: None,
        cut: "quiet".to_owned(),
        progress_bytes: None,
        backlog_bytes: 4096,
        sent_bytes: 0,
        compares: 0,
    };
    AgentReport {
        agent_version: "0.1.0".to_owned(),
        volumes: volumes.iter().map(row).collect(),
        orders: BTreeMap::new(),
        stopped: None,
    }
}

pub fn target_report(server: &str, volume: &str, points: &[(&str, Timestamp)]) -> TargetReport {
    let point = |(id, time): &(&str, Timestamp)| PointReport {
        server: server.to_owned(),
        id: (*id).to_owned(),
        time_ns: u64::try_from(time.as_nanosecond()).unwrap(),
        generation: 1,
        epochs: BTreeMap::from([(volume.to_owned(), 5)]),
        consistency: "crash".to_owned(),
        lacking: Vec::new(),
        reason: String::new(),
        kept: false,
        name: None,
    };
    TargetReport {
        target_version: "0.1.0".to_owned(),
        volumes: vec![TargetVolumeReport {
            id: volume.to_owned(),
            connected: true,
            copied: true,
            generation: 1,
            epoch: Some(5),
            promoted_epoch: Some(5),
            replica: "/srv/secondsite/replica".to_owned(),
            journal_bytes: 0,
            error: None,
            refused: None,
        }],
        points: points.iter().map(point).collect(),
        free_bytes: 1 << 40,
    }
}
