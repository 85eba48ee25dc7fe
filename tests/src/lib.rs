//! The harness of the real ring: loop devices, mounts, network namespaces, and both sites as child
//! processes of the built binary, all taken back when a value is dropped.
//!
//! Tests wait on conditions with a deadline ([`wait_until`]), never for a fixed time. Everything
//! random comes from a printed seed. One lab at a time in a process: they share devices and cores.
//! Declare devices before mounts before the [`lab::Lab`]: they go in the opposite order.

pub mod block;
pub mod daemon;
pub mod decoders;
pub mod direct;
pub mod faulty;
pub mod file_system;
pub mod lab;
pub mod load;
pub mod network;
pub mod ordered;
pub mod postgres;
pub mod random;
pub mod site;
pub mod stamps;
pub mod threads;

use std::time::{Duration, Instant};

/// Turns that a soak makes: few by default, many with SECONDSITE_LONG.
pub fn soak(short: u32, long: u32) -> u32 {
    if std::env::var_os("SECONDSITE_LONG").is_some_and(|value| !value.is_empty()) {
        long
    } else {
        short
    }
}

/// Between two looks at a condition that has no event to wait for.
const POLL: Duration = Duration::from_millis(100);

/// Looks until `look` gives something; panics with `what` and the last answer after `limit`.
pub fn wait_until<T>(
    what: &str,
    limit: Duration,
    mut look: impl FnMut() -> Result<T, String>,
) -> T {
    let end = Instant::now() + limit;
    loop {
        match look() {
            Ok(found) => return found,
            Err(last) if Instant::now() >= end => {
                panic!("waited {limit:?} in vain until {what}; last seen: {last}")
            }
            Err(_) => std::thread::sleep(POLL),
        }
    }
}
