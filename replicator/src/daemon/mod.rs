//! The three daemons, and what they share: one lock a role, init, state, the link to control.

pub mod agent_side;
pub mod control;
pub mod control_link;
pub mod init;
pub mod lock;
pub mod log;
pub mod orders;
pub mod replicate;
pub mod state;
pub mod target;
pub mod target_side;
