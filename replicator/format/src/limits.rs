//! Every limit of wire and disk, in one place; relations between them are checked at compile time.

/// Largest uncompressed payload of a frame, bytes; also the largest data extent.
pub const FRAME_PAYLOAD_BYTES_MAX: usize = 1 << 20;
/// Most extents in one frame.
pub const FRAME_EXTENTS_MAX: usize = 4096;
/// Largest frame body, bytes: a full extent table and an incompressible payload.
pub const FRAME_BODY_BYTES_MAX: usize =
    FRAME_PAYLOAD_BYTES_MAX + FRAME_EXTENTS_MAX * crate::extent::EXTENT_BYTES + 4096;
/// Largest control message (hello, request, reply, refusal), bytes as encoded.
pub const MESSAGE_BYTES_MAX: usize = 256 << 10;
/// Largest signed manifest, bytes.
pub const MANIFEST_BYTES_MAX: usize = 64 << 10;
/// Most volumes of one server in one recovery point.
pub const MEMBERS_MAX: usize = 256;
/// Most byte ranges that a manifest names as unreadable.
pub const UNREADABLE_MAX: usize = 1024;
/// Most digests in one reply.
pub const DIGESTS_MAX: usize = 4096;
/// Largest volume, bytes: the two highest bits of an extent's length hold its kind.
pub const VOLUME_BYTES_MAX: u64 = 1 << 62;
/// Smallest and largest block, bytes (both powers of two).
pub const BLOCK_BYTES_MIN: u32 = 4 << 10;
/// See [`BLOCK_BYTES_MIN`].
pub const BLOCK_BYTES_MAX: u32 = 1 << 20;

const _: () = assert!(BLOCK_BYTES_MAX as usize <= FRAME_PAYLOAD_BYTES_MAX);
const _: () = assert!(MANIFEST_BYTES_MAX <= FRAME_BODY_BYTES_MAX);
const _: () = assert!(MESSAGE_BYTES_MAX <= FRAME_BODY_BYTES_MAX);
const _: () = assert!(DIGESTS_MAX * 32 + 64 <= MESSAGE_BYTES_MAX);
const _: () = assert!(MEMBERS_MAX * 16 * 2 + UNREADABLE_MAX * 16 + 1024 <= MANIFEST_BYTES_MAX);
