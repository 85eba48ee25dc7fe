//! Golden bytes: what travels and what lies on disk may change only together with its version.
//!
//! `SECONDSITE_BLESS=1 cargo test --release -p secondsite-format golden` writes the files
//! anew; do that only for a new version of a layout.

use crate::samples;
use secondsite_format::frame::{Frame, HEADER_BYTES, RawHeader};
use std::path::PathBuf;

#[test]
fn every_frame_has_its_golden_bytes() {
    for (name, frame) in samples::all() {
        check(name, &samples::bytes(&frame));
    }
}

/// The files themselves are read back: an encoder and a decoder that are wrong in the same way
/// would pass the test above.
#[test]
fn golden_bytes_decode() {
    for (name, expected) in samples::all() {
        let bytes = golden(name);
        let header: &[u8; HEADER_BYTES] = bytes[..HEADER_BYTES].try_into().unwrap();
        let raw = RawHeader::parse(header).unwrap();
        let frame: Frame = raw.with_body(bytes[HEADER_BYTES..].to_vec()).unwrap();
        assert_eq!(frame.header, expected.header, "{name}");
        assert_eq!(frame.body, expected.body, "{name}");
    }
}

/// Digests are part of the format too: both sides compute them over uncompressed content.
#[test]
fn digests_are_fixed() {
    let lines = [
        ("content", samples::content().digest()),
        ("chain", samples::signed().chain_digest()),
        ("epoch", samples::manifest().content),
    ];
    let bytes: Vec<u8> = lines.iter().flat_map(|(_, digest)| *digest).collect();
    check("digests", &bytes);
}

fn path(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(format!("tests/golden/{name}.hex"))
}

fn check(name: &str, bytes: &[u8]) {
    if std::env::var_os("SECONDSITE_BLESS").is_some() {
        std::fs::write(path(name), hex(bytes)).unwrap();
    }
    assert_eq!(hex(&golden(name)), hex(bytes), "{name}: the bytes changed");
}

fn golden(name: &str) -> Vec<u8> {
    let text = std::fs::read_to_string(path(name)).unwrap_or_else(|e| panic!("{name}: {e}"));
    let digits: Vec<u32> = text.chars().filter_map(|c| c.to_digit(16)).collect();
    digits.chunks(2).map(|pair| (pair[0] << 4 | pair[1]) as u8).collect()
}

/// Rows of 16 bytes.
fn hex(bytes: &[u8]) -> String {
    let row = |row: &[u8]| row.iter().map(|b| format!("{b:02x}")).collect::<Vec<_>>().join(" ");
    bytes.chunks(16).map(|chunk| row(chunk) + "\n").collect()
}
