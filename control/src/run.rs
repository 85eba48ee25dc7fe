//! The control server as a whole: opens the store, listens, renews its own certificate.

use crate::ca::Authority;
use crate::clock::{Clock, SystemClock};
use crate::deployment::Deployment;
use crate::observed::Observed;
use crate::pki::{self, Identity, Role};
pub use crate::store::NewerStore;
use crate::store::{Store, access};
use crate::{routes, server};
use anyhow::{Context, ensure};
use std::future::Future;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::watch;

/// Name of control's key and certificate in the folder.
pub const CONTROL: &str = "control";
/// Whether a renewal is due is asked once in this share of a certificate's life, within bounds.
const RENEWAL_CHECK_SHARE: u32 = 1000;
const RENEWAL_CHECK_MIN: Duration = Duration::from_millis(50);
const RENEWAL_CHECK_MAX: Duration = Duration::from_secs(60);

/// What control needs to know.
#[derive(Debug, Clone)]
pub struct ControlConfig {
    /// Where it listens; port 0 takes any.
    pub listen: SocketAddr,
    /// Its store.
    pub db: PathBuf,
    /// The folder with the authority and control's own key and certificate.
    pub pki_dir: PathBuf,
    /// Further names and addresses in its certificate, for browsers.
    pub hosts: Vec<String>,
    /// Life of the certificates that it signs; at most [`crate::ca::CERTIFICATE_LIFE_MAX`].
    pub certificate_life: Duration,
    /// Decides what has expired.
    pub clock: Arc<dyn Clock>,
    /// What it shows of itself while it runs.
    pub observed: Arc<Observed>,
}

impl ControlConfig {
    /// With the machine's clock and certificates of the longest life.
    pub fn new(listen: SocketAddr, db: PathBuf, pki_dir: PathBuf) -> Self {
        let certificate_life = crate::ca::CERTIFICATE_LIFE_MAX;
        let clock = Arc::new(SystemClock);
        let observed = Arc::default();
        Self { listen, db, pki_dir, hosts: Vec::new(), certificate_life, clock, observed }
    }
}

/// Runs control until `shutdown`. `ready` is called with the true address once it listens.
pub async fn run(
    config: ControlConfig,
    shutdown: impl Future<Output = ()>,
    ready: impl FnOnce(SocketAddr),
) -> anyhow::Result<()> {
    ensure!(config.db.exists(), "{} is missing; type: secondsite setup", config.db.display());
    let authority = Authority::load(&config.pki_dir, config.certificate_life)?;
    let identity = Identity::load(&config.pki_dir, CONTROL)?;
    ensure!(
        identity.role == Role::Control,
        "{}/{CONTROL}.pem is not control's certificate: it says {}",
        config.pki_dir.display(),
        identity.role
    );
    let store = Store::open(&config.db).await?;
    let deployment = Deployment::new(store, authority, config.clock.clone()).await?;
    config.observed.serves(Arc::downgrade(&deployment));
    let listener = TcpListener::bind(config.listen)
        .await
        .with_context(|| format!("listen on {}", config.listen))?;
    let address = listener.local_addr()?;
    let identity = renew(&config, &deployment, identity).await?;
    let tls = watch::Sender::new(identity.server_config_at(false, config.clock.clone())?);
    let router = routes::router(deployment.clone());
    let server =
        server::serve(listener, tls.subscribe(), router, config.observed.clone(), shutdown);
    ready(address);
    tokio::select! {
        () = server => {}
        () = keep_renewed(&config, &deployment, identity, &tls) => {}
    }
    deployment.store.close().await;
    Ok(())
}

/// Never ends. A renewal that fails is tried again: the old certificate is good for long.
async fn keep_renewed(
    config: &ControlConfig,
    deployment: &Deployment,
    mut identity: Identity,
    tls: &watch::Sender<Arc<rustls::ServerConfig>>,
) {
    let pause =
        (config.certificate_life / RENEWAL_CHECK_SHARE).clamp(RENEWAL_CHECK_MIN, RENEWAL_CHECK_MAX);
    loop {
        tokio::time::sleep(pause).await;
        let before = identity.serial().to_owned();
        let renewed = async {
            let reloaded = Identity::load(&config.pki_dir, CONTROL)?;
            identity = renew(config, deployment, reloaded).await?;
            if identity.serial() != before {
                tls.send_replace(identity.server_config_at(false, config.clock.clone())?);
            }
            anyhow::Ok(())
        };
        if let Err(error) = renewed.await {
            tracing::error!("control's certificate is not renewed: {error:#}");
        }
    }
}

/// The same identity, with a fresh key and certificate if it is due.
async fn renew(
    config: &ControlConfig,
    deployment: &Deployment,
    identity: Identity,
) -> anyhow::Result<Identity> {
    let now = deployment.now();
    if !identity.renewal_due(now) {
        return Ok(identity);
    }
    let (key, request) = pki::new_request()?;
    let authority = &deployment.authority;
    let issued = authority.sign(&request, &Role::Control, &config.hosts, now)?;
    let mut tx = deployment.store.begin().await?;
    access::insert_certificate(&mut tx, &issued.info).await?;
    tx.commit().await?;
    let authority = authority.certificate_pem();
    pki::install(&config.pki_dir, CONTROL, &key, &issued.certificate_pem, authority)?;
    tracing::info!("control's certificate is renewed until {}", issued.info.not_after);
    Identity::load(&config.pki_dir, CONTROL)
}
