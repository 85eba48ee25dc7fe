//! Control as a whole, in this process, over real TLS on loopback, with a clock that tests set.

mod access;
mod protection;
mod renewal;
mod site;
