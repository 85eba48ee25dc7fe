//! One fixed example of everything that has bytes; golden and damage tests share them.

use secondsite_format::extent::{Content, Extent, ExtentKind};
use secondsite_format::frame::{Frame, FrameHeader, FrameKind};
use secondsite_format::ids::{CutId, Epoch, Generation, ServerId, SyncId, VolumeId};
use secondsite_format::manifest::{Consistency, CutMethod, EpochDigest, Manifest, SignedManifest};
use secondsite_format::message::{
    CopyState, Hello, Message, PROTOCOL, Refusal, RefusalCode, Reply, Request, Welcome,
};

/// Size of the example volume.
pub const VOLUME_BYTES: u64 = 1 << 30;

/// Two data extents (one compressible run, one counter), a zero and a discard record.
pub fn content() -> Content {
    let extents = vec![
        Extent { offset: 4096, bytes: 4096, kind: ExtentKind::Data },
        Extent { offset: 8192, bytes: 1 << 20, kind: ExtentKind::Zero },
        Extent { offset: 4 << 20, bytes: 512, kind: ExtentKind::Data },
        Extent { offset: 512 << 20, bytes: 512 << 20, kind: ExtentKind::Discard },
    ];
    let mut payload = vec![0x5a; 4096];
    payload.extend((0..512u32).map(|i| (i % 251) as u8));
    Content::new(extents, payload).expect("a valid example")
}

/// The example as the second frame of epoch 7.
pub fn data_frame() -> Frame {
    let header = FrameHeader {
        kind: FrameKind::Data,
        generation: Generation(3),
        epoch: Epoch(7),
        cut_id: CutId([0xc7; 16]),
        pass: 2,
        seq: 1,
        offset: 4096,
    };
    Frame::new(header, content().encode())
}

/// The manifest of epoch 7.
pub fn manifest() -> Manifest {
    let mut digest = EpochDigest::default();
    digest.add(&content().digest());
    Manifest {
        server: ServerId([0x11; 16]),
        volume: VolumeId([0x22; 16]),
        volume_bytes: VOLUME_BYTES,
        generation: Generation(3),
        epoch: Epoch(7),
        cut_id: CutId([0xc7; 16]),
        cut_time_ns: 1_795_000_000_123_456_789,
        consistency: Consistency::Fuzzy,
        method: CutMethod::Unproven,
        previous: [0x33; 32],
        frames: digest.frames(),
        content: digest.finish(),
        doubt_from: Epoch(5),
        members: vec![VolumeId([0x22; 16]), VolumeId([0x44; 16])],
        lacking: vec![VolumeId([0x55; 16])],
        unreadable: vec![(65536, 4096)],
    }
}

/// The same, signed with a key and a signature that are no real ones.
pub fn signed() -> SignedManifest {
    let sign = |_: &[u8]| Ok::<_, std::convert::Infallible>([0x77; 64]);
    SignedManifest::sign(manifest(), [0x04; 65], sign).expect("infallible")
}

/// The commit frame of epoch 7.
pub fn commit_frame() -> Frame {
    let header = FrameHeader {
        kind: FrameKind::Commit,
        generation: Generation(3),
        epoch: Epoch(7),
        cut_id: CutId([0xc7; 16]),
        pass: 0,
        seq: 2,
        offset: 0,
    };
    Frame::new(header, signed().encode())
}

/// A hello.
pub fn hello() -> Hello {
    Hello {
        protocol: PROTOCOL,
        server: ServerId([0x11; 16]),
        machine: [0x66; 32],
        volume: VolumeId([0x22; 16]),
        volume_bytes: VOLUME_BYTES,
        block_bytes: 4096,
        generation: Generation(3),
        acknowledged: (Epoch(6), CutId([0xc6; 16])),
    }
}

/// A welcome.
pub fn welcome() -> Welcome {
    Welcome {
        protocol: PROTOCOL,
        generation: Generation(3),
        copy: CopyState::Copying { sync: SyncId([0x88; 16]), cursor: 77 << 20 },
        durable: (Epoch(6), CutId([0xc6; 16])),
        chain: [0x99; 32],
        staged: Some((CutId([0xc7; 16]), 9)),
        reads_zero: true,
    }
}

/// Every request and reply, and a refusal, each in a frame and with a name.
pub fn messages() -> Vec<(&'static str, Frame)> {
    let cut_id = CutId([0xc7; 16]);
    let sync = SyncId([0x88; 16]);
    let committed = Reply::Committed {
        generation: Generation(3),
        epoch: Epoch(7),
        cut_id,
        chain: signed().chain_digest(),
    };
    let refusal = Refusal { code: RefusalCode::Mismatch, message: "another size".into() };
    let digests = Request::Digests { offset: 1 << 20, bytes: 1 << 24, piece_bytes: 1 << 16 };
    vec![
        ("hello", hello().to_frame()),
        ("welcome", welcome().to_frame()),
        ("request-ping", Request::Ping.to_frame()),
        ("request-barrier", Request::Barrier.to_frame()),
        ("request-give-up", Request::GiveUp { cut_id }.to_frame()),
        ("request-copy-begin", Request::CopyBegin { sync }.to_frame()),
        ("request-copy-flush", Request::CopyFlush { upto: 77 << 20 }.to_frame()),
        ("request-copy-done", Request::CopyDone { sync }.to_frame()),
        ("request-digests", digests.to_frame()),
        ("reply-alive", Reply::Alive.to_frame()),
        ("reply-staged", Reply::Staged(Some((cut_id, 9))).to_frame()),
        ("reply-copied-to", Reply::CopiedTo(77 << 20).to_frame()),
        ("reply-digests", Reply::Digests(vec![[0; 32], [0xab; 32]]).to_frame()),
        ("reply-committed", committed.to_frame()),
        ("refusal", refusal.to_frame()),
    ]
}

/// Everything above as named frames.
pub fn all() -> Vec<(&'static str, Frame)> {
    let mut all = messages();
    all.push(("data", data_frame()));
    all.push(("commit", commit_frame()));
    all
}

/// Header and body in one.
pub fn bytes(frame: &Frame) -> Vec<u8> {
    [frame.header_bytes().as_slice(), &frame.body].concat()
}
