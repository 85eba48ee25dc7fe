//! `secondsite target`: the target, in the foreground.

use super::control_link::{Link, Shared, Side};
use super::init::{self, Signals};
use super::lock::Lock;
use super::log::{self, LogFormat};
use super::state::StateDir;
use super::target_side::{ASSIGNMENT, TargetSide};
use crate::cli::failure::{Exit, Failure};
use crate::config::{Paths, TargetConfig};
use crate::metrics;
use crate::target;
use secondsite_control::api::TargetAssignment;
use secondsite_control::pki::{Identity, Role};
use secondsite_control::recovery;
use std::sync::Arc;

/// Runs until SIGTERM or SIGINT.
pub fn run(paths: &Paths, format: LogFormat) -> Result<(), Failure> {
    let config = TargetConfig::load(paths)?;
    let identity = identity(paths)?;
    let state = StateDir::open(&paths.state, TargetSide::ROLE)?;
    let _lock = Lock::take(paths, TargetSide::ROLE)?;
    let signals = Signals::block()?;
    log::start(format)?;
    let version = env!("CARGO_PKG_VERSION");
    tracing::info!(address = %config.listen, version, "target started");

    let nothing = TargetAssignment { version: 0, servers: Vec::new() };
    let assignment: TargetAssignment = state.read(ASSIGNMENT)?.unwrap_or(nothing);
    let version = assignment.version;
    let shared = Shared::new(config.control.clone(), Arc::clone(&identity))
        .map_err(|error| Failure::new(Exit::Config, format!("{error:#}")))?;
    let changed = Arc::clone(&shared);
    let store = config.store.clone();
    let sockets = paths.metrics(TargetSide::ROLE, config.metrics);
    let target = target::Target::start(
        data_plane(config, identity, paths),
        assignment,
        Box::new(move || changed.changed()),
    )
    .map_err(|error| {
        Failure::new(Exit::Io, format!("{error:#}"))
            .still("what is in the store stays as it is")
            .hint(format!("df -h {}", store.display()))
    })?;
    let api = paths.api(TargetSide::ROLE);
    if let Err(error) = recovery::serve(&api, target.recovery()) {
        tracing::error!("no answers on {}: {error}", api.display());
    }
    let side = Arc::new(TargetSide::new(target, state, version));
    let link = Link::start(Arc::clone(&side), Arc::clone(&shared)).map_err(|error| {
        Failure::new(Exit::Failed, format!("start of the link to control: {error}"))
    })?;
    let (observed, link_state) = (Arc::downgrade(&side), Arc::clone(&shared));
    metrics::serve(&sockets, move || {
        let side = observed.upgrade().ok_or("the target is stopping")?;
        let all = metrics::target::Target {
            target: side.observe(),
            certificate_ends: link_state.certificate_ends(),
            control_answers: link_state.control_answers(),
        };
        Ok(metrics::target::render(&all))
    });
    init::serve_until_signal(
        &signals,
        || true,
        || format!("{}; {}", side.status(), shared.status()),
    );
    link.stop();
    if let Some(side) = Arc::into_inner(side) {
        side.into_target().stop();
    }
    Ok(())
}

fn data_plane(
    config: TargetConfig,
    identity: Arc<Identity>,
    paths: &Paths,
) -> target::TargetConfig {
    let device = |device: crate::config::ReplicaDevice| target::ReplicaDevice {
        server: device.server,
        volume: device.volume,
        path: device.path,
    };
    target::TargetConfig {
        identity,
        store: config.store,
        listen: config.listen,
        devices: config.devices.into_iter().map(device).collect(),
        reserve_bytes: config.reserve_bytes,
        memory_bytes: config.memory_bytes,
        nbd_socket: paths.nbd(),
        scratch_bytes: config.scratch_bytes,
        clock: Arc::default(),
    }
}

fn identity(paths: &Paths) -> Result<Arc<Identity>, Failure> {
    let identity = Identity::load(&paths.pki, TargetSide::ROLE).map_err(|error| {
        Failure::new(Exit::Config, format!("{error:#}")).hint("secondsite setup --store DIR")
    })?;
    if !matches!(identity.role, Role::Target(_)) {
        let what =
            format!("{}/target.pem is a certificate of {}", paths.pki.display(), identity.role);
        return Err(Failure::new(Exit::Config, what).hint("secondsite setup --store DIR"));
    }
    Ok(Arc::new(identity))
}
