//! `secondsite control`: the control server, in the foreground.

use super::init::{self, Signals};
use super::lock::Lock;
use super::log::{self, LogFormat};
use crate::cli::failure::{Exit, Failure};
use crate::config::{ControlConfig, Paths};
use crate::metrics;
use crate::pulse;
use secondsite_control::observed::ROUND;
use secondsite_control::run::{self, CONTROL, NewerStore};
use std::cell::Cell;
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, mpsc};

/// Threads that answer requests.
const WORKERS: usize = 2;
/// File of the database.
const DATABASE: &str = "control.db";

/// Runs until SIGTERM or SIGINT.
pub fn run(paths: &Paths, format: LogFormat) -> Result<(), Failure> {
    let config = ControlConfig::load(paths)?;
    let _lock = Lock::take(paths, CONTROL)?;
    let signals = Signals::block()?;
    log::start(format)?;

    let mut settings =
        run::ControlConfig::new(config.listen, database(paths, &config), paths.pki.clone());
    settings.hosts = hosts(config.listen);
    settings.certificate_life = config.certificate_life;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(WORKERS)
        .enable_all()
        .build()
        .map_err(|error| Failure::new(Exit::Failed, format!("start of the runtime: {error}")))?;

    let observed = Arc::clone(&settings.observed);
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let (ready, when_ready) = mpsc::channel();
    let server = runtime.spawn(run::run(
        settings,
        async move {
            // Dropped or sent: both mean the end.
            let _ = stopped.await;
        },
        move |address| {
            // The main thread waits for this as long as the server lives.
            let _ = ready.send(address);
        },
    ));
    // The sender is dropped when the server ends without having been ready.
    if let Ok(address) = when_ready.recv() {
        tracing::info!(%address, version = env!("CARGO_PKG_VERSION"), "control listens");
        let (seen_by_metrics, handle) = (Arc::clone(&observed), runtime.handle().clone());
        metrics::serve(&paths.metrics(CONTROL, config.metrics), move || {
            let snapshot = handle.block_on(seen_by_metrics.snapshot())?;
            Ok(metrics::control::render(&seen_by_metrics, &snapshot))
        });
        let joined = pulse::join("the loop that accepts connections");
        let seen = Cell::new(u64::MAX);
        let goes_on = || {
            if seen.replace(observed.rounds()) != observed.rounds() {
                joined.beat_again_in(ROUND);
            }
            !server.is_finished()
        };
        init::serve_until_signal(&signals, goes_on, || format!("listening on {address}"));
    }
    drop(stop);
    match runtime.block_on(server) {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) => Err(failed(config.listen, &error)),
        Err(panic) => Err(Failure::new(Exit::Failed, format!("control: {panic}"))),
    }
}

/// Control's database.
pub fn database(paths: &Paths, config: &ControlConfig) -> PathBuf {
    config.store.clone().unwrap_or_else(|| paths.state.join(CONTROL)).join(DATABASE)
}

/// Names and addresses of this host in control's certificate; the first is the one that people
/// dial.
pub fn hosts(listen: SocketAddr) -> Vec<String> {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let host = host.trim();
    let mut hosts = Vec::new();
    if !listen.ip().is_unspecified() {
        hosts.push(listen.ip().to_string());
    }
    // A name that could not stand in a certificate is left out.
    if secondsite_control::pki::is_name(host) && !host.contains('_') {
        hosts.push(host.to_string());
    }
    hosts.push("localhost".into());
    hosts
}

/// What a database of a newer version means for a command.
pub fn newer(error: &anyhow::Error) -> Option<Failure> {
    let newer = error.chain().find_map(|cause| cause.downcast_ref::<NewerStore>())?;
    let hint = format!(
        "install the newer Secondsite again, or restore {} from a backup of this version",
        newer.path.display()
    );
    let failure = Failure::new(Exit::Config, newer.to_string());
    Some(failure.still("replication goes on without control").hint(hint))
}

fn failed(listen: SocketAddr, error: &anyhow::Error) -> Failure {
    if let Some(newer) = newer(error) {
        return newer;
    }
    let kind = error.chain().find_map(|cause| cause.downcast_ref::<std::io::Error>());
    let failure = |exit| Failure::new(exit, format!("control: {error:#}"));
    match kind.map(std::io::Error::kind) {
        Some(ErrorKind::AddrInUse) => failure(Exit::Unavailable)
            .still("replication goes on without control")
            .hint(format!("end what listens on {listen}, or change `listen` in control.toml")),
        Some(ErrorKind::PermissionDenied) => failure(Exit::Permission).hint("run as root"),
        Some(ErrorKind::NotFound) => failure(Exit::Config).hint("secondsite setup --store DIR"),
        _ => failure(Exit::Failed),
    }
}
