//! `secondsite replicate`: the agent, in the foreground.
//!
//! Order of start: configuration, lock, signals, freezer (a child, before there are threads), data
//! plane, link to control. On another machine than the enrolled one the agent stays up, says so, and
//! does nothing else.

use super::agent_side::{AgentSide, ENROLMENT, Enrolment};
use super::control_link::{Link, Shared, Side};
use super::init::{self, Signals};
use super::lock::Lock;
use super::log::{self, LogFormat};
use super::state::StateDir;
use crate::cli::failure::{Exit, Failure};
use crate::config::{AgentConfig, Paths};
use crate::machine;
use crate::metrics;
use crate::source::{Source, SourceConfig};
use secondsite_control::pki::{Identity, Role};
use secondsite_tracker::freeze::Freezer;
use std::path::Path;
use std::sync::Arc;

/// Below this lie the pins of all agents, each under its server's id.
pub const PIN_ROOT: &str = "/sys/fs/bpf/secondsite";

/// Runs until SIGTERM or SIGINT.
pub fn run(paths: &Paths, format: LogFormat) -> Result<(), Failure> {
    let config = AgentConfig::load(paths)?;
    let (identity, server_id) = identity(paths)?;
    let state = StateDir::open(&paths.state, AgentSide::ROLE)?;
    let enrolment: Enrolment = state.read(ENROLMENT)?.ok_or_else(|| {
        let what =
            format!("{} is missing: this server never joined", state.path(ENROLMENT).display());
        Failure::new(Exit::Config, what).hint("secondsite join ADDR:PORT --token T")
    })?;
    let _lock = Lock::take(paths, AgentSide::ROLE)?;
    // Before any thread: all inherit the blocked signals. The child must begin before any, too.
    let signals = Signals::block()?;
    let freezer = Freezer::start(&paths.run).map_err(|error| {
        Failure::new(Exit::Unavailable, error.to_string())
            .hint(format!("look at {}; run as root", paths.run.display()))
    })?;
    log::start(format)?;
    let version = env!("CARGO_PKG_VERSION");
    tracing::info!(server = server_id, name = config.name, version, "agent started");

    let here = machine::digest();
    let shared = Shared::new(config.control.clone(), Arc::clone(&identity))
        .map_err(|error| Failure::new(Exit::Config, format!("{error:#}")))?;
    let pin_dir = Path::new(PIN_ROOT).join(&server_id);
    let source = if machine::from_hex(&enrolment.machine) == Some(here) {
        let changed = Arc::clone(&shared);
        let source = SourceConfig {
            identity,
            machine: here,
            pin_dir: pin_dir.clone(),
            filter_dir: paths.run.join("filter"),
            memory_bytes: config.memory_bytes,
            workers: config.workers,
            freezer,
        };
        Ok(Source::start(source, Box::new(move || changed.changed())))
    } else {
        let why = "this is not the machine that joined (a clone, a restored backup or other \
                   hardware): nothing is tracked or sent, the certificate is not renewed. To \
                   protect this machine: secondsite token on control's host, then secondsite join \
                   here";
        tracing::error!("{why}");
        Err(why.to_string())
    };
    let side = AgentSide::new(source, state, enrolment, config.allow, config.control)?;
    let side = Arc::new(side);
    let link = Link::start(Arc::clone(&side), Arc::clone(&shared)).map_err(|error| {
        Failure::new(Exit::Failed, format!("start of the link to control: {error}"))
    })?;
    let (observed, link_state) = (Arc::downgrade(&side), Arc::clone(&shared));
    metrics::serve(&paths.metrics(AgentSide::ROLE, config.metrics), move || {
        let side = observed.upgrade().ok_or("the agent is stopping")?;
        let (source, refused) = side.observe();
        let agent = metrics::agent::Agent {
            source,
            refused,
            certificate_ends: link_state.certificate_ends(),
            control_answers: link_state.control_answers(),
        };
        Ok(metrics::agent::render(&agent))
    });
    init::serve_until_signal(
        &signals,
        || true,
        || format!("{}; {}", side.status(), shared.status()),
    );
    link.stop();
    if let Some(source) = Arc::into_inner(side).and_then(AgentSide::into_source) {
        source.stop();
    }
    // Only where no volume is protected any more are these folders empty and go.
    let _ = std::fs::remove_dir(pin_dir).and_then(|()| std::fs::remove_dir(PIN_ROOT));
    Ok(())
}

/// The agent's certificate and the server's id in it.
fn identity(paths: &Paths) -> Result<(Arc<Identity>, String), Failure> {
    let identity = Identity::load(&paths.pki, AgentSide::ROLE).map_err(|error| {
        Failure::new(Exit::Config, format!("{error:#}")).hint("secondsite join ADDR:PORT --token T")
    })?;
    match identity.role.clone() {
        Role::Agent(id) => Ok((Arc::new(identity), id)),
        other => {
            let what = format!("{}/agent.pem is a certificate of {other}", paths.pki.display());
            Err(Failure::new(Exit::Config, what).hint("secondsite join ADDR:PORT --token T"))
        }
    }
}
