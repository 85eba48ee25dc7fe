//! Reading a certificate of this deployment: who holds it, its key, its serial number, its life.
//!
//! Nothing here decides whether a certificate may be trusted; TLS checks the chain before.

use jiff::Timestamp;
use std::fmt;
use std::str::FromStr;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

/// Bytes of an uncompressed P-256 point.
pub const PUBLIC_KEY_BYTES: usize = 65;
/// The scheme of the URI that names role and identity.
const URI_SCHEME: &str = "secondsite:";
/// Longest name of a server, an operator or a volume's owner.
const NAME_CHARS_MAX: usize = 64;
/// Hex digits of an id.
const ID_CHARS: usize = 32;

/// Why a certificate, a key or a file of them is of no use.
#[derive(Debug, thiserror::Error)]
pub enum CertificateError {
    /// It is not an X.509 certificate.
    #[error("the certificate cannot be read")]
    Malformed,
    /// No or several URIs of ours, or one of an unknown role.
    #[error("the certificate names no role of Secondsite")]
    Role,
    /// Another key than ECDSA P-256.
    #[error("the certificate's key is not an ECDSA P-256 key")]
    Key,
}

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

impl fmt::Display for Role {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Role::Agent(id) => write!(out, "{URI_SCHEME}agent:{id}"),
            Role::Target(id) => write!(out, "{URI_SCHEME}target:{id}"),
            Role::Operator(name) => write!(out, "{URI_SCHEME}operator:{name}"),
            Role::Control => write!(out, "{URI_SCHEME}control"),
        }
    }
}

impl FromStr for Role {
    type Err = CertificateError;

    fn from_str(uri: &str) -> Result<Self, Self::Err> {
        let rest = uri.strip_prefix(URI_SCHEME).ok_or(CertificateError::Role)?;
        match rest.split_once(':') {
            None if rest == "control" => Ok(Role::Control),
            Some(("agent", id)) if is_id(id) => Ok(Role::Agent(id.to_owned())),
            Some(("target", id)) if is_id(id) => Ok(Role::Target(id.to_owned())),
            Some(("operator", name)) if is_name(name) => Ok(Role::Operator(name.to_owned())),
            _ => Err(CertificateError::Role),
        }
    }
}

/// Whether this may be the name of a server or a person: `[A-Za-z0-9._-]{1,64}`.
pub fn is_name(name: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    (1..=NAME_CHARS_MAX).contains(&name.len()) && name.bytes().all(allowed)
}

/// Whether this is an id: 32 lower-case hex digits.
pub fn is_id(id: &str) -> bool {
    id.len() == ID_CHARS && id.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
}

/// What stands in a certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CertificateInfo {
    /// Who holds it.
    pub role: Role,
    /// Its key, an uncompressed P-256 point.
    pub public_key: [u8; PUBLIC_KEY_BYTES],
    /// Its serial number, hex.
    pub serial: String,
    /// From when on it is good.
    pub not_before: Timestamp,
    /// Until when it is good.
    pub not_after: Timestamp,
}

impl CertificateInfo {
    /// Reads a certificate. It says what is written there, not whether that is true.
    pub fn read(der: &[u8]) -> Result<Self, CertificateError> {
        let malformed = |_| CertificateError::Malformed;
        let (rest, certificate) =
            X509Certificate::from_der(der).map_err(|_| CertificateError::Malformed)?;
        if !rest.is_empty() {
            return Err(CertificateError::Malformed);
        }
        let validity = certificate.validity();
        let seconds = |time: i64| Timestamp::from_second(time).map_err(malformed);
        Ok(Self {
            role: role(&certificate)?,
            public_key: certificate
                .public_key()
                .subject_public_key
                .data
                .as_ref()
                .try_into()
                .map_err(|_| CertificateError::Key)?,
            serial: hex(certificate.raw_serial()),
            not_before: seconds(validity.not_before.timestamp())?,
            not_after: seconds(validity.not_after.timestamp())?,
        })
    }
}

/// Whether a certificate of this life is to be renewed: from a third of its life on.
pub fn renewal_due(not_before: Timestamp, not_after: Timestamp, now: Timestamp) -> bool {
    let life = not_after.as_second() - not_before.as_second();
    now.as_second() >= not_before.as_second() + life / 3
}

/// Lower-case hex digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(2 * bytes.len()), |mut text, byte| {
        text.push_str(&format!("{byte:02x}"));
        text
    })
}

/// Reads hex digits of exactly `N` bytes.
pub(crate) fn unhex<const N: usize>(text: &str) -> Option<[u8; N]> {
    if text.len() != 2 * N || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    let mut bytes = [0; N];
    for (index, byte) in bytes.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&text[2 * index..2 * index + 2], 16).ok()?;
    }
    Some(bytes)
}

/// The one URI of ours; two would leave open which one counts.
fn role(certificate: &X509Certificate<'_>) -> Result<Role, CertificateError> {
    let names = certificate
        .subject_alternative_name()
        .map_err(|_| CertificateError::Malformed)?
        .ok_or(CertificateError::Role)?;
    let mut uris = names.value.general_names.iter().filter_map(|name| match name {
        GeneralName::URI(uri) => Some(*uri),
        _ => None,
    });
    match (uris.next(), uris.next()) {
        (Some(uri), None) => uri.parse(),
        _ => Err(CertificateError::Role),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn roles_are_read_as_they_are_written_and_nothing_else_is() {
        let id = "0123456789abcdef0123456789abcdef".to_owned();
        for role in [
            Role::Agent(id.clone()),
            Role::Target(id),
            Role::Operator("admin".to_owned()),
            Role::Control,
        ] {
            assert_eq!(role.to_string().parse::<Role>().unwrap(), role);
        }
        for wrong in [
            "secondsite:control:",
            "secondsite:agent",
            "secondsite:agent:",
            "secondsite:agent:0123456789ABCDEF0123456789abcdef",
            "secondsite:agent:0123456789abcdef0123456789abcdef:more",
            "secondsite:operator:a b",
            "secondsite:relay:0123456789abcdef0123456789abcdef",
            "https://control",
        ] {
            assert!(wrong.parse::<Role>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn renewal_begins_after_a_third() {
        let at = |second| Timestamp::from_second(second).unwrap();
        assert!(!renewal_due(at(1000), at(1300), at(1099)));
        assert!(renewal_due(at(1000), at(1300), at(1100)));
    }
}
