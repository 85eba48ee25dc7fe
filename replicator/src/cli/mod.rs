//! cli
pub mod failure;
pub mod units;
