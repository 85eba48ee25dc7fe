//! Why a call to control failed, with the exit code for a command and what to type.

use crate::api::Problem;
use crate::problem::exit;
use hyper::StatusCode;
use rustls::{AlertDescription, CertificateError};
use std::error::Error;

/// Why a call to control failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Control answered, and refused.
    #[error("{}", .0.message)]
    Refused(Problem),
    /// The two do not believe each other's certificates.
    #[error("control at {address}: {message}")]
    Disbelief {
        /// What was dialled.
        address: String,
        /// Who refuses whom, and why.
        message: String,
        /// What to type or do.
        hint: &'static str,
    },
    /// No answer.
    #[error("control at {address} cannot be reached: {cause}")]
    Unreachable {
        /// What was dialled.
        address: String,
        /// Why not.
        cause: Box<dyn Error + Send + Sync>,
    },
    /// An answer that is none of control's.
    #[error("{address} answers {status} with something that is not of control: {cause}")]
    Malformed {
        /// What was dialled.
        address: String,
        /// The status of the answer.
        status: StatusCode,
        /// What is wrong with it.
        cause: serde_json::Error,
    },
}

impl ClientError {
    /// Exit code that the command should end with.
    pub fn exit_code(&self) -> u8 {
        match self {
            ClientError::Refused(problem) => problem.exit_code,
            ClientError::Disbelief { .. } => exit::PERMISSION,
            ClientError::Unreachable { .. } | ClientError::Malformed { .. } => exit::UNAVAILABLE,
        }
    }

    /// What to type or do; empty if there is nothing to say.
    pub fn hint(&self) -> &str {
        match self {
            ClientError::Refused(problem) => &problem.hint,
            ClientError::Disbelief { hint, .. } => hint,
            ClientError::Unreachable { .. } => {
                "on control's host: systemctl status secondsite-control"
            }
            ClientError::Malformed { .. } => "check address and port",
        }
    }

    pub(crate) fn malformed(address: &str, status: StatusCode, cause: serde_json::Error) -> Self {
        ClientError::Malformed { address: address.to_owned(), status, cause }
    }

    /// A broken connection: because of a certificate, or because of the network.
    pub(crate) fn connection(address: &str, cause: Box<dyn Error + Send + Sync>) -> Self {
        let address = address.to_owned();
        match tls_error(&*cause).and_then(disbelief) {
            Some((message, hint)) => ClientError::Disbelief { address, message, hint },
            None => ClientError::Unreachable { address, cause: innermost(cause) },
        }
    }
}

/// The TLS error in a chain of causes; an I/O error hides its own.
fn tls_error<'a>(error: &'a (dyn Error + 'static)) -> Option<&'a rustls::Error> {
    let mut at = Some(error);
    while let Some(error) = at {
        if let Some(tls) = error.downcast_ref::<rustls::Error>() {
            return Some(tls);
        }
        at = match error.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref) {
            Some(inner) => Some(inner),
            None => error.source(),
        };
    }
    None
}

fn disbelief(error: &rustls::Error) -> Option<(String, &'static str)> {
    const JOIN: &str = "on control's host: secondsite token; then here: secondsite join";
    const ADDRESS: &str =
        "check the address, and that the token or certificate is of this deployment";
    let ours = |what: &str| Some((format!("it refuses our certificate: {what}"), JOIN));
    let theirs = |what: &str| Some((format!("its certificate is refused: {what}"), ADDRESS));
    match error {
        rustls::Error::AlertReceived(alert) => match alert {
            AlertDescription::CertificateExpired => ours("it has ended"),
            AlertDescription::CertificateRevoked => ours("it was revoked"),
            AlertDescription::UnknownCA => ours("it is of another deployment"),
            AlertDescription::BadCertificate
            | AlertDescription::CertificateUnknown
            | AlertDescription::CertificateRequired
            | AlertDescription::AccessDenied
            | AlertDescription::DecryptError => ours(&format!("{alert:?}")),
            _ => None,
        },
        rustls::Error::InvalidCertificate(error) => match error {
            CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
                theirs("it has ended (is the clock of one side wrong?)")
            }
            CertificateError::UnknownIssuer | CertificateError::BadSignature => {
                theirs("it is of another deployment")
            }
            error => theirs(&error.to_string()),
        },
        rustls::Error::Other(error) => theirs(&error.to_string()),
        rustls::Error::InvalidMessage(_) => {
            Some(("something that does not speak TLS answers there".to_owned(), ADDRESS))
        }
        _ => None,
    }
}

/// The cause that says most: the library's own words around it ("client error") say nothing.
fn innermost(error: Box<dyn Error + Send + Sync>) -> Box<dyn Error + Send + Sync> {
    let mut at: &(dyn Error + 'static) = &*error;
    while let Some(source) = at.source() {
        at = source;
    }
    let cut_off = at
        .downcast_ref::<std::io::Error>()
        .is_some_and(|error| error.kind() == std::io::ErrorKind::UnexpectedEof);
    if cut_off { "it closed the connection".into() } else { at.to_string().into() }
}
