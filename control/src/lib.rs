//! The control server: enrolment and certificate authority, policies, orders, status.
//!
//! Replication needs none of this to go on: agents and targets keep their last assignment on disk.
//! Control never dials out and never touches the data path; agents, targets and the CLI dial in.

pub mod api;
pub mod ca;
mod certificate;
pub mod client;
pub mod client_error;
pub mod clock;
pub mod codes;
mod deployment;
mod files;
mod ids;
pub mod keep;
pub mod observed;
pub mod pki;
mod plan;
pub mod problem;
mod routes;
pub mod run;
mod server;
pub mod setup;
mod status;
mod store;
mod tls;
pub mod token;
mod tokens;
