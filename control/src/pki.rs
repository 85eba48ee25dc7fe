//! Keys and certificates as files, who a peer is, and the TLS settings that follow from them.
//!
//! TLS 1.3 only, aws-lc only, no 0-RTT, no tickets. A certificate's role and identity stand in one
//! URI SAN (`secondsite:agent:ID`, `secondsite:target:ID`, `secondsite:operator:NAME`,
//! `secondsite:control`); server certificates also carry the DNS name `control.secondsite.internal`
//! or `target.secondsite.internal`, which clients check whatever the address, besides the role.

use crate::certificate::{CertificateInfo, hex, unhex};
use crate::clock::{Clock, SystemClock};
use crate::files;
use crate::tls::{self, Own, Trust};
use anyhow::{Context, bail, ensure};
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_FIXED, ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair,
    UnparsedPublicKey,
};
use jiff::Timestamp;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use std::fmt;
use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

pub use crate::certificate::{Role, is_id, is_name, renewal_due};

/// The DNS name that control's certificate carries.
pub const CONTROL_DNS_NAME: &str = "control.secondsite.internal";
/// The DNS name that a target's certificate carries.
pub const TARGET_DNS_NAME: &str = "target.secondsite.internal";
/// File of the authority's certificate.
const AUTHORITY_FILE: &str = "ca.pem";

/// SHA-256 of the authority's certificate; written `SHA256:` and 64 hex digits.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Fingerprint(pub [u8; 32]);

impl Fingerprint {
    /// Of a certificate.
    pub fn of(certificate: &CertificateDer<'_>) -> Self {
        let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, certificate);
        Self(digest.as_ref().try_into().expect("SHA-256 has 32 bytes"))
    }

    /// Of a certificate in PEM.
    pub fn of_pem(pem: &str) -> anyhow::Result<Self> {
        Ok(Self::of(&CertificateDer::from_pem_slice(pem.as_bytes()).context("certificate")?))
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "SHA256:{}", hex(&self.0))
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, out)
    }
}

impl FromStr for Fingerprint {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Self> {
        text.strip_prefix("SHA256:")
            .and_then(unhex)
            .map(Self)
            .with_context(|| format!("{text:?} is not SHA256: and 64 hex digits"))
    }
}

/// A key with its certificate and the authority, as `NAME.key`, `NAME.pem` and `ca.pem` in a
/// folder (`CONFIG_DIR/pki`). Keys have mode 0600.
pub struct Identity {
    /// Who this certificate says we are.
    pub role: Role,
    /// Where it came from.
    pub dir: PathBuf,
    name: String,
    info: CertificateInfo,
    certificate: CertificateDer<'static>,
    authority: CertificateDer<'static>,
    key: PrivatePkcs8KeyDer<'static>,
    signer: EcdsaKeyPair,
}

impl fmt::Debug for Identity {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "Identity({}, {})", self.role, self.dir.join(&self.name).display())
    }
}

impl Identity {
    /// Reads `NAME.key`, `NAME.pem` and `ca.pem`.
    pub fn load(dir: &Path, name: &str) -> anyhow::Result<Self> {
        // Shared with other readers, not with an `install` that is half way.
        let folder = File::open(dir).with_context(|| format!("open {}", dir.display()))?;
        folder.lock_shared().with_context(|| format!("lock {}", dir.display()))?;
        let key_path = dir.join(format!("{name}.key"));
        let certificate_path = dir.join(format!("{name}.pem"));
        let key = read_key(&key_path)?;
        let signer =
            EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, key.secret_pkcs8_der())
                .map_err(|error| anyhow::anyhow!("{}: {error}", key_path.display()))?;
        // An `install` that was killed between its two renames left the key's certificate beside.
        for path in [certificate_path.clone(), files::staged(&certificate_path)] {
            if !path.exists() {
                continue;
            }
            let certificate = read_certificate(&path)?;
            let info = CertificateInfo::read(&certificate)
                .with_context(|| format!("{}", path.display()))?;
            if info.public_key == signer.public_key().as_ref() {
                let authority = read_certificate(&dir.join(AUTHORITY_FILE))?;
                return Ok(Self {
                    role: info.role.clone(),
                    dir: dir.to_owned(),
                    name: name.to_owned(),
                    info,
                    certificate,
                    authority,
                    key,
                    signer,
                });
            }
        }
        ensure!(certificate_path.exists(), "{} is missing", certificate_path.display());
        bail!("{} and {} do not belong together", key_path.display(), certificate_path.display());
    }

    /// For dialling out: checks the peer's chain against the authority and its DNS name against
    /// `control.secondsite.internal` or `target.secondsite.internal`; presents our certificate.
    pub fn client_config(&self) -> anyhow::Result<Arc<rustls::ClientConfig>> {
        self.client_config_at(Arc::new(SystemClock))
    }

    /// [`Self::client_config`] by another clock.
    pub fn client_config_at(
        &self,
        clock: Arc<dyn Clock>,
    ) -> anyhow::Result<Arc<rustls::ClientConfig>> {
        tls::client_config(Trust::Authority(&self.authority), Some(self.own()), clock)
    }

    /// For listening; a client certificate of this deployment is required, or (`false`) optional.
    pub fn server_config(
        &self,
        client_required: bool,
    ) -> anyhow::Result<Arc<rustls::ServerConfig>> {
        self.server_config_at(client_required, Arc::new(SystemClock))
    }

    /// [`Self::server_config`] by another clock.
    pub fn server_config_at(
        &self,
        client_required: bool,
        clock: Arc<dyn Clock>,
    ) -> anyhow::Result<Arc<rustls::ServerConfig>> {
        tls::server_config(&self.authority, self.own(), client_required, clock)
    }

    /// The public key of our certificate, an uncompressed P-256 point.
    pub fn public_key(&self) -> [u8; 65] {
        self.info.public_key
    }

    /// ECDSA P-256 / SHA-256 over `bytes` with our key, fixed 64-byte form.
    pub fn sign(&self, bytes: &[u8]) -> anyhow::Result<[u8; 64]> {
        let signature = self
            .signer
            .sign(&SystemRandom::new(), bytes)
            .map_err(|error| anyhow::anyhow!("sign as {}: {error}", self.role))?;
        Ok(signature.as_ref().try_into()?)
    }

    /// From when on our certificate is good.
    pub fn not_before(&self) -> Timestamp {
        self.info.not_before
    }

    /// When our certificate ends.
    pub fn not_after(&self) -> Timestamp {
        self.info.not_after
    }

    /// Whether our certificate is to be renewed now.
    pub fn renewal_due(&self, now: Timestamp) -> bool {
        renewal_due(self.info.not_before, self.info.not_after, now)
    }

    /// Serial number of our certificate, hex.
    pub fn serial(&self) -> &str {
        &self.info.serial
    }

    /// The authority's fingerprint.
    pub fn authority_fingerprint(&self) -> Fingerprint {
        Fingerprint::of(&self.authority)
    }

    /// The authority goes along in the chain, so that one who only knows its digest can check it.
    fn own(&self) -> Own {
        Own {
            chain: vec![self.certificate.clone(), self.authority.clone()],
            key: PrivateKeyDer::Pkcs8(self.key.clone_key()),
        }
    }
}

/// Checks what [`Identity::sign`] made.
pub fn verify_signature(public_key: &[u8; 65], bytes: &[u8], signature: &[u8; 64]) -> bool {
    UnparsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, public_key).verify(bytes, signature).is_ok()
}

/// Role and public key of a peer, from the certificates that TLS has already checked.
pub fn peer(certificates: &[CertificateDer<'_>]) -> anyhow::Result<(Role, [u8; 65])> {
    let info = peer_info(certificates)?;
    Ok((info.role, info.public_key))
}

/// All that a peer's certificate says, from the certificates that TLS has already checked.
pub fn peer_info(certificates: &[CertificateDer<'_>]) -> anyhow::Result<CertificateInfo> {
    let first = certificates.first().context("the peer showed no certificate")?;
    Ok(CertificateInfo::read(first)?)
}

/// For dialling control before one has a certificate: believes only an authority with this digest,
/// which control sends along, and what it signed.
pub fn client_config_pinned(
    fingerprint: &Fingerprint,
) -> anyhow::Result<Arc<rustls::ClientConfig>> {
    tls::client_config(Trust::Pinned(*fingerprint), None, Arc::new(SystemClock))
}

/// A fresh key and a certificate request for it, both PEM. The key stays where it was made; names
/// are given by the authority, not by the request.
pub fn new_request() -> anyhow::Result<(String, String)> {
    let key = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?;
    let mut params = rcgen::CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    let request = params.serialize_request(&key)?.pem()?;
    Ok((key.serialize_pem(), request))
}

/// Puts a key, its certificate and the authority in place as `NAME.key`, `NAME.pem`, `ca.pem`:
/// durably, and so that a crash at any instant leaves the old pair or the new one.
pub fn install(
    dir: &Path,
    name: &str,
    key_pem: &str,
    certificate_pem: &str,
    authority_pem: &str,
) -> anyhow::Result<()> {
    files::create_dir(dir)?;
    let folder = File::open(dir).with_context(|| format!("open {}", dir.display()))?;
    folder.lock().with_context(|| format!("lock {}", dir.display()))?;
    let key = dir.join(format!("{name}.key"));
    let certificate = dir.join(format!("{name}.pem"));
    let authority = dir.join(AUTHORITY_FILE);
    // It may be another user's: who renews its own certificate need not be able to replace it.
    if fs::read(&authority).ok().as_deref() != Some(authority_pem.as_bytes()) {
        files::write(&authority, authority_pem.as_bytes(), files::PUBLIC_MODE)?;
    }
    // The certificate is durable beside before the key changes: `load` finds it there if the
    // second rename never happens.
    files::stage(&certificate, certificate_pem.as_bytes(), files::PUBLIC_MODE)?;
    files::write(&key, key_pem.as_bytes(), files::SECRET_MODE)?;
    files::publish(&certificate)
}

fn read_key(path: &Path) -> anyhow::Result<PrivatePkcs8KeyDer<'static>> {
    let metadata = fs::metadata(path).with_context(|| format!("read {}", path.display()))?;
    let mode = metadata.permissions().mode() & 0o777;
    ensure!(
        mode & 0o077 == 0,
        "{}: others can read this key (mode {mode:04o}); type: chmod 600 {}",
        path.display(),
        path.display()
    );
    PrivatePkcs8KeyDer::from_pem_file(path).with_context(|| format!("read {}", path.display()))
}

fn read_certificate(path: &Path) -> anyhow::Result<CertificateDer<'static>> {
    CertificateDer::from_pem_file(path).with_context(|| format!("read {}", path.display()))
}

#[cfg(test)]
#[path = "pki_tests.rs"]
mod tests;
