//! The bytes of wire and disk: golden files, round trips, and what hostile bytes do.

mod allocations;
mod damage;
mod golden;
mod properties;
mod samples;
