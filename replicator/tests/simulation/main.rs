//! Both sites in one process, from seeds: the real source over a server in memory, the real target
//! over disks in memory, a network and a clock between them, all driven from one thread.
//!
//! What is checked all along stands in [`remote`] (the second site) and [`world`] (no lost update).

mod behind;
mod filtered;
mod network;
mod pinned;
mod remote;
mod rig;
mod seeds;
mod source;
mod whole;
mod world;
