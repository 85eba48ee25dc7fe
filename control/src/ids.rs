//! Ids made here: 16 random bytes, 32 hex digits.

use crate::certificate::hex;

/// A fresh id.
pub(crate) fn new() -> String {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).expect("the kernel gives random bytes once it has booted");
    hex(&bytes)
}
