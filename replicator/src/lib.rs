//! The data plane of Secondsite: source, wire, target, and what the binary is made of.

pub mod source;
pub mod target;
pub mod wire;
