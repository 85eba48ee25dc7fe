//! Makes a deployment: authority, store, the identities of control, target and first operator, and
//! the first token. Run once, on control's host; one that was cut short is taken up where it was.

use crate::api::TokenReply;
use crate::ca::{Authority, CERTIFICATE_LIFE_MAX};
use crate::clock::{Clock, SystemClock};
use crate::deployment::Deployment;
use crate::files;
use crate::ids;
use crate::pki::{self, Identity, Role, is_name};
use crate::run::CONTROL;
use crate::store::{self, Store, access, audit, targets};
use crate::token::TOKEN_SECONDS_MAX;
use anyhow::{Context, ensure};
use sqlx::sqlite::SqliteConnection;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// Name of the target's key and certificate in the folder.
pub const TARGET: &str = "target";
/// Name of the operator's key and certificate in the folder.
pub const OPERATOR: &str = "operator";
/// Name of an agent's key and certificate in its own folder.
pub const AGENT: &str = "agent";
/// The first operator's name.
const FIRST_OPERATOR: &str = "admin";
/// The setting that says that setup was finished.
const FINISHED: &str = "setup_finished";
/// The setting with the target's id.
const TARGET_ID: &str = "target_id";

/// What setup needs to know.
#[derive(Debug, Clone)]
pub struct SetupRequest {
    /// Folder for keys and certificates.
    pub pki_dir: PathBuf,
    /// File of the store.
    pub db: PathBuf,
    /// Where control will listen.
    pub listen: SocketAddr,
    /// Names and addresses of this host; the first is the one that people and agents dial.
    pub hosts: Vec<String>,
    /// Where agents reach the target, `HOST:PORT`; none: the first host and control's port + 1.
    pub target_address: Option<String>,
    /// The target's name.
    pub target_name: String,
    /// Life of certificates.
    pub certificate_life: Duration,
    /// Decides what time it is.
    pub clock: Arc<dyn Clock>,
}

impl SetupRequest {
    /// With the machine's clock, and a target beside control.
    pub fn new(pki_dir: PathBuf, db: PathBuf, listen: SocketAddr, hosts: Vec<String>) -> Self {
        Self {
            pki_dir,
            db,
            listen,
            hosts,
            target_address: None,
            target_name: "target".to_owned(),
            certificate_life: CERTIFICATE_LIFE_MAX,
            clock: Arc::new(SystemClock),
        }
    }
}

/// What setup made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SetupReply {
    /// The first token, for an agent; shown once.
    pub token: String,
    /// Seconds that it is good for.
    pub token_seconds: u64,
    /// The authority's fingerprint.
    pub fingerprint: String,
    /// Address of the page.
    pub page: String,
    /// Where control is dialled, `HOST:PORT`.
    pub control_address: String,
    /// Where the target is dialled, `HOST:PORT`.
    pub target_address: String,
}

/// Makes the deployment. Not from inside an asynchronous runtime.
pub fn setup(request: &SetupRequest) -> anyhow::Result<SetupReply> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(make(request))
}

/// Gives the target or the operator of this host a fresh certificate for the same role, without
/// asking control: for one that ended because nothing was used for too long. Needs the authority's
/// key, so only root on control's host can. Not from inside an asynchronous runtime.
pub fn reissue(pki_dir: &Path, db: &Path, name: &str, life: Duration) -> anyhow::Result<()> {
    let reissue = async {
        let role = Identity::load(pki_dir, name)?.role;
        let clock = Arc::new(SystemClock);
        let authority = Authority::load(pki_dir, life)?;
        let deployment = Deployment::new(Store::open(db).await?, authority, clock).await?;
        let mut tx = deployment.store.begin().await?;
        identity(&deployment, &mut tx, pki_dir, name, &role, &[]).await?;
        audit(&mut tx, deployment.now(), "setup", &format!("reissued {role}")).await?;
        tx.commit().await?;
        deployment.store.close().await;
        Ok(())
    };
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(reissue)
}

async fn make(request: &SetupRequest) -> anyhow::Result<SetupReply> {
    ensure!(is_name(&request.target_name), "{:?} cannot be a target's name", request.target_name);
    let port = request.listen.port();
    ensure!(port < u16::MAX, "port {port} leaves none for the target beside it");
    let host = request.hosts.first().context("no name or address of this host is given")?;
    let control_address = join(host, port);
    let target_address = request.target_address.clone().unwrap_or_else(|| join(host, port + 1));
    let store = open(&request.db).await?;
    let mut tx = store.begin().await?;
    ensure!(
        store::setting(&mut tx, FINISHED).await?.is_none(),
        "{} is set up already; nothing was changed. A new token: secondsite token",
        request.db.display()
    );
    drop(tx);
    let authority = authority(request)?;
    let deployment = Deployment::new(store, authority, request.clock.clone()).await?;
    let mut tx = deployment.store.begin().await?;
    let target = target_id(&mut tx).await?;
    for (name, role, hosts) in [
        (CONTROL, Role::Control, &request.hosts[..]),
        (TARGET, Role::Target(target.clone()), &[]),
        (OPERATOR, Role::Operator(FIRST_OPERATOR.to_owned()), &[]),
    ] {
        identity(&deployment, &mut tx, &request.pki_dir, name, &role, hosts).await?;
    }
    targets::put(&mut tx, &target, &request.target_name, &target_address).await?;
    let token = first_token(&deployment, &mut tx).await?;
    let now = deployment.now();
    store::set_setting(&mut tx, FINISHED, &now.to_string()).await?;
    audit(&mut tx, now, "setup", "made the deployment").await?;
    tx.commit().await?;
    deployment.store.close().await;
    Ok(SetupReply {
        token: token.token,
        token_seconds: token.ttl_seconds,
        fingerprint: token.fingerprint,
        page: format!("https://{control_address}"),
        control_address,
        target_address,
    })
}

async fn open(db: &Path) -> anyhow::Result<Store> {
    let folder = db.parent().context("the store's file has a folder")?;
    files::create_dir(folder)?;
    Ok(Store::open(db).await?)
}

/// A new authority, or the one that a setup made before it was cut short.
fn authority(request: &SetupRequest) -> anyhow::Result<Authority> {
    if !Authority::exists(&request.pki_dir) {
        Authority::create(&request.pki_dir, &*request.clock)?;
    }
    Authority::load(&request.pki_dir, request.certificate_life)
}

/// The target's id; kept in the same transaction as everything that names it.
async fn target_id(db: &mut SqliteConnection) -> anyhow::Result<String> {
    let id = match store::setting(db, TARGET_ID).await? {
        Some(id) => id,
        None => ids::new(),
    };
    store::set_setting(db, TARGET_ID, &id).await?;
    Ok(id)
}

async fn identity(
    deployment: &Deployment,
    db: &mut SqliteConnection,
    dir: &Path,
    name: &str,
    role: &Role,
    hosts: &[String],
) -> anyhow::Result<()> {
    let (key, request) = pki::new_request()?;
    let issued = deployment.authority.sign(&request, role, hosts, deployment.now())?;
    access::insert_certificate(db, &issued.info).await?;
    pki::install(dir, name, &key, &issued.certificate_pem, deployment.authority.certificate_pem())
}

async fn first_token(
    deployment: &Deployment,
    db: &mut SqliteConnection,
) -> anyhow::Result<TokenReply> {
    crate::tokens::make(deployment, db, "setup", "agent", TOKEN_SECONDS_MAX).await
}

/// `HOST:PORT`, with brackets for an IPv6 address.
fn join(host: &str, port: u16) -> String {
    match host.contains(':') {
        true => format!("[{host}]:{port}"),
        false => format!("{host}:{port}"),
    }
}
