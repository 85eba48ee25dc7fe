//! The operator's connection to control: the certificate of this configuration, and questions.
//!
//! The certificate renews itself when it is used and due; a renewal that fails is told but stops
//! nothing while the certificate is still good.

use super::failure::{Exit, Failure};
use super::{Context, output};
use crate::config::ControlConfig;
use crate::daemon::control_link::renew_with;
use secondsite_control::client::{BlockingClient, Client};
use secondsite_control::client_error::ClientError;
use secondsite_control::pki::{Identity, Role};
use secondsite_control::setup::OPERATOR;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// A person with the role admin, at control.
pub(super) struct Operator {
    address: String,
    client: BlockingClient,
}

impl Operator {
    /// With the certificate and control's address of this configuration.
    pub(super) fn open(context: &Context) -> Result<Self, Failure> {
        let paths = &context.paths;
        let config = ControlConfig::load(paths)?;
        let address = dialled(config.listen).to_string();
        let identity =
            Identity::load(&paths.pki, OPERATOR).map_err(|error| load_failed(context, &error))?;
        if !matches!(identity.role, Role::Operator(_)) {
            let pki = paths.pki.display();
            let what = format!("{pki}/{OPERATOR}.pem is a certificate of {}", identity.role);
            return Err(Failure::new(Exit::Config, what).hint("secondsite setup --store DIR"));
        }
        let now = jiff::Timestamp::now();
        if identity.not_after() <= now {
            let what = format!("the operator's certificate ended {}", identity.not_after());
            return Err(Failure::new(Exit::Permission, what)
                .still("replication goes on")
                .hint(format!("on control's host: {}", context.command("setup --store DIR"))));
        }
        let mut client = connect(&address, &identity)?;
        if identity.renewal_due(now) {
            match client.run(|client| renew_with(client, &identity, OPERATOR)) {
                Ok(renewed) => client = connect(&address, &renewed)?,
                Err(error) => output::talk(&format!(
                    "The operator's certificate ends {} and could not be renewed: {error}",
                    identity.not_after()
                )),
            }
        }
        Ok(Self { address, client })
    }

    /// Where control is dialled.
    pub(super) fn address(&self) -> &str {
        &self.address
    }

    /// Asks control: `operator.ask(|control| control.status())`.
    pub(super) fn ask<'a, T, F>(&'a self, call: impl FnOnce(&'a Client) -> F) -> Result<T, Failure>
    where
        F: Future<Output = Result<T, ClientError>>,
    {
        self.client.run(call).map_err(|error| failure(&error))
    }
}

/// One that listens on every address is dialled on this host.
pub(super) fn dialled(listen: SocketAddr) -> SocketAddr {
    let ip = match listen.ip() {
        ip if !ip.is_unspecified() => ip,
        IpAddr::V4(_) => IpAddr::V4(Ipv4Addr::LOCALHOST),
        IpAddr::V6(_) => IpAddr::V6(Ipv6Addr::LOCALHOST),
    };
    SocketAddr::new(ip, listen.port())
}

/// What a question to control failed with.
pub(super) fn failure(error: &ClientError) -> Failure {
    let failure = Failure::new(Exit::from_code(error.exit_code()), error.to_string());
    let failure = failure.hint(error.hint());
    match error {
        ClientError::Unreachable { .. } => failure.still("replication goes on without control"),
        _ => failure,
    }
}

fn connect(address: &str, identity: &Identity) -> Result<BlockingClient, Failure> {
    let failed = |error: anyhow::Error| Failure::new(Exit::Failed, format!("{error:#}"));
    BlockingClient::new(address, identity.client_config().map_err(failed)?)
        .map_err(|error| failed(error.into()))
}

fn load_failed(context: &Context, error: &anyhow::Error) -> Failure {
    let denied = error.chain().any(|cause| {
        cause
            .downcast_ref::<std::io::Error>()
            .is_some_and(|error| error.kind() == std::io::ErrorKind::PermissionDenied)
    });
    let what = format!("the operator's certificate: {error:#}");
    if denied {
        return Failure::new(Exit::Permission, what).hint("run as root");
    }
    Failure::new(Exit::Config, what)
        .hint(format!("on control's host: {}", context.command("setup --store DIR")))
}

#[cfg(test)]
mod tests {
    use super::dialled;

    #[test]
    fn control_on_every_address_is_dialled_here() {
        let dial = |listen: &str| dialled(listen.parse().unwrap()).to_string();
        assert_eq!(dial("0.0.0.0:7443"), "127.0.0.1:7443");
        assert_eq!(dial("[::]:7443"), "[::1]:7443");
        assert_eq!(dial("10.0.0.9:7443"), "10.0.0.9:7443");
    }
}
