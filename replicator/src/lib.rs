//! The data plane of Secondsite: source, wire, target, and what the binary is made of.

pub mod cli;
pub mod config;
pub mod daemon;
pub mod filter;
pub mod inventory;
pub mod machine;
pub mod metrics;
pub mod nbd;
pub mod overlay;
pub mod pulse;
pub mod source;
pub mod target;
pub mod wire;
