//! The control server: enrolment and certificate authority, policies, orders, status.
//!
//! Replication needs none of this to go on: agents and targets keep their last assignment on disk.
//! Control never dials out and never touches the data path; agents, targets and the CLI dial in.

pub mod api;
pub mod ca;
mod certificate;
pub mod clock;
mod files;
pub mod pki;
mod tls;
