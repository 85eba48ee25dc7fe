//! Where a daemon's log goes, and in which form. Always stderr, or straight to the journal.
//!
//! What an operator filters by (`server`, `volume`, `name`, `epoch`, `cut`) is a field of the event,
//! never only a part of its message.

use crate::cli::failure::{Exit, Failure};
use std::io::IsTerminal;
use std::os::fd::AsFd;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer, fmt};

/// What fields of events are called in the journal: `SECONDSITE_VOLUME`.
const JOURNAL_PREFIX: &str = "SECONDSITE";

/// The form of the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    /// The journal where stderr goes there, else text
    Auto,
    /// A line for people
    Text,
    /// An object a line
    Json,
    /// The journal's own fields
    Journald,
}

/// Starts the log. `SECONDSITE_LOG` chooses what is logged (`info` unless set).
pub fn start(format: LogFormat) -> Result<(), Failure> {
    let under_journal = under_journal();
    let journal = match format {
        LogFormat::Journald => Some(journal().map_err(|error| {
            Failure::new(Exit::Unavailable, format!("--log-format journald: {error}"))
                .hint("give --log-format text")
        })?),
        // Without its socket the journal still takes lines of text.
        LogFormat::Auto if under_journal => journal().ok(),
        _ => None,
    };
    let filter =
        EnvFilter::try_from_env("SECONDSITE_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let layer = match (journal, format) {
        (Some(journal), _) => journal.boxed(),
        (None, LogFormat::Json) => fmt::layer()
            .json()
            .flatten_event(true)
            .with_current_span(false)
            .with_span_list(false)
            .with_writer(std::io::stderr)
            .boxed(),
        (None, _) => {
            let colour = std::io::stderr().is_terminal() && crate::cli::output::colour_wanted();
            let lines =
                fmt::layer().with_writer(std::io::stderr).with_target(false).with_ansi(colour);
            // The journal has a time of its own for each line.
            if under_journal { lines.without_time().boxed() } else { lines.boxed() }
        }
    };
    // A second call (there is none in the binary) would change nothing.
    let _ = tracing_subscriber::registry().with(filter).with(layer).try_init();
    Ok(())
}

fn journal() -> std::io::Result<tracing_journald::Layer> {
    let layer = tracing_journald::layer()?;
    Ok(layer
        .with_field_prefix(Some(JOURNAL_PREFIX.into()))
        .with_syslog_identifier("secondsite".into()))
}

/// Whether stderr is a stream of the journal: JOURNAL_STREAM names its device and inode. The
/// variable alone is not enough; a child whose stderr goes elsewhere inherits it too.
fn under_journal() -> bool {
    let Ok(stream) = std::env::var("JOURNAL_STREAM") else { return false };
    nix::sys::stat::fstat(std::io::stderr().as_fd())
        .is_ok_and(|stat| stream == format!("{}:{}", stat.st_dev, stat.st_ino))
}
