//! Attacks the target's front over real TLS: no certificate, one of another authority, one of
//! another role, one whose server is not the hello's, a peer that never says hello; and shows
//! that the right one gets through, is signed for with its own key, and that stopping is quick.

mod target_support;

use rustls::{ClientConfig, ClientConnection, StreamOwned};
use secondsite::target::{Target, TargetConfig};
use secondsite::wire::{Connection, WireError};
use secondsite_control::api::{TargetAssignment, TargetServer, TargetVolume};
use secondsite_control::ca::Authority;
use secondsite_control::clock::{Clock, SystemClock};
use secondsite_control::pki::{Identity, Role};
use secondsite_format::frame::{Frame, FrameHeader, FrameKind};
use secondsite_format::ids::{CutId, Epoch, Generation, ServerId, VolumeId};
use secondsite_format::manifest::SignedManifest;
use secondsite_format::message::{Hello, PROTOCOL, RefusalCode, Reply, Request, Welcome};
use std::io::Read;
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};
use target_support::{BLOCK, Put, SERVER, SYNC, Script, VOLUME, VOLUME_BYTES, sync_frame};

const TARGET_ID: &str = "0102030405060708090a0b0c0d0e0f10";
/// Nothing here takes long; a test that hangs says so.
const PATIENCE: Duration = Duration::from_secs(10);

fn write(path: &Path, text: &str) {
    use std::io::Write;
    let mut options = std::fs::OpenOptions::new();
    let mut file = options.write(true).create(true).truncate(true).mode(0o600).open(path).unwrap();
    file.write_all(text.as_bytes()).unwrap();
}

fn identity(authority: &Authority, dir: &Path, name: &str, role: Role) -> Arc<Identity> {
    let key = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap();
    let request = rcgen::CertificateParams::default().serialize_request(&key).unwrap();
    let issued = authority.sign(&request.pem().unwrap(), &role, &[], SystemClock.now()).unwrap();
    std::fs::create_dir_all(dir).unwrap();
    write(&dir.join(format!("{name}.key")), &key.serialize_pem());
    write(&dir.join(format!("{name}.pem")), &issued.certificate_pem);
    write(&dir.join("ca.pem"), authority.certificate_pem());
    Arc::new(Identity::load(dir, name).unwrap())
}

fn volume(id: VolumeId) -> TargetVolume {
    TargetVolume {
        id: id.to_string(),
        name: format!("v{id}"),
        size_bytes: VOLUME_BYTES,
        block_bytes: BLOCK as u32,
    }
}

fn assignment(volumes: Vec<TargetVolume>) -> TargetAssignment {
    let server = TargetServer {
        id: SERVER.to_string(),
        name: "db1".into(),
        machine: "5a".repeat(32),
        keep: None,
        active: true,
        volumes,
    };
    TargetAssignment { version: 1, servers: vec![server] }
}

struct Ring {
    dir: tempfile::TempDir,
    authority: Authority,
    target: Target,
    changes: mpsc::Receiver<()>,
}

impl Ring {
    fn new(volumes: Vec<TargetVolume>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let authority = Authority::create(&dir.path().join("ca"), &SystemClock).unwrap();
        let role = Role::Target(TARGET_ID.into());
        let config = TargetConfig {
            identity: identity(&authority, &dir.path().join("pki"), "target", role),
            store: dir.path().join("store"),
            listen: "127.0.0.1:0".parse().unwrap(),
            devices: vec![],
            reserve_bytes: 0,
            memory_bytes: 64 << 20,
        };
        let (changed, changes) = mpsc::channel();
        let changed = Box::new(move || changed.send(()).unwrap_or_default());
        let target = Target::start(config, assignment(volumes), changed).unwrap();
        let ring = Self { dir, authority, target, changes };
        ring.until("all volumes are open", |report| {
            report.volumes.iter().all(|row| row.generation == 1)
        });
        ring
    }

    fn agent(&self, id: ServerId) -> Arc<Identity> {
        let dir = self.dir.path().join(format!("agent-{id}"));
        identity(&self.authority, &dir, "agent", Role::Agent(id.to_string()))
    }

    /// Waits for a report in which something holds; each change is an event.
    fn until(&self, what: &str, holds: impl Fn(&secondsite_control::api::TargetReport) -> bool) {
        let begun = Instant::now();
        while !holds(&self.target.report()) {
            let left = PATIENCE.saturating_sub(begun.elapsed());
            self.changes.recv_timeout(left).unwrap_or_else(|_| panic!("waited for: {what}"));
        }
    }
}

type Stream = StreamOwned<ClientConnection, TcpStream>;

fn connect(address: SocketAddr, config: Arc<ClientConfig>) -> Connection<Stream> {
    let socket = TcpStream::connect(address).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket.set_nodelay(true).unwrap();
    let name = "target.secondsite.internal".try_into().unwrap();
    Connection::new(StreamOwned::new(ClientConnection::new(config, name).unwrap(), socket))
}

fn hello(volume: VolumeId) -> Hello {
    Hello {
        protocol: PROTOCOL,
        server: SERVER,
        machine: [0x5a; 32],
        volume,
        volume_bytes: VOLUME_BYTES,
        block_bytes: BLOCK as u32,
        generation: Generation(0),
        acknowledged: (Epoch(0), CutId::NONE),
    }
}

fn signed_commit(script: &Script, identity: &Identity, previous: [u8; 32]) -> Frame {
    let manifest = script.manifest(previous);
    let mut header = FrameHeader::message(FrameKind::Commit);
    header.generation = manifest.generation;
    header.epoch = manifest.epoch;
    header.cut_id = manifest.cut_id;
    let signed =
        SignedManifest::sign(manifest, identity.public_key(), |bytes| identity.sign(bytes));
    Frame::new(header, signed.unwrap().encode())
}

#[test]
fn the_right_certificate_gets_an_epoch_through() {
    let ring = Ring::new(vec![volume(VOLUME)]);
    let agent = ring.agent(SERVER);
    let mut line = connect(ring.target.listening(), agent.client_config().unwrap());
    line.send_message(&hello(VOLUME)).unwrap();
    let _: Welcome = line.receive_message("welcome").unwrap();
    let ask = |line: &mut Connection<Stream>, request: Request| -> Reply {
        line.send_message(&request).unwrap();
        line.receive_message("reply").unwrap()
    };
    ask(&mut line, Request::CopyBegin { sync: SYNC });
    line.send(&sync_frame(&[Put::Fill(0, 1)])).unwrap();
    ask(&mut line, Request::CopyDone { sync: SYNC });
    let script = Script::new(1, vec![(1, vec![Put::Fill(2, 2)])]);
    script.data().iter().for_each(|frame| line.send(frame).unwrap());
    // A manifest signed by another agent of this deployment commits nothing here.
    let other = ring.agent(ServerId([1; 16]));
    line.send(&signed_commit(&script, &other, [0; 32])).unwrap();
    match line.receive() {
        Err(WireError::Refused(refusal)) => assert_eq!(refusal.code, RefusalCode::Unproven),
        other => panic!("a refusal was due, not {other:?}"),
    }
    let mut line = connect(ring.target.listening(), agent.client_config().unwrap());
    line.send_message(&hello(VOLUME)).unwrap();
    let welcome: Welcome = line.receive_message("welcome").unwrap();
    assert_eq!(welcome.staged, Some((script.cut_id, 1)));
    line.send(&signed_commit(&script, &agent, [0; 32])).unwrap();
    let reply: Reply = line.receive_message("reply").unwrap();
    assert!(matches!(reply, Reply::Committed { epoch: Epoch(1), .. }), "{reply:?}");
    ring.until("epoch 1 is promoted", |report| report.volumes[0].promoted_epoch == Some(1));
    let hung = secondsite::pulse::stuck().filter(|stuck| stuck.time > Duration::from_secs(5));
    assert_eq!(hung, None);
    let begun = Instant::now();
    ring.target.stop();
    assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
    match line.receive() {
        Err(WireError::Refused(refusal)) => assert_eq!(refusal.code, RefusalCode::Stopping),
        other => panic!("a refusal was due, not {other:?}"),
    }
}

#[test]
fn strangers_get_nothing() {
    let ring = Ring::new(vec![volume(VOLUME)]);
    let address = ring.target.listening();
    let foreign = Authority::create(&ring.dir.path().join("foreign"), &SystemClock).unwrap();
    let dir = ring.dir.path();
    let role = Role::Agent(SERVER.to_string());
    let of_foreign = identity(&foreign, &dir.join("a"), "agent", role);
    // Believes our authority, but has its certificate from another one.
    write(&dir.join("a/ca.pem"), ring.authority.certificate_pem());
    let of_foreign = Identity::load(&of_foreign.dir, "agent").unwrap();
    let operator = Role::Operator("eve".into());
    let of_operator = identity(&ring.authority, &dir.join("b"), "operator", operator);
    for stranger in [&of_foreign, &of_operator] {
        let mut line = connect(address, stranger.client_config().unwrap());
        let sent = line.send_message(&hello(VOLUME)).and_then(|()| line.receive());
        assert!(matches!(sent, Err(WireError::Io(_)) | Ok(None)), "{sent:?}");
    }
    // The certificate of one server, the hello of another.
    let other = ring.agent(ServerId([1; 16]));
    let mut line = connect(address, other.client_config().unwrap());
    line.send_message(&hello(VOLUME)).unwrap();
    match line.receive() {
        Err(WireError::Refused(refusal)) => assert_eq!(refusal.code, RefusalCode::NotAllowed),
        other => panic!("a refusal was due, not {other:?}"),
    }
    // No TLS at all.
    let mut plain = TcpStream::connect(address).unwrap();
    plain.set_read_timeout(Some(PATIENCE)).unwrap();
    std::io::Write::write_all(&mut plain, b"GET / HTTP/1.1\r\n\r\n").unwrap();
    let mut answer = Vec::new();
    let _ = plain.read_to_end(&mut answer); // an alert at most, then the end
    assert!(answer.len() < 64 && !ring.target.report().volumes[0].connected);
    ring.target.stop();
}

#[test]
fn one_target_a_store() {
    let ring = Ring::new(vec![volume(VOLUME)]);
    let dir = ring.dir.path().join("pki");
    let config = TargetConfig {
        identity: Arc::new(Identity::load(&dir, "target").unwrap()),
        store: ring.dir.path().join("store"),
        listen: "127.0.0.1:0".parse().unwrap(),
        devices: vec![],
        reserve_bytes: 0,
        memory_bytes: 1 << 20,
    };
    let error = Target::start(config, assignment(vec![]), Box::new(|| {})).err().unwrap();
    assert!(error.to_string().contains("another target"), "{error}");
    ring.target.stop();
}

/// What a thousand idle sessions cost, for docs/decisions/0001-thread-model.md. Run by hand:
/// `cargo test --release -p secondsite --test target_strangers_over_tls -- --ignored --nocapture`.
#[test]
#[ignore = "a measurement"]
fn a_thousand_idle_sessions() {
    const COUNT: u32 = 1000;
    let id = |number: u32| {
        let mut id = [0; 16];
        id[..4].copy_from_slice(&number.to_be_bytes());
        VolumeId(id)
    };
    let ring = Ring::new((1..=COUNT).map(|number| volume(id(number))).collect());
    let config = ring.agent(SERVER).client_config().unwrap();
    let resident = || {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find(|line| line.starts_with("VmRSS")).unwrap().to_owned();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap()
    };
    let before = resident();
    let begun = Instant::now();
    let mut lines = Vec::new();
    for number in 1..=COUNT {
        let mut line = connect(ring.target.listening(), config.clone());
        line.send_message(&hello(id(number))).unwrap();
        let _: Welcome = line.receive_message("welcome").unwrap();
        lines.push(line);
    }
    let took = begun.elapsed();
    let after = resident();
    let threads = std::fs::read_dir("/proc/self/task").unwrap().count();
    println!(
        "{COUNT} sessions: {} KiB each (both ends of TLS in this process), {threads} threads, \
         connected in {took:?}; report in {:?}",
        (after - before) / u64::from(COUNT),
        {
            let begun = Instant::now();
            ring.target.report();
            begun.elapsed()
        }
    );
    let begun = Instant::now();
    ring.target.stop();
    println!("stopped in {:?}", begun.elapsed());
}
