//! One-time tokens: what proves a new machine to control, and control to the new machine.
//!
//! `ss1_` and 96 hex digits: 16 random bytes, then SHA-256 of the authority's certificate. Control
//! keeps only the digest of the whole text.

use crate::certificate::{hex, unhex};
use crate::pki::Fingerprint;
use std::fmt;
use std::str::FromStr;

/// Longest life of a token, seconds.
pub const TOKEN_SECONDS_MAX: u64 = 3600;
const PREFIX: &str = "ss1_";
const SECRET_BYTES: usize = 16;
const TOKEN_BYTES: usize = SECRET_BYTES + 32;

/// A token, in clear.
#[derive(Clone, PartialEq, Eq)]
pub struct Token([u8; TOKEN_BYTES]);

/// What was given is no token at all.
#[derive(Debug, thiserror::Error)]
#[error("this is not a token: it would be {PREFIX} and {} hex digits", 2 * TOKEN_BYTES)]
pub struct NotAToken;

impl Token {
    /// A fresh one.
    pub(crate) fn new(authority: Fingerprint) -> anyhow::Result<Self> {
        let mut bytes = [0; TOKEN_BYTES];
        getrandom::fill(&mut bytes[..SECRET_BYTES])?;
        bytes[SECRET_BYTES..].copy_from_slice(&authority.0);
        Ok(Self(bytes))
    }

    /// The authority that control must show.
    pub fn authority(&self) -> Fingerprint {
        let (_, digest) = self.0.split_last_chunk().expect("longer than a digest");
        Fingerprint(*digest)
    }

    /// What control keeps of it.
    pub(crate) fn sha256(&self) -> String {
        let text = self.to_string();
        hex(aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, text.as_bytes()).as_ref())
    }
}

impl fmt::Display for Token {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{PREFIX}{}", hex(&self.0))
    }
}

/// Never in a log.
impl fmt::Debug for Token {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{PREFIX}…")
    }
}

impl FromStr for Token {
    type Err = NotAToken;

    fn from_str(text: &str) -> Result<Self, NotAToken> {
        text.strip_prefix(PREFIX).and_then(unhex).map(Self).ok_or(NotAToken)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_carries_the_authority() {
        let token = Token::new(Fingerprint([7; 32])).unwrap();
        let read: Token = token.to_string().parse().unwrap();
        assert_eq!(read, token);
        assert_eq!(read.authority(), Fingerprint([7; 32]));
        let mut other = token.to_string();
        other.pop();
        assert!(other.parse::<Token>().is_err());
    }
}
