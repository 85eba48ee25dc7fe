//! The NBD server and the overlay under the clients of the field (libnbd, qemu, fio), and under one
//! that keeps to nothing. Needs those: feature `real`. The kernel's client: `tests/lab/nbd.sh`.

mod nbd_support;

use nbd_support::{Certificates, FLUSH, FUA, FileDevice, READ, RawClient, WRITE, run, succeed};
use secondsite::nbd::{CONNECTIONS_MAX, Device, PAYLOAD_BYTES_MAX, Run, Server, Zeroing};
use secondsite::overlay::Overlay;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

const MIB: u64 = 1 << 20;
const OF: [u8; 32] = [1; 32];

/// A server with an export `disk`: a base of 64 MiB, half of it holes, under an overlay.
struct Site {
    dir: tempfile::TempDir,
    server: Server,
}

impl Site {
    fn new() -> Self {
        Self::with(None, u64::MAX)
    }

    fn with(tls: Option<Arc<rustls::ServerConfig>>, limit_bytes: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let base = Self::base_of(dir.path());
        let server = Server::new(tls).unwrap();
        let overlay = Overlay::open(dir.path(), base, &OF, limit_bytes).unwrap();
        server.add("disk", Arc::new(overlay)).unwrap();
        server.listen_unix(&dir.path().join("socket")).unwrap();
        Self { dir, server }
    }

    fn base_of(folder: &Path) -> Arc<dyn Device> {
        let path = folder.join("base");
        let file = File::create(&path).unwrap();
        file.set_len(64 * MIB).unwrap();
        for part in (0..64).step_by(2) {
            let content: Vec<u8> = (0..MIB).map(|at| ((at * 31 + part * 7) >> 3) as u8).collect();
            file.write_all_at(&content, part * MIB).unwrap();
        }
        Arc::new(FileDevice::open(&path))
    }

    fn path(&self, name: &str) -> String {
        self.dir.path().join(name).to_str().unwrap().into()
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("socket")
    }

    fn uri(&self) -> String {
        format!("nbd+unix:///disk?socket={}", self.path("socket"))
    }

    fn raw(&self) -> RawClient {
        RawClient::connect(&self.socket(), "disk").unwrap()
    }

    /// A file of random content and holes, as large as the export.
    fn image(&self, name: &str) -> String {
        let path = self.path(name);
        let file = File::create(&path).unwrap();
        file.set_len(64 * MIB).unwrap();
        let mut random = vec![0; 3 * MIB as usize];
        File::open("/dev/urandom").unwrap().read_exact(&mut random).unwrap();
        for at in [0, 10 * MIB + 4096, 40 * MIB, 61 * MIB] {
            file.write_all_at(&random, at).unwrap();
        }
        path
    }
}

fn same(one: &str, other: &str) {
    succeed("cmp", &[one, other]);
}

fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !holds() {
        assert!(Instant::now() < deadline, "waiting until {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn nbdinfo_sees_what_is_served() {
    let site = Site::new();
    site.server.add("bare", Site::base_of(site.dir.path())).unwrap();
    let mode = std::fs::symlink_metadata(site.socket()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let listed =
        succeed("nbdinfo", &["--list", &format!("nbd+unix:///?socket={}", site.path("socket"))]);
    for text in [
        "export=\"bare\"",
        "export=\"disk\"",
        "export-size: 67108864 (64M)",
        "can_multi_conn: true",
        "can_flush: true",
        "can_fua: true",
        "can_trim: true",
        "can_zero: true",
        "can_df: true",
        "can_fast_zero: true",
        "can_cache: true",
        "base:allocation",
        "block_size_maximum: 33554432",
        "structured packets",
    ] {
        assert!(listed.contains(text), "{text} in\n{listed}");
    }
    let map = succeed("nbdinfo", &["--map", &site.uri()]);
    let runs: Vec<_> =
        map.lines().map(|line| line.split_whitespace().collect::<Vec<_>>()).collect();
    assert_eq!(runs.len(), 64, "{map}");
    assert_eq!(runs[0], ["0", "1048576", "0", "data"]);
    assert_eq!(runs[1], ["1048576", "1048576", "3", "hole,zero"]);
    let missing = run("nbdinfo", &[&format!("nbd+unix:///none?socket={}", site.path("socket"))]);
    assert!(!missing.status.success());
}

#[test]
fn nbdcopy_and_qemu_img_take_and_bring_every_byte() {
    let site = Site::new();
    let (base, copy) = (site.path("base"), site.path("copy"));
    let uri = site.uri();
    succeed("nbdcopy", &["--connections=4", &uri, &copy]);
    same(&base, &copy);
    let image = site.image("image");
    succeed("nbdcopy", &["--connections=4", "--flush", &image, &uri]);
    succeed("nbdcopy", &["--synchronous", "--no-extents", &uri, &copy]);
    same(&image, &copy);
    succeed("qemu-img", &["compare", "-f", "raw", "-F", "raw", &uri, &image]);
    // What was zeroed takes no space, in the overlay and in what is said of it.
    let map = succeed("qemu-img", &["map", "--output=json", "-f", "raw", &uri]);
    assert!(map.matches("\"data\": true").count() <= 8 && map.contains("\"data\": false"), "{map}");

    let other = site.image("other");
    succeed("qemu-img", &["convert", "-n", "-W", "-f", "raw", "-O", "raw", &other, &uri]);
    succeed("qemu-img", &["compare", "-f", "raw", "-F", "raw", &uri, &other]);
    let qcow = site.path("qcow");
    succeed("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", &uri, &qcow]);
    succeed("qemu-img", &["compare", "-f", "qcow2", "-F", "raw", &qcow, &other]);
    // The base is as it was.
    succeed("nbdcopy", &[&base, "null:"]);
    let fresh = tempfile::tempdir().unwrap();
    drop(Site::base_of(fresh.path()));
    same(&base, fresh.path().join("base").to_str().unwrap());
}

#[test]
fn qemu_io_finds_what_it_wrote() {
    let site = Site::new();
    let io = |commands: &[&str]| {
        let mut arguments = vec!["-f", "raw", "-t", "none", "-d", "unmap"];
        commands.iter().for_each(|command| arguments.extend(["-c", command]));
        let uri = site.uri();
        arguments.push(&uri);
        let said = succeed("qemu-io", &arguments);
        assert!(!said.contains("failed") && !said.contains("rror"), "{said}");
        said
    };
    io(&[
        "write -P 0x11 0 1M",
        "write -P 0x22 513 5000",
        "read -P 0x11 0 513",
        "read -P 0x22 513 5000",
        "write -f -P 0x33 2M 64k",
        "flush",
        "read -P 0x33 2M 64k",
        "write -z 256k 128k",
        "write -z -u 512k 100000",
        "read -P 0 256k 128k",
        "read -P 0 512k 100000",
        "discard 2M 64k",
        "read 2M 64k",
        "write -P 0x44 63M 1M",
        "read -P 0x44 63M 1M",
        "write -q -P 0x55 4M 32M",
        "read -q -P 0x55 4M 32M",
        "aio_write -P 0x66 40M 1M",
        "aio_write -P 0x77 41M 1M",
        "aio_read 4M 1M",
        "aio_flush",
        "read -P 0x66 40M 1M",
    ]);
    // The same over a new connection.
    io(&["read -P 0x22 513 5000", "read -P 0 256k 128k", "read -P 0x77 41M 1M", "map"]);
}

#[test]
fn fio_verifies_what_it_wrote_with_many_requests_in_flight() {
    let site = Site::new();
    let uri = format!("--uri=nbd+unix:///disk?socket={}", site.path("socket"));
    for size in ["--bs=4k", "--bsrange=512-300k"] {
        let arguments = [
            "--name=verify",
            "--ioengine=nbd",
            "--rw=randwrite",
            "--iodepth=32",
            "--verify=crc32c",
            "--do_verify=1",
            "--verify_state_save=0",
            "--verify_fatal=1",
            "--size=24m",
            "--randrepeat=0",
            "--fsync=64",
            "--bs_unaligned",
            size,
            &uri,
        ];
        let said = succeed("fio", &arguments);
        assert!(said.contains("err= 0"), "{said}");
    }
}

#[test]
fn one_client_ends_nothing_but_itself() {
    let site = Site::new();
    // One that asks for gigabytes, in a way that gets it many threads, and takes nothing, one that speaks another language, one that
    // is silent, and one that dies within a write.
    let mut stuck = site.raw();
    stuck.socket.set_nonblocking(true).unwrap();
    let before = resident_bytes();
    let mut asked = 0u64;
    stuck.command_flags = FUA;
    while asked < 4096 && stuck.send(READ, asked, 0, PAYLOAD_BYTES_MAX).is_ok() {
        asked += 1;
    }
    let mut nonsense = site.raw();
    nonsense.socket.write_all(&[0x55; 100]).unwrap();
    let mut byte = [0];
    assert!(matches!(nonsense.socket.read(&mut byte), Ok(0) | Err(_)), "it is not answered");
    let mut greeted = UnixStream::connect(site.socket()).unwrap();
    let _ = greeted.write_all(&[0xff; 4000]);
    let _silent = UnixStream::connect(site.socket()).unwrap();
    let mut dying = site.raw();
    dying.send(WRITE, 1, 0, 8 << 20).unwrap();
    dying.socket.write_all(&[0xdd; 5 << 20]).unwrap();
    drop(dying);

    let uri = site.uri();
    let copies: Vec<_> = (0..6)
        .map(|index| {
            let copy = site.path(&format!("copy{index}"));
            Command::new("nbdcopy").args([&uri, &copy]).spawn().unwrap()
        })
        .collect();
    // Two are killed where they are.
    for (index, mut copy) in copies.into_iter().enumerate() {
        if index < 2 {
            copy.kill().unwrap();
        }
        let status = copy.wait().unwrap();
        assert!(status.success() || index < 2, "{status}");
        if index >= 2 {
            same(&site.path("base"), &site.path(&format!("copy{index}")));
        }
    }
    assert!(resident_bytes() < before + (112 << 20), "what a stuck client holds is bounded");
    drop(stuck);
    wait_until("they have gone", || site.server.connections("disk") == 0);
}

fn resident_bytes() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    statm.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * 4096
}

#[test]
fn a_request_that_cannot_be_served_is_answered_and_the_next_one_served() {
    let site = Site::new();
    let mut client = site.raw();
    client.send(WRITE, 7, 0, PAYLOAD_BYTES_MAX + 1).unwrap();
    client.socket.write_all(&vec![1; PAYLOAD_BYTES_MAX as usize + 1]).unwrap();
    assert_eq!(client.reply().unwrap(), (libc::EOVERFLOW as u32, 7));
    assert_eq!(
        client.read(0, PAYLOAD_BYTES_MAX as usize + 1).unwrap(),
        Err(libc::EOVERFLOW as u32)
    );
    assert_eq!(client.read(64 * MIB - 1, 2).unwrap(), Err(libc::EINVAL as u32));
    assert_eq!(client.write(64 * MIB - 1, &[1, 2]).unwrap(), libc::ENOSPC as u32);
    client.send(77, 8, 0, 0).unwrap();
    assert_eq!(client.reply().unwrap(), (libc::EINVAL as u32, 8));
    let largest = vec![9; PAYLOAD_BYTES_MAX as usize];
    assert_eq!(client.write(MIB, &largest).unwrap(), 0);
    assert_eq!(client.read(MIB, largest.len()).unwrap(), Ok(largest));

    // A device that fails in one place, panics in another.
    site.server.add("faulty", Arc::new(Faulty)).unwrap();
    let mut client = RawClient::connect(&site.socket(), "faulty").unwrap();
    assert_eq!(client.flags & 2, 2, "read-only");
    assert_eq!(client.read(0, 512).unwrap(), Err(libc::EIO as u32));
    assert_eq!(client.write(0, &[1; 512]).unwrap(), libc::EPERM as u32);
    assert_eq!(client.read(4096, 512).unwrap(), Ok(vec![5; 512]));
    assert!(client.read(8192, 512).is_err(), "its connection ends");
    assert_eq!(site.raw().read(1, 3).unwrap().map(|read| read.len()), Ok(3));
}

struct Faulty;

impl Device for Faulty {
    fn bytes(&self) -> u64 {
        MIB
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        match offset {
            0 => Err(io::Error::from_raw_os_error(libc::EIO)),
            8192 => panic!("a device with a bug"),
            _ => {
                buffer.fill(5);
                Ok(())
            }
        }
    }

    fn extents(&self, _offset: u64, bytes: u64, _limit: usize) -> io::Result<Vec<Run>> {
        Ok(vec![Run { bytes, hole: false }])
    }
}

#[test]
fn what_one_connection_was_answered_all_others_see() {
    let site = Site::new();
    let (mut one, mut two) = (site.raw(), site.raw());
    assert_eq!(one.flags & 1 << 8, 1 << 8, "multi-conn is promised");
    for turn in 0..500u64 {
        let stamp = [(turn % 250) as u8 + 1; 700];
        assert_eq!(one.write(turn * 300, &stamp).unwrap(), 0);
        if turn % 50 == 0 {
            two.send(FLUSH, 1, 0, 0).unwrap();
            assert_eq!(two.reply().unwrap(), (0, 1));
        }
        assert_eq!(two.read(turn * 300, 700).unwrap(), Ok(stamp.to_vec()));
        std::mem::swap(&mut one, &mut two);
    }
}

/// A device whose reads take a while, and which counts how many are on their way.
struct Slow {
    now: std::sync::atomic::AtomicUsize,
    most: std::sync::atomic::AtomicUsize,
}

impl Device for Slow {
    fn bytes(&self) -> u64 {
        MIB
    }

    fn read_at(&self, _offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let now = self.now.fetch_add(1, Ordering::SeqCst) + 1;
        self.most.fetch_max(now, Ordering::SeqCst);
        thread::sleep(Duration::from_millis(5));
        self.now.fetch_sub(1, Ordering::SeqCst);
        buffer.fill(1);
        Ok(())
    }

    fn extents(&self, _offset: u64, bytes: u64, _limit: usize) -> io::Result<Vec<Run>> {
        Ok(vec![Run { bytes, hole: false }])
    }
}

#[test]
fn a_slow_device_has_many_requests_of_a_connection_at_once() {
    const BYTES: usize = 200 << 10;
    let site = Site::new();
    let slow = Arc::new(Slow { now: 0.into(), most: 0.into() });
    site.server.add("slow", slow.clone()).unwrap();
    let mut client = RawClient::connect(&site.socket(), "slow").unwrap();
    for cookie in 0..200 {
        client.send(READ, cookie, 0, BYTES as u32).unwrap();
    }
    let mut seen = std::collections::BTreeSet::new();
    for _ in 0..200 {
        let (error, cookie) = client.reply().unwrap();
        assert_eq!(error, 0);
        let mut data = vec![0; BYTES];
        client.socket.read_exact(&mut data).unwrap();
        assert!(data.iter().all(|byte| *byte == 1), "answers stay in one piece");
        assert!(seen.insert(cookie), "answered once");
    }
    let most = slow.most.load(Ordering::SeqCst);
    assert!(most >= 12, "{most} at once");
}

#[test]
fn a_full_scratch_area_is_the_error_of_who_fills_it() {
    let site = Site::with(None, 4 * MIB);
    let (mut greedy, mut other) = (site.raw(), site.raw());
    let data = vec![3; MIB as usize];
    for part in 0..4 {
        assert_eq!(greedy.write(part * MIB, &data).unwrap(), 0);
    }
    assert_eq!(greedy.write(5 * MIB, &data).unwrap(), libc::ENOSPC as u32);
    assert_eq!(other.read(0, data.len()).unwrap(), Ok(data.clone()));
    assert_eq!(other.write(0, &data).unwrap(), 0, "what is there may be written again");
    assert!(!run("qemu-io", &["-f", "raw", "-c", "write 6M 64k", &site.uri()]).status.success());
}

#[test]
fn stopping_ends_clients_and_removes_the_socket() {
    let site = Site::new();
    let (mut one, mut two) = (site.raw(), site.raw());
    site.server.add("other", Site::base_of(site.dir.path())).unwrap();
    let mut other = RawClient::connect(&site.socket(), "other").unwrap();
    assert!(site.server.add("other", Arc::new(Faulty)).is_err());
    wait_until("both are there", || site.server.connections("disk") == 2);
    assert!(site.server.remove("disk"));
    assert!(one.read(0, 512).is_err() && two.read(0, 512).is_err());
    assert!(RawClient::connect(&site.socket(), "disk").is_err());
    assert!(other.read(0, 512).unwrap().is_ok(), "another export goes on");
    assert!(Server::new(None).unwrap().listen_unix(&site.socket()).is_err(), "it is in use");
    // One too many is closed, not queued.
    let all: Vec<_> = (0..CONNECTIONS_MAX)
        .filter_map(|_| RawClient::connect(&site.socket(), "other").ok())
        .collect();
    assert!(all.len() < CONNECTIONS_MAX && all.len() > CONNECTIONS_MAX - 5, "{}", all.len());
    assert!(site.server.stop());
    assert!(!site.socket().exists());
    assert!(site.server.listen_unix(&site.socket()).is_err() && !site.socket().exists());
    assert!(other.read(0, 512).is_err());
}

#[test]
fn with_certificates_nothing_goes_without_tls() {
    let pki = tempfile::tempdir().unwrap();
    let certificates = Certificates::make(pki.path());
    let pki = pki.path().to_str().unwrap();
    let site = Site::with(Some(certificates.server), u64::MAX);
    let tcp = site.server.listen_tcp("127.0.0.1:0".parse().unwrap()).unwrap();
    assert!(!run("nbdinfo", &[&site.uri()]).status.success(), "in the clear");
    assert!(RawClient::connect(&site.socket(), "disk").is_err());

    let uri = format!("nbds://127.0.0.1:{}/disk?tls-certificates={pki}", tcp.port());
    let told = succeed("nbdinfo", &[&uri]);
    assert!(told.contains("export-size: 67108864") && told.contains("with TLS"), "{told}");
    let (base, copy) = (site.path("base"), site.path("copy"));
    succeed("nbdcopy", &["--connections=2", &uri, &copy]);
    same(&base, &copy);
    let image = site.image("image");
    succeed("nbdcopy", &[&image, &uri]);
    let credentials = format!("tls-creds-x509,id=t,endpoint=client,dir={pki}");
    let options = format!("driver=nbd,host=127.0.0.1,port={},export=disk,tls-creds=t", tcp.port());
    let raw = format!("driver=file,filename={image}");
    succeed("qemu-img", &["compare", "--object", &credentials, "--image-opts", &options, &raw]);
    // Without a certificate of its own a client gets nothing.
    std::fs::remove_file(Path::new(pki).join("client-cert.pem")).unwrap();
    assert!(!run("nbdinfo", &[&uri]).status.success());
}

/// The server as a process of its own: this executable, told to serve.
struct Process(Child);

impl Process {
    fn start(socket: &Path, file: &Path, overlay: &Path) -> Self {
        let words = [socket, file, overlay].map(|path| path.to_str().unwrap()).join(" ");
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--ignored", "--exact", "serve"]).env("SECONDSITE_NBD", words);
        let child = command.stdout(Stdio::null()).spawn().unwrap();
        let process = Self(child);
        wait_until("it listens", || UnixStream::connect(socket).is_ok());
        process
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_killed_server_loses_nothing_that_it_answered() {
    let dir = tempfile::tempdir().unwrap();
    drop(Site::base_of(dir.path()));
    let (socket, base) = (dir.path().join("socket"), dir.path().join("base"));
    let blocks = 64 * MIB / 4096;
    let mut model: Vec<u64> = vec![0; blocks as usize];
    let mut stamp = 0u64;
    for round in 0..if std::env::var_os("SECONDSITE_LONG").is_some() { 60 } else { 4 } {
        let process = Process::start(&socket, &base, dir.path());
        let mut client = RawClient::connect(&socket, "disk").unwrap();
        for (block, stamp) in model.iter().enumerate().filter(|(_, stamp)| **stamp != 0) {
            let read = client.read(block as u64 * 4096 + 1000, 8).unwrap().unwrap();
            assert_eq!(read, stamp.to_le_bytes(), "round {round}, block {block}");
        }
        let killed = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                thread::sleep(Duration::from_millis(40));
                let pid = nix::unistd::Pid::from_raw(process.0.id() as i32);
                killed.store(true, Ordering::SeqCst);
                nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
            });
            loop {
                stamp += 1;
                let block = stamp * 2654435761 % blocks;
                // Less than a block: the rest is filled from the base.
                match client.write(block * 4096 + 1000, &stamp.to_le_bytes()) {
                    Ok(0) => model[block as usize] = stamp,
                    Ok(error) => panic!("error {error}"),
                    Err(_) => {
                        // The one on its way may be there or not.
                        model[block as usize] = 0;
                        break;
                    }
                }
            }
        });
        assert!(killed.load(Ordering::SeqCst) && stamp > 0);
    }
    // Around each stamp the block is as in the base.
    let overlay = Overlay::open(dir.path(), Site::base_of(dir.path()), &OF, u64::MAX).unwrap();
    let plain = FileDevice::open(&base);
    let (mut ours, mut theirs) = ([0; 4096], [0; 4096]);
    for block in 0..blocks {
        overlay.read_at(block * 4096, &mut ours).unwrap();
        plain.read_at(block * 4096, &mut theirs).unwrap();
        let stamp = model[block as usize];
        if stamp != 0 {
            assert_eq!(ours[1000..1008], stamp.to_le_bytes());
        }
        ours[1000..1008].fill(0);
        theirs[1000..1008].fill(0);
        assert!(ours == theirs, "block {block}");
    }
    overlay.zero(0, 64 * MIB, Zeroing::default()).unwrap();
    assert_eq!(overlay.used_bytes(), 0);
}

/// Serves by hand, until it is killed: SECONDSITE_NBD='SOCKET FILE [OVERLAY-FOLDER]'.
#[test]
#[ignore = "serves what SECONDSITE_NBD says until it is killed"]
fn serve() {
    let Ok(words) = std::env::var("SECONDSITE_NBD") else { return };
    let words: Vec<&str> = words.split(' ').collect();
    let mut device: Arc<dyn Device> = Arc::new(FileDevice::open(Path::new(words[1])));
    if let Some(folder) = words.get(2) {
        device = Arc::new(Overlay::open(Path::new(folder), device, &OF, u64::MAX).unwrap());
    }
    let server = Server::new(None).unwrap();
    server.add("disk", device).unwrap();
    server.listen_unix(Path::new(words[0])).unwrap();
    loop {
        thread::park();
    }
}
