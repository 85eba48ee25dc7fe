//! Keys and certificates as files, who a peer is, and the TLS settings that follow from them.
//!
//! TLS 1.3 only, aws-lc only, no 0-RTT, no tickets. A certificate's role and identity stand in one
//! URI SAN (`secondsite:agent:ID`, `secondsite:target:ID`, `secondsite:operator:NAME`,
//! `secondsite:control`); server certificates also carry the DNS name `control.secondsite.internal`
//! or `target.secondsite.internal`, which clients check whatever the address, besides the role.

use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Who a certificate says its holder is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Role {
    /// The agent of a server, by server id (32 hex digits).
    Agent(String),
    /// A target, by its id.
    Target(String),
    /// A person with the role admin, by name.
    Operator(String),
    /// The control server.
    Control,
}

/// A key with its certificate and the authority, as `NAME.key`, `NAME.pem` and `ca.pem` in a
/// folder (`CONFIG_DIR/pki`). Keys have mode 0600.
pub struct Identity {
    /// Who this certificate says we are.
    pub role: Role,
    /// Where it came from.
    pub dir: PathBuf,
}

impl Identity {
    /// Reads `NAME.key`, `NAME.pem` and `ca.pem`.
    pub fn load(dir: &Path, name: &str) -> anyhow::Result<Self> {
        let _ = (dir, name);
        todo!()
    }

    /// For dialling out: checks the peer's chain against the authority and its DNS name against
    /// `control.secondsite.internal` or `target.secondsite.internal`; presents our certificate.
    pub fn client_config(&self) -> anyhow::Result<Arc<rustls::ClientConfig>> {
        todo!()
    }

    /// For listening; a client certificate of this deployment is required, or (`false`) optional.
    pub fn server_config(
        &self,
        client_required: bool,
    ) -> anyhow::Result<Arc<rustls::ServerConfig>> {
        let _ = client_required;
        todo!()
    }

    /// The public key of our certificate, an uncompressed P-256 point.
    pub fn public_key(&self) -> [u8; 65] {
        todo!()
    }

    /// ECDSA P-256 / SHA-256 over `bytes` with our key, fixed 64-byte form.
    pub fn sign(&self, bytes: &[u8]) -> anyhow::Result<[u8; 64]> {
        let _ = bytes;
        todo!()
    }
}

/// Checks what [`Identity::sign`] made.
pub fn verify_signature(public_key: &[u8; 65], bytes: &[u8], signature: &[u8; 64]) -> bool {
    let _ = (public_key, bytes, signature);
    todo!()
}

/// Role and public key of a peer, from the certificates that TLS has already checked.
pub fn peer(
    certificates: &[rustls::pki_types::CertificateDer<'_>],
) -> anyhow::Result<(Role, [u8; 65])> {
    let _ = certificates;
    todo!()
}
