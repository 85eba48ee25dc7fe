//! For tests of the NBD server: devices, a client that keeps to nothing, certificates.

use secondsite::nbd::{Device, Run, Zeroing};
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Output};
use std::time::Duration;

/// A raw file.
pub struct FileDevice {
    file: File,
    bytes: u64,
}

impl FileDevice {
    pub fn open(path: &Path) -> Self {
        let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
        let bytes = file.metadata().unwrap().len();
        Self { file, bytes }
    }

    fn fallocate(&self, mode: i32, offset: u64, bytes: u64) -> io::Result<()> {
        let mode = nix::fcntl::FallocateFlags::from_bits_retain(mode);
        Ok(nix::fcntl::fallocate(&self.file, mode, offset as i64, bytes as i64)?)
    }
}

impl Device for FileDevice {
    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(buffer, offset)
    }

    fn extents(&self, offset: u64, bytes: u64, limit: usize) -> io::Result<Vec<Run>> {
        use nix::unistd::Whence::{SeekData, SeekHole};
        let end = offset + bytes;
        let seek = |at: u64, whence| match nix::unistd::lseek(&self.file, at as i64, whence) {
            Ok(found) => Ok((found as u64).min(end)),
            Err(nix::errno::Errno::ENXIO) => Ok(end),
            Err(error) => Err(io::Error::from(error)),
        };
        let (mut at, mut runs) = (offset, Vec::new());
        while at < end && runs.len() < limit {
            let data = seek(at, SeekData)?;
            let (next, hole) = if data > at { (data, true) } else { (seek(at, SeekHole)?, false) };
            runs.push(Run { bytes: next - at, hole });
            at = next;
        }
        Ok(runs)
    }

    fn read_only(&self) -> bool {
        false
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.file.write_all_at(data, offset)
    }

    fn zero(&self, offset: u64, bytes: u64, how: Zeroing) -> io::Result<()> {
        let punch = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        self.fallocate(if how.no_hole { libc::FALLOC_FL_ZERO_RANGE } else { punch }, offset, bytes)
    }

    fn trim(&self, offset: u64, bytes: u64) -> io::Result<()> {
        self.zero(offset, bytes, Zeroing::default())
    }

    fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }
}

/// A client that says what it is told to: simple replies, no checks.
pub struct RawClient {
    pub socket: UnixStream,
    /// What the server said of the export.
    pub flags: u16,
    /// Of the requests that follow.
    pub command_flags: u16,
}

pub const READ: u16 = 0;
pub const WRITE: u16 = 1;
pub const FLUSH: u16 = 3;
/// A flag.
pub const FUA: u16 = 1;

impl RawClient {
    /// Past the handshake, by the oldest way.
    pub fn connect(path: &Path, export: &str) -> io::Result<Self> {
        let mut socket = UnixStream::connect(path)?;
        socket.set_read_timeout(Some(Duration::from_secs(30)))?;
        socket.set_write_timeout(Some(Duration::from_secs(30)))?;
        socket.read_exact(&mut [0; 18])?;
        let mut hello = 3u32.to_be_bytes().to_vec();
        hello.extend(b"IHAVEOPT");
        hello.extend(1u32.to_be_bytes());
        hello.extend((export.len() as u32).to_be_bytes());
        hello.extend(export.as_bytes());
        socket.write_all(&hello)?;
        let mut export = [0; 10];
        socket.read_exact(&mut export)?;
        Ok(Self { socket, flags: u16::from_be_bytes([export[8], export[9]]), command_flags: 0 })
    }

    pub fn send(&mut self, kind: u16, cookie: u64, offset: u64, bytes: u32) -> io::Result<()> {
        let mut request = 0x2560_9513u32.to_be_bytes().to_vec();
        request.extend(self.command_flags.to_be_bytes());
        request.extend(kind.to_be_bytes());
        request.extend(cookie.to_be_bytes());
        request.extend(offset.to_be_bytes());
        request.extend(bytes.to_be_bytes());
        self.socket.write_all(&request)
    }

    /// Error number and cookie of the next reply; data is still to be read.
    pub fn reply(&mut self) -> io::Result<(u32, u64)> {
        let mut reply = [0; 16];
        self.socket.read_exact(&mut reply)?;
        let number = |at: usize| u32::from_be_bytes(reply[at..at + 4].try_into().unwrap());
        assert_eq!(number(0), 0x6744_6698);
        Ok((number(4), u64::from(number(8)) << 32 | u64::from(number(12))))
    }

    pub fn write(&mut self, offset: u64, data: &[u8]) -> io::Result<u32> {
        self.send(WRITE, offset, offset, data.len() as u32)?;
        self.socket.write_all(data)?;
        self.reply().map(|(error, _)| error)
    }

    pub fn read(&mut self, offset: u64, bytes: usize) -> io::Result<Result<Vec<u8>, u32>> {
        self.send(READ, offset, offset, bytes as u32)?;
        let (error, _) = self.reply()?;
        if error != 0 {
            return Ok(Err(error));
        }
        let mut data = vec![0; bytes];
        self.socket.read_exact(&mut data)?;
        Ok(Ok(data))
    }
}

/// Runs a client; it has a minute.
pub fn run(program: &str, arguments: &[&str]) -> Output {
    let mut all = vec!["-k", "5", "60", program];
    all.extend(arguments);
    Command::new("timeout").args(all).output().unwrap()
}

/// Runs a client that must succeed; what it said on stdout.
pub fn succeed(program: &str, arguments: &[&str]) -> String {
    let output = run(program, arguments);
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {}\n{said}{errors}", output.status);
    said
}

/// An authority, and what it signed for both sides, as files for clients of gnutls.
pub struct Certificates {
    pub server: std::sync::Arc<rustls::ServerConfig>,
}

impl Certificates {
    pub fn make(folder: &Path) -> Self {
        use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, KeyUsagePurpose};
        use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
        let authority_key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec!["authority".to_owned()]).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
        let authority = params.self_signed(&authority_key).unwrap();
        let issuer = Issuer::new(params, &authority_key);
        let signed = |names: &[&str]| {
            let key = KeyPair::generate().unwrap();
            let names: Vec<String> = names.iter().map(|&name| name.into()).collect();
            let params = CertificateParams::new(names).unwrap();
            (params.signed_by(&key, &issuer).unwrap(), key)
        };
        let (server, server_key) = signed(&["localhost", "127.0.0.1"]);
        let (client, client_key) = signed(&["client"]);
        std::fs::write(folder.join("ca-cert.pem"), authority.pem()).unwrap();
        std::fs::write(folder.join("client-cert.pem"), client.pem()).unwrap();
        std::fs::write(folder.join("client-key.pem"), client_key.serialize_pem()).unwrap();
        let mut roots = rustls::RootCertStore::empty();
        roots.add(authority.der().clone()).unwrap();
        let provider = std::sync::Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let verifier = rustls::server::WebPkiClientVerifier::builder_with_provider(
            std::sync::Arc::new(roots),
            provider.clone(),
        );
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(server_key.serialize_der()));
        let config = rustls::ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_client_cert_verifier(verifier.build().unwrap())
            .with_single_cert(vec![server.der().clone()], key)
            .unwrap();
        Self { server: std::sync::Arc::new(config) }
    }
}
