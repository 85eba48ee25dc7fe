//! `secondsite filter`: the process that stands in the write path, and its keeper.
//!
//! Two processes, no network. The *keeper* does nothing but start the *server* again when it dies;
//! the server carries the requests of all filtered volumes. While there is no server I/O waits; the
//! next one takes the devices over and it goes on. A restart, an upgrade and a change of the list of
//! volumes are all the same: the server ends, the next one takes over what there is, adds what is
//! new and removes what shall go.
//!
//! Nothing that these two need may lie behind the devices that they serve: binary, libraries and
//! list are in a tmpfs of their own ([`place`]), everything is locked in memory, and memory is never
//! asked for by way of I/O ([`locked`]).

pub mod client;
mod keeper;
mod locked;
mod place;
mod say;
mod server;
mod socket;
mod status;
mod volumes;

use crate::cli::Context;
use crate::cli::args::FilterArgs;
use crate::cli::failure::{Exit, Failure};
use secondsite_tracker::ublk::{Control, UblkError};
use std::path::PathBuf;

/// Where everything lies.
#[derive(Debug, Clone)]
struct Places {
    /// The tmpfs of our own.
    dir: PathBuf,
    /// The list that outlives a reboot.
    list: PathBuf,
}

impl Places {
    fn of(context: &Context, args: &FilterArgs) -> Self {
        Self {
            dir: args.dir.clone().unwrap_or_else(|| context.paths.run.join("filter")),
            list: args.list.clone().unwrap_or_else(|| context.paths.state.join("filter/volumes")),
        }
    }

    /// The list in the tmpfs: the one that counts as long as the machine runs.
    fn list_here(&self) -> PathBuf {
        self.dir.join("volumes")
    }

    fn socket(&self) -> PathBuf {
        client::socket_in(&self.dir)
    }
}

/// Runs it, or shows what runs.
pub(crate) fn run(context: &Context, args: &FilterArgs) -> Result<(), Failure> {
    let places = Places::of(context, args);
    if args.status {
        return status::show(context, &places.dir);
    }
    if let Some(line) = &args.ask {
        return status::ask(&places.dir, line);
    }
    // SAFETY: asks for a number.
    if unsafe { libc::geteuid() } != 0 {
        return Err(Failure::new(Exit::Permission, "filter: only root may serve block devices")
            .hint("sudo secondsite filter"));
    }
    if args.in_place {
        return keeper::run(&places, args);
    }
    need_ublk()?;
    place::prepare(&places)?;
    Err(place::enter(&places, args))
}

/// Says now, to whoever started it, what would make every server fail.
fn need_ublk() -> Result<(), Failure> {
    if !PathBuf::from("/dev/ublk-control").exists() {
        // A module that is not loaded; where it cannot be, the next step says so.
        let _ = std::process::Command::new("modprobe").arg("ublk_drv").output();
    }
    Control::open().map(drop).map_err(unavailable)
}

fn unavailable(error: UblkError) -> Failure {
    let hint = error.hint.clone();
    Failure::new(Exit::Unavailable, format!("filter: {error}"))
        .still("volumes are followed without a filter where eBPF can, else compared")
        .hint(if hint.is_empty() { "secondsite doctor".into() } else { hint })
}
