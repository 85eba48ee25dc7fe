//! TLS settings: TLS 1.3 only, aws-lc only, no 0-RTT, no tickets, and who is believed.
//!
//! A server proves two things: that its chain leads to the authority (our own, or at `join` the one
//! whose digest the token carries), and that its certificate has the role that belongs to the DNS
//! name it was dialled by. An agent's certificate never passes for a server's.

use crate::certificate::{CertificateInfo, Role};
use crate::clock::{Clock, TlsTime};
use crate::pki::{CONTROL_DNS_NAME, Fingerprint, TARGET_DNS_NAME};
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::{
    ClientConfig, DigitallySignedStruct, Error, OtherError, RootCertStore, ServerConfig,
    SignatureScheme,
};
use std::sync::Arc;

/// Certificates of a peer's chain that are looked at.
const CHAIN_CERTIFICATES_MAX: usize = 4;

/// Our own chain and key.
pub(crate) struct Own {
    pub(crate) chain: Vec<CertificateDer<'static>>,
    pub(crate) key: PrivateKeyDer<'static>,
}

/// Whom a client believes.
pub(crate) enum Trust<'a> {
    /// This authority.
    Authority(&'a CertificateDer<'static>),
    /// Whatever authority the server sends, if it has this digest.
    Pinned(Fingerprint),
}

/// Settings of one that dials out.
pub(crate) fn client_config(
    trust: Trust<'_>,
    own: Option<Own>,
    clock: Arc<dyn Clock>,
) -> anyhow::Result<Arc<ClientConfig>> {
    let trust = match trust {
        Trust::Authority(authority) => Believed::Authority(verifier(authority)?),
        Trust::Pinned(fingerprint) => Believed::Pinned(fingerprint),
    };
    let builder = ClientConfig::builder_with_details(provider(), Arc::new(TlsTime(clock)))
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(ServerVerifier { trust }));
    let mut config = match own {
        Some(own) => builder.with_client_auth_cert(own.chain, own.key)?,
        None => builder.with_no_client_auth(),
    };
    config.resumption = rustls::client::Resumption::disabled();
    config.enable_early_data = false;
    Ok(Arc::new(config))
}

/// Settings of one that listens.
pub(crate) fn server_config(
    authority: &CertificateDer<'static>,
    own: Own,
    client_required: bool,
    clock: Arc<dyn Clock>,
) -> anyhow::Result<Arc<ServerConfig>> {
    let mut clients = WebPkiClientVerifier::builder_with_provider(roots(authority)?, provider());
    if !client_required {
        clients = clients.allow_unauthenticated();
    }
    let mut config = ServerConfig::builder_with_details(provider(), Arc::new(TlsTime(clock)))
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(clients.build()?)
        .with_single_cert(own.chain, own.key)?;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    config.max_early_data_size = 0;
    Ok(Arc::new(config))
}

/// The one provider, never the process's default.
fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::aws_lc_rs::default_provider())
}

fn roots(authority: &CertificateDer<'_>) -> Result<Arc<RootCertStore>, Error> {
    let mut roots = RootCertStore::empty();
    roots.add(authority.clone().into_owned())?;
    Ok(Arc::new(roots))
}

fn verifier(authority: &CertificateDer<'_>) -> Result<Arc<WebPkiServerVerifier>, Error> {
    WebPkiServerVerifier::builder_with_provider(roots(authority)?, provider())
        .build()
        .map_err(|error| Error::General(error.to_string()))
}

#[derive(Debug)]
enum Believed {
    Authority(Arc<WebPkiServerVerifier>),
    Pinned(Fingerprint),
}

#[derive(Debug)]
struct ServerVerifier {
    trust: Believed,
}

/// Why a server is not believed although its certificate may be sound.
#[derive(Debug, thiserror::Error)]
enum Disbelief {
    #[error("the server shows no authority with the digest {0} that the token carries")]
    OtherAuthority(Fingerprint),
    #[error("a certificate of the role {found} was shown where {expected} was dialled")]
    OtherRole { found: Role, expected: &'static str },
    #[error(transparent)]
    Unreadable(#[from] crate::certificate::CertificateError),
}

impl From<Disbelief> for Error {
    fn from(disbelief: Disbelief) -> Self {
        Error::Other(OtherError(Arc::new(disbelief)))
    }
}

impl ServerCertVerifier for ServerVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let verifier = match &self.trust {
            Believed::Authority(verifier) => verifier.clone(),
            Believed::Pinned(fingerprint) => {
                let authority = intermediates
                    .iter()
                    .take(CHAIN_CERTIFICATES_MAX)
                    .find(|certificate| Fingerprint::of(certificate) == *fingerprint)
                    .ok_or(Disbelief::OtherAuthority(*fingerprint))?;
                verifier(authority)?
            }
        };
        let verified = verifier.verify_server_cert(
            end_entity,
            intermediates,
            server_name,
            ocsp_response,
            now,
        )?;
        check_role(end_entity, server_name)?;
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::General("TLS 1.2 is never spoken".to_owned()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = provider().signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, certificate, signature, &algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        provider().signature_verification_algorithms.supported_schemes()
    }
}

/// The DNS name is one of two, and each belongs to one role.
fn check_role(certificate: &CertificateDer<'_>, name: &ServerName<'_>) -> Result<(), Disbelief> {
    let found = CertificateInfo::read(certificate)?.role;
    let name = match name {
        ServerName::DnsName(name) => name.as_ref(),
        _ => "",
    };
    match (&found, name) {
        (Role::Control, CONTROL_DNS_NAME) | (Role::Target(_), TARGET_DNS_NAME) => Ok(()),
        (_, CONTROL_DNS_NAME) => Err(Disbelief::OtherRole { found, expected: "control" }),
        (_, TARGET_DNS_NAME) => Err(Disbelief::OtherRole { found, expected: "a target" }),
        _ => Err(Disbelief::OtherRole { found, expected: "no server of ours" }),
    }
}
