//! Frames, extents, manifests and messages.

use secondsite_format::extent::{Content, ExtentKind};
use secondsite_format::frame::{Frame, FrameHeader, FrameKind, HEADER_BYTES, RawHeader};
use secondsite_format::limits;
use secondsite_format::manifest::{Consistency, SignedManifest};
use secondsite_format::message::{Hello, Message, Refusal, Reply, Request, Welcome};
use xxhash_rust::xxh3::Xxh3;

/// Makes the digest of a frame's header right for its body.
fn mend(header: &mut [u8; HEADER_BYTES], body: &[u8]) {
    let mut hash = Xxh3::new();
    hash.update(&header[..64]);
    hash.update(body);
    header[64..].copy_from_slice(&hash.digest128().to_le_bytes());
}

/// A header and the body behind it, whatever its digest.
pub(super) fn split(bytes: &[u8]) -> Option<(RawHeader, Frame)> {
    let (header, rest) = bytes.split_first_chunk::<HEADER_BYTES>()?;
    let raw = RawHeader::parse(header).ok()?;
    assert!(raw.body_bytes() <= raw.kind().body_bytes_max());
    let body = rest.get(..raw.body_bytes())?;
    let mut header = *header;
    mend(&mut header, body);
    let mended = RawHeader::parse(&header).expect("only its digest was changed");
    let frame = mended.with_body(body.to_vec()).expect("its digest is right");
    assert_eq!(frame.header_bytes(), &header);
    Some((raw, frame))
}

/// Header, then body.
pub fn frame(bytes: &[u8]) {
    let Some((raw, frame)) = split(bytes) else { return };
    // As it came: accepted only if it is the same.
    if let Ok(same) = raw.with_body(frame.body.clone()) {
        assert_eq!(same.header_bytes(), frame.header_bytes());
    }
    let again = Frame::new(frame.header, frame.body.clone());
    assert_eq!(again.header_bytes(), frame.header_bytes(), "the header came back another");
}

/// Size of the volume (u64), then a body of extents.
pub fn extents(bytes: &[u8]) {
    let Some((size, body)) = bytes.split_first_chunk() else { return };
    let size = u64::from_le_bytes(*size);
    let Ok(content) = Content::decode(body, size) else { return };
    assert!(content.payload().len() <= limits::FRAME_PAYLOAD_BYTES_MAX);
    assert!(content.extents().len() <= limits::FRAME_EXTENTS_MAX);
    let mut from = 0;
    let mut payload_bytes = 0;
    for (extent, bytes) in content.parts() {
        assert!(extent.offset >= from && extent.bytes > 0 && extent.end() <= size);
        from = extent.end();
        let due = if extent.kind == ExtentKind::Data { extent.bytes } else { 0 };
        assert_eq!(bytes.len() as u64, due);
        payload_bytes += bytes.len();
    }
    assert_eq!(payload_bytes, content.payload().len());
    let encoded = content.encode();
    assert!(encoded.len() <= limits::FRAME_BODY_BYTES_MAX);
    let again = Content::decode(&encoded, size).expect("what was accepted can be sent on");
    assert_eq!(again, content);
    assert_eq!(again.digest(), content.digest());
}

/// A signed manifest.
pub fn manifest(bytes: &[u8]) {
    let Ok(signed) = SignedManifest::decode(bytes) else { return };
    assert_eq!(signed.encode(), bytes, "a manifest came back another");
    let manifest = signed.manifest.clone();
    assert!(manifest.members.len() <= limits::MEMBERS_MAX);
    assert!(manifest.lacking.len() <= limits::MEMBERS_MAX);
    assert!(manifest.unreadable.len() <= limits::UNREADABLE_MAX);
    assert!(manifest.epoch.0 > 0 && manifest.generation.0 > 0 && !manifest.cut_id.is_none());
    assert!(manifest.consistency == Consistency::Fuzzy || manifest.unreadable.is_empty());
    let sign = |_: &[u8]| Ok::<_, std::convert::Infallible>(signed.signature);
    let Ok(again) = SignedManifest::sign(manifest, signed.public_key, sign);
    assert_eq!(again, signed);
}

/// Which message (u8), then its body.
pub fn message(bytes: &[u8]) {
    let Some((kind, body)) = bytes.split_first() else { return };
    if body.len() > limits::MESSAGE_BYTES_MAX {
        return;
    }
    match kind % 5 {
        0 => one::<Hello>(body),
        1 => one::<Welcome>(body),
        2 => one::<Request>(body),
        3 => one::<Reply>(body),
        _ => one::<Refusal>(body),
    }
}

fn one<M: Message>(body: &[u8]) {
    let kind: FrameKind = M::KIND;
    let frame = Frame::new(FrameHeader::message(kind), body.to_vec());
    if let Ok(message) = M::from_frame(&frame) {
        assert_eq!(message.to_frame().body, body, "a message came back another");
    }
}
