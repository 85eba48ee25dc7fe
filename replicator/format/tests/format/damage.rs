//! Hostile bytes: decoders neither panic, nor take memory that a limit does not allow, nor accept
//! what is cut short or has a surplus.
//!
//! Digests do not help here: a peer that lies computes the right digest over its lie. So bodies
//! are damaged and given straight to their decoders.

use crate::{allocations, samples};
use proptest::prelude::*;
use secondsite_format::FormatError;
use secondsite_format::extent::Content;
use secondsite_format::frame::{Frame, FrameHeader, FrameKind, HEADER_BYTES, MAGIC, RawHeader};
use secondsite_format::ids::VolumeId;
use secondsite_format::limits;
use secondsite_format::manifest::SignedManifest;
use secondsite_format::message::{Hello, Message, Refusal, Reply, Request, Welcome};

/// Whatever is read takes at most this at once: a full frame payload, or a full frame body.
const ALLOCATION_BYTES_MAX: usize = limits::FRAME_BODY_BYTES_MAX;

/// Gives `body` to every decoder; returns the names of those that accepted it.
fn decode_all(body: &[u8]) -> Vec<&'static str> {
    allocations::forget();
    let frame = |kind| Frame::new(FrameHeader::message(kind), body.to_vec());
    let mut accepted = Vec::new();
    let mut note = |name, ok: bool| accepted.extend(ok.then_some(name));
    note("content", Content::decode(body, samples::VOLUME_BYTES).is_ok());
    note("manifest", SignedManifest::decode(body).is_ok());
    note("hello", Hello::from_frame(&frame(FrameKind::Hello)).is_ok());
    note("welcome", Welcome::from_frame(&frame(FrameKind::Welcome)).is_ok());
    note("request", Request::from_frame(&frame(FrameKind::Request)).is_ok());
    note("reply", Reply::from_frame(&frame(FrameKind::Reply)).is_ok());
    note("refusal", Refusal::from_frame(&frame(FrameKind::Refusal)).is_ok());
    let largest = allocations::largest();
    assert!(largest <= ALLOCATION_BYTES_MAX, "{largest} bytes were taken at once");
    accepted
}

/// The decoder that a sample's body is meant for.
fn decoder_of(name: &str) -> &str {
    match name {
        "data" => "content",
        "commit" => "manifest",
        _ => name.split('-').next().expect("split gives one at least"),
    }
}

#[test]
fn what_is_cut_short_is_refused_at_every_length() {
    for (name, frame) in samples::all() {
        for keep in 0..frame.body.len() {
            let accepted = decode_all(&frame.body[..keep]);
            let own = decoder_of(name);
            assert!(!accepted.contains(&own), "{name} cut to {keep} bytes was accepted");
        }
    }
}

#[test]
fn a_surplus_is_refused() {
    for (name, frame) in samples::all() {
        let longer = [frame.body.as_slice(), &[0]].concat();
        assert!(!decode_all(&longer).contains(&decoder_of(name)), "{name} with a surplus byte");
    }
}

#[test]
fn lengths_are_checked_before_memory_is_taken() {
    for kind in [FrameKind::Data, FrameKind::Commit, FrameKind::Hello, FrameKind::Reply] {
        let mut header = FrameHeader::message(kind).encode(&[]);
        let over = kind.body_bytes_max() as u32 + 1;
        for length in [over, u32::MAX, 1 << 31] {
            header[8..12].copy_from_slice(&length.to_le_bytes());
            assert!(RawHeader::parse(&header).is_err(), "{kind:?} of {length} bytes was accepted");
        }
    }
    // An extent table that claims the most of everything, in 16 bytes.
    let mut body = vec![0xff; 8];
    body.extend((limits::FRAME_PAYLOAD_BYTES_MAX as u32 + 1).to_le_bytes());
    body.extend([0; 4]);
    assert!(decode_all(&body).is_empty());
    // A vector of digests that claims 2^60 elements.
    let mut body = 3u32.to_le_bytes().to_vec();
    body.extend((1u64 << 60).to_le_bytes());
    assert!(decode_all(&body).is_empty());
}

/// A payload that unpacks to more, or to less, than its table says.
#[test]
fn a_bomb_is_refused() {
    let mut body = samples::content().encode();
    assert_eq!(body[4..8], [1, 0, 0, 0], "the sample is compressed");
    let table = 16 + 4 * 16;
    body.truncate(table);
    body.extend(lz4_flex::block::compress(&vec![0x5a; 1 << 24]));
    assert!(decode_all(&body).is_empty());
    body.truncate(table);
    body.extend(lz4_flex::block::compress(&[0x5a; 4096]));
    assert!(decode_all(&body).is_empty());
}

/// A sign counted as a digit, so that one id had several names.
#[test]
fn an_id_has_hex_digits_only() {
    let id = "0123456789abcdef0123456789abcdef";
    assert_eq!(id.parse::<VolumeId>().unwrap().to_string(), id);
    for wrong in ["+f", "-0", " f", "g0"] {
        let text = format!("{wrong}{}", &id[2..]);
        assert!(text.parse::<VolumeId>().is_err(), "{text}");
    }
}

/// Only a higher version is a newer one: zeros of a torn write are not.
#[test]
fn a_newer_version_is_told_from_damage() {
    let mut header = *samples::data_frame().header_bytes();
    header[4] = 2;
    let newer = FormatError::Newer { what: "frame", found: 2, known: 1 };
    assert_eq!(RawHeader::parse(&header).unwrap_err(), newer);
    header[4] = 0;
    let damaged = RawHeader::parse(&header).unwrap_err();
    assert!(matches!(damaged, FormatError::Inconsistent { .. }), "{damaged:?}");
    let mut body = samples::signed().encode();
    body[136 + 4] = 2;
    let newer = FormatError::Newer { what: "manifest", found: 2, known: 1 };
    assert_eq!(SignedManifest::decode(&body).unwrap_err(), newer);
}

/// Of a greeting in another protocol only the number is read; what follows may have any form.
#[test]
fn a_greeting_of_another_protocol_says_which() {
    for found in [0u32, 2, u32::MAX] {
        let body = [found.to_le_bytes().as_slice(), &[0xee; 300]].concat();
        let frame = |kind| Frame::new(FrameHeader::message(kind), body.clone());
        let due = FormatError::Protocol { found, known: 1 };
        assert_eq!(Hello::from_frame(&frame(FrameKind::Hello)).unwrap_err(), due);
        assert_eq!(Welcome::from_frame(&frame(FrameKind::Welcome)).unwrap_err(), due);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn random_bytes_harm_nothing(body in prop::collection::vec(any::<u8>(), 0..2048)) {
        decode_all(&body);
    }

    /// Valid bodies with a few bytes overwritten: deep into every decoder.
    #[test]
    fn damaged_bodies_harm_nothing(
        which in 0usize..17,
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
    ) {
        let (_, frame) = samples::all().swap_remove(which);
        let mut body = frame.body.clone();
        if !body.is_empty() {
            for (place, byte) in damage {
                let at = place.index(body.len());
                body[at] = byte;
            }
        }
        decode_all(&body);
    }

    #[test]
    fn random_headers_harm_nothing(mut bytes in any::<[u8; 32]>(), ours in any::<bool>()) {
        let mut header = [0; HEADER_BYTES];
        if ours {
            bytes[..4].copy_from_slice(&MAGIC.to_le_bytes());
            bytes[4..6].copy_from_slice(&1u16.to_le_bytes());
        }
        header[..32].copy_from_slice(&bytes);
        if let Ok(raw) = RawHeader::parse(&header) {
            prop_assert!(raw.body_bytes() <= limits::FRAME_BODY_BYTES_MAX);
        }
    }
}
