//! The pure half of the filter in the write path: what is marked, how a cut is made, and what is
//! preserved for it.
//!
//! Two processes share the memory of a volume ([`shared`]): the filter, which lets writes through
//! its [`gate`], and the agent, which takes, ships and commits. Neither ever waits for the other:
//! the filter copies what a write is about to replace into a bounded area, and gives the epoch up
//! when that is full.
//!
//! Nothing here does I/O or knows a clock, so the same code runs behind real queues and in a
//! simulation.

pub mod beside;
pub mod gate;
pub mod intent;
mod keeper;
mod mapped;
pub mod reserve;
pub mod shared;
