//! Round trips of everything a peer may say, against values made at random.

use crate::samples;
use proptest::prelude::*;
use secondsite_format::extent::{Content, Extent, ExtentKind};
use secondsite_format::frame::{Frame, FrameHeader, FrameKind, HEADER_BYTES, RawHeader};
use secondsite_format::ids::{CutId, Epoch, Generation, ServerId, VolumeId};
use secondsite_format::manifest::{Consistency, CutMethod, Manifest, SignedManifest};
use secondsite_format::message::{Message, Reply, Request};
use std::collections::BTreeSet;

const SECTOR: u64 = 512;

/// Extents with gaps between them, and a payload that is partly compressible.
fn contents() -> impl Strategy<Value = Content> {
    let piece = (0u64..64, 1u64..16, 0u8..3, any::<u8>(), any::<bool>());
    prop::collection::vec(piece, 0..40).prop_map(|pieces| {
        let mut at = 0;
        let mut extents = Vec::new();
        let mut payload = Vec::new();
        for (gap, sectors, kind, byte, same) in pieces {
            let kind = [ExtentKind::Data, ExtentKind::Zero, ExtentKind::Discard][kind as usize];
            let offset = at + gap * SECTOR;
            let bytes = sectors * SECTOR;
            at = offset + bytes;
            extents.push(Extent { offset, bytes, kind });
            if kind == ExtentKind::Data {
                let step = if same { 0 } else { 97 };
                payload.extend((0..bytes).map(|i| byte.wrapping_add((i * i * step) as u8)));
            }
        }
        Content::new(extents, payload).expect("rising extents")
    })
}

fn manifests() -> impl Strategy<Value = Manifest> {
    let ids = || prop::collection::btree_set(any::<[u8; 16]>(), 0..20);
    let ranges = prop::collection::vec((any::<u64>(), any::<u64>()), 0..20);
    let numbers = (1u64.., 1u64.., any::<u64>(), any::<u64>(), any::<u32>());
    let digests = (any::<[u8; 32]>(), any::<[u8; 32]>(), any::<[u8; 16]>());
    (ids(), ids(), ranges, numbers, digests, 0u8..3).prop_map(
        |(mut members, lacking, ranges, numbers, (previous, content, volume), kind)| {
            members.insert(volume);
            let consistency =
                [Consistency::Fuzzy, Consistency::Crash, Consistency::Application][kind as usize];
            let ids = |ids: BTreeSet<[u8; 16]>| ids.into_iter().map(VolumeId).collect::<Vec<_>>();
            Manifest {
                server: ServerId([9; 16]),
                volume: VolumeId(volume),
                volume_bytes: numbers.2,
                generation: Generation(numbers.0),
                epoch: Epoch(numbers.1),
                cut_id: CutId([1; 16]),
                cut_time_ns: numbers.3,
                consistency,
                method: CutMethod::Freeze,
                previous,
                frames: numbers.4,
                content,
                doubt_from: Epoch(0),
                members: ids(members),
                lacking: ids(lacking),
                unreadable: if kind == 0 { ranges } else { Vec::new() },
            }
        },
    )
}

proptest! {
    #[test]
    fn content_survives_the_wire(content in contents()) {
        let end = content.extents().last().map_or(0, Extent::end);
        let decoded = Content::decode(&content.encode(), end).unwrap();
        prop_assert_eq!(&decoded, &content);
        prop_assert_eq!(decoded.digest(), content.digest());
        // One sector less, and its last extent does not fit any more.
        if end > 0 {
            prop_assert!(Content::decode(&content.encode(), end - SECTOR).is_err());
        }
    }

    #[test]
    fn manifests_survive_the_wire(manifest in manifests()) {
        let sign = |_: &[u8]| Ok::<_, ()>([7; 64]);
        let signed = SignedManifest::sign(manifest, [4; 65], sign).unwrap();
        prop_assert_eq!(SignedManifest::decode(&signed.encode()).unwrap(), signed);
    }

    #[test]
    fn headers_survive_the_wire(
        numbers in any::<(u64, u64, u64, u32, u32)>(),
        cut in any::<[u8; 16]>(),
        body in prop::collection::vec(any::<u8>(), 0..200),
    ) {
        let header = FrameHeader {
            kind: FrameKind::SyncData,
            generation: Generation(numbers.0),
            epoch: Epoch(numbers.1),
            cut_id: CutId(cut),
            pass: numbers.3,
            seq: numbers.4,
            offset: numbers.2,
        };
        let frame = Frame::new(header, body);
        let raw = RawHeader::parse(frame.header_bytes()).unwrap();
        let again = raw.with_body(frame.body.clone()).unwrap();
        prop_assert_eq!(again.header, header);
    }

    #[test]
    fn messages_survive_the_wire(
        digests in prop::collection::vec(any::<[u8; 32]>(), 0..4096),
        upto in any::<u64>(),
    ) {
        let reply = Reply::Digests(digests);
        prop_assert_eq!(&Reply::from_frame(&reply.to_frame()).unwrap(), &reply);
        let request = Request::CopyFlush { upto };
        prop_assert_eq!(&Request::from_frame(&request.to_frame()).unwrap(), &request);
        // A reply is no request, whatever its bytes.
        prop_assert!(Request::from_frame(&reply.to_frame()).is_err());
    }

    /// Any change of any bit of a frame is noticed, before its body is believed.
    #[test]
    fn one_flipped_bit_is_noticed(which in 0usize..17, place in any::<prop::sample::Index>()) {
        let (name, frame) = samples::all().swap_remove(which);
        let mut bytes = samples::bytes(&frame);
        let bit = place.index(bytes.len() * 8);
        bytes[bit / 8] ^= 1 << (bit % 8);
        let header: &[u8; HEADER_BYTES] = bytes[..HEADER_BYTES].try_into().unwrap();
        let read = RawHeader::parse(header)
            .and_then(|raw| raw.with_body(bytes[HEADER_BYTES..].to_vec()));
        prop_assert!(read.is_err(), "{} with bit {} flipped was accepted", name, bit);
    }
}
