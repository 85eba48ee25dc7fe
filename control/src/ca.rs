//! The deployment's certificate authority: one P-256 key, which never leaves control's host.
//!
//! A certificate says what the authority decided, never what its request asked for: the request
//! gives only the key. Certificates live [`CERTIFICATE_LIFE_MAX`] at most. Only control uses this.

use crate::certificate::{CertificateInfo, Role};
use crate::clock::Clock;
use crate::files;
use crate::pki::{CONTROL_DNS_NAME, Fingerprint, TARGET_DNS_NAME};
use anyhow::{Context, ensure};
use jiff::Timestamp;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName,
    DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, SanType, SerialNumber,
};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;

/// Longest life of a certificate.
pub const CERTIFICATE_LIFE_MAX: Duration = Duration::from_hours(30 * 24);
/// Life of the authority itself.
const AUTHORITY_LIFE: Duration = Duration::from_hours(20 * 365 * 24);
/// Certificates begin this share of their life, at most [`BACKDATE_MAX`], before they are made: the
/// clock of the one who gets it may be slow.
const BACKDATE_SHARE: u32 = 10;
const BACKDATE_MAX: Duration = Duration::from_hours(1);
/// Random bytes of a serial number.
const SERIAL_BYTES: usize = 16;
const KEY_FILE: &str = "ca.key";
const CERTIFICATE_FILE: &str = "ca.pem";

/// The authority, with its key.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    certificate_pem: String,
    certificate: CertificateDer<'static>,
    life: Duration,
}

/// A certificate that was just made.
#[derive(Debug, Clone)]
pub struct Issued {
    /// The certificate, PEM.
    pub certificate_pem: String,
    /// What stands in it.
    pub info: CertificateInfo,
}

impl Authority {
    /// Makes a new authority in `dir` (`ca.key`, `ca.pem`). Refuses where one is.
    pub fn create(dir: &Path, clock: &dyn Clock) -> anyhow::Result<Self> {
        files::create_dir(dir)?;
        let key_path = dir.join(KEY_FILE);
        ensure!(!key_path.exists(), "{} is there already", key_path.display());
        let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?;
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, "Secondsite authority");
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let epoch = rcgen::date_time_ymd(1970, 1, 1);
        let begin = clock.now() - BACKDATE_MAX;
        params.not_before = epoch + since_epoch(begin);
        params.not_after = epoch + since_epoch(begin + AUTHORITY_LIFE);
        let certificate = params.self_signed(&key)?;
        files::write(&key_path, key.serialize_pem().as_bytes(), files::SECRET_MODE)?;
        let pem_path = dir.join(CERTIFICATE_FILE);
        files::write(&pem_path, certificate.pem().as_bytes(), files::PUBLIC_MODE)?;
        Self::load(dir, CERTIFICATE_LIFE_MAX)
    }

    /// Whether `dir` has an authority, whole.
    pub(crate) fn exists(dir: &Path) -> bool {
        dir.join(KEY_FILE).exists() && dir.join(CERTIFICATE_FILE).exists()
    }

    /// Reads the authority from `dir`. What it signs lives `life`.
    pub fn load(dir: &Path, life: Duration) -> anyhow::Result<Self> {
        ensure!(
            !life.is_zero() && life <= CERTIFICATE_LIFE_MAX,
            "a certificate lives 30 days at most, and more than nothing"
        );
        let read = |name| {
            let path = dir.join(name);
            std::fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))
        };
        let key = KeyPair::from_pem(&read(KEY_FILE)?)
            .with_context(|| format!("read {}", dir.join(KEY_FILE).display()))?;
        let certificate_pem = read(CERTIFICATE_FILE)?;
        let certificate = CertificateDer::from_pem_slice(certificate_pem.as_bytes())
            .with_context(|| format!("read {}", dir.join(CERTIFICATE_FILE).display()))?;
        let issuer = Issuer::from_ca_cert_der(&certificate, key)?;
        Ok(Self { issuer, certificate_pem, certificate, life })
    }

    /// The authority's certificate, PEM.
    pub fn certificate_pem(&self) -> &str {
        &self.certificate_pem
    }

    /// What tokens carry and people compare.
    pub fn fingerprint(&self) -> Fingerprint {
        Fingerprint::of(&self.certificate)
    }

    /// Signs the key of a request for `role`. Names in the request are ignored; `hosts` are further
    /// names and addresses of control itself, for browsers.
    pub fn sign(
        &self,
        request_pem: &str,
        role: &Role,
        hosts: &[String],
        now: Timestamp,
    ) -> anyhow::Result<Issued> {
        let request = CertificateSigningRequestParams::from_pem(request_pem)
            .context("the certificate request cannot be read")?;
        ensure!(
            request.public_key.algorithm() == &rcgen::PKCS_ECDSA_P256_SHA256,
            "the certificate request's key is not an ECDSA P-256 key"
        );
        let params = self.params(role, hosts, now)?;
        let certificate = params.signed_by(&request.public_key, &self.issuer)?;
        let info = CertificateInfo::read(certificate.der())?;
        Ok(Issued { certificate_pem: certificate.pem(), info })
    }

    fn params(
        &self,
        role: &Role,
        hosts: &[String],
        now: Timestamp,
    ) -> anyhow::Result<CertificateParams> {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, role.to_string());
        params.subject_alt_names = vec![SanType::URI(role.to_string().try_into()?)];
        for host in hosts {
            params.subject_alt_names.push(match host.parse::<IpAddr>() {
                Ok(address) => SanType::IpAddress(address),
                Err(_) => SanType::DnsName(host.as_str().try_into()?),
            });
        }
        let mut serve = |name: &str| -> anyhow::Result<()> {
            params.subject_alt_names.push(SanType::DnsName(name.try_into()?));
            params.extended_key_usages.push(ExtendedKeyUsagePurpose::ServerAuth);
            Ok(())
        };
        match role {
            Role::Control => serve(CONTROL_DNS_NAME)?,
            Role::Target(_) => serve(TARGET_DNS_NAME)?,
            Role::Agent(_) | Role::Operator(_) => {}
        }
        // Control never dials out.
        if *role != Role::Control {
            params.extended_key_usages.push(ExtendedKeyUsagePurpose::ClientAuth);
        }
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.is_ca = IsCa::ExplicitNoCa;
        params.serial_number = Some(serial()?);
        params.use_authority_key_identifier_extension = true;
        let epoch = rcgen::date_time_ymd(1970, 1, 1);
        let begin = now - (self.life / BACKDATE_SHARE).min(BACKDATE_MAX);
        params.not_before = epoch + since_epoch(begin);
        params.not_after = epoch + since_epoch(begin + self.life);
        Ok(params)
    }
}

/// Positive and without leading zeros, so that it is written as it is read.
fn serial() -> anyhow::Result<SerialNumber> {
    let mut bytes = [0; SERIAL_BYTES];
    getrandom::fill(&mut bytes).context("random bytes")?;
    bytes[0] = (bytes[0] & 0x7f) | 0x40;
    Ok(SerialNumber::from_slice(&bytes))
}

fn since_epoch(time: Timestamp) -> Duration {
    Duration::from_secs(u64::try_from(time.as_second()).expect("a time after 1970"))
}
