//! What a fuzzer calls: for every decoder of wire and disk a function that takes any bytes.
//!
//! Each panics when a decoder does, when what it accepted is beyond its bounds, or when it does not
//! come back the same after encoding. The fuzzer (`tests/fuzz`) and an ordinary test over the
//! committed corpus (`tests/tests/corpus.rs`) share them, so that they cannot rot. Digests are made
//! right where they would keep random bytes from the code behind them.

mod disk;
mod text;
mod wire;

/// A decoder's name, which is also its folder in the corpus, and its function.
pub type Decoder = (&'static str, fn(&[u8]));

/// All of them.
pub const ALL: &[Decoder] = &[
    ("frame", wire::frame),
    ("extents", wire::extents),
    ("manifest", wire::manifest),
    ("message", wire::message),
    ("journal", disk::journal),
    ("state", disk::state),
    ("document", disk::document),
    ("header", disk::header),
    ("certificate", text::certificate),
    ("name", text::name),
    ("config", text::config),
    ("inventory", text::inventory),
    ("mountinfo", text::mountinfo),
];

/// Gives bytes to the decoder of this name.
pub fn run(name: &str, bytes: &[u8]) {
    let decoder = ALL.iter().find(|(known, _)| *known == name);
    decoder.unwrap_or_else(|| panic!("no decoder {name}")).1(bytes);
}
