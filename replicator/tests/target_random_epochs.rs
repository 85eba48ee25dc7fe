//! Attacks the index: random overlapping extents (of single sectors, zeros, discards), random
//! passes, several epochs, promotion anywhere in between. What is read must equal a plain array.

mod target_support;

use proptest::prelude::{Strategy, any, prop_oneof};
use proptest::{collection, prop_assert, proptest};
use secondsite::target::disk::Disk;
use secondsite::target::disk::memory::MemoryDisk;
use secondsite::target::promote::promote;
use secondsite_format::extent::{Content, Extent, ExtentKind};
use secondsite_format::frame::{Frame, FrameHeader, FrameKind};
use secondsite_format::ids::{Epoch, Generation};
use secondsite_format::manifest::EpochDigest;
use target_support::{KEY, SYNC, Script, VOLUME_BYTES, apply, commit_frame, open};

const SECTOR: u64 = 512;
const SECTORS: u64 = VOLUME_BYTES / SECTOR;

/// Gaps and lengths in sectors, made into rising extents that fit the volume.
fn frame() -> impl Strategy<Value = (u32, Content)> {
    let kind = prop_oneof![
        2 => proptest::strategy::Just(ExtentKind::Data),
        1 => proptest::strategy::Just(ExtentKind::Zero),
        1 => proptest::strategy::Just(ExtentKind::Discard),
    ];
    let rows = collection::vec((0..40u64, 1..24u64, kind), 1..6);
    (1..4u32, rows, any::<u8>()).prop_map(|(pass, rows, fill)| {
        let mut at = 0;
        let mut extents = Vec::new();
        let mut payload = Vec::new();
        for (gap, count, kind) in rows {
            let start = at + gap;
            let count = count.min(SECTORS.saturating_sub(start));
            if count == 0 {
                break;
            }
            extents.push(Extent { offset: start * SECTOR, bytes: count * SECTOR, kind });
            if kind == ExtentKind::Data {
                payload.extend((0..count * SECTOR).map(|i| fill ^ (i / SECTOR) as u8));
            }
            at = start + count;
        }
        (pass, Content::new(extents, payload).expect("rising and whole sectors"))
    })
}

proptest! {
    #[test]
    fn whatever_comes_reads_as_in_a_plain_array(
        epochs in collection::vec((collection::vec(frame(), 0..6), any::<bool>()), 1..6),
    ) {
        let disk = MemoryDisk::default();
        let keeper = open(disk.clone()).unwrap();
        keeper.copy_begin(SYNC).unwrap();
        keeper.copy_done(SYNC).unwrap();
        let mut model = vec![0; VOLUME_BYTES as usize];
        let mut chain = [0; 32];
        for (i, (frames, promoted)) in epochs.iter().enumerate() {
            let script = Script::new(i as u64 + 1, vec![]);
            let mut digest = EpochDigest::default();
            for (seq, (pass, content)) in frames.iter().enumerate() {
                let header = FrameHeader {
                    kind: FrameKind::Data,
                    generation: Generation(1),
                    epoch: Epoch(script.epoch),
                    cut_id: script.cut_id,
                    pass: *pass,
                    seq: seq as u32,
                    offset: content.extents().first().map_or(0, |extent| extent.offset),
                };
                keeper.data(&Frame::new(header, content.encode())).unwrap();
                digest.add(&content.digest());
            }
            let mut manifest = script.manifest(chain);
            manifest.frames = digest.frames();
            manifest.content = digest.finish();
            keeper.commit(&commit_frame(manifest, &KEY), &KEY).unwrap();
            chain = keeper.volume().durable().unwrap().chain;
            let mut order: Vec<_> = frames.iter().collect();
            order.sort_by_key(|(pass, _)| *pass);
            order.iter().for_each(|(_, content)| apply(&mut model, content));
            if *promoted {
                promote(&keeper, Epoch(script.epoch), &|| true).unwrap();
            }
            let mut found = vec![0; VOLUME_BYTES as usize];
            keeper.view().unwrap().read(0, &mut found).unwrap();
            prop_assert!(found == model, "after epoch {}", script.epoch);
        }
        promote(&keeper, Epoch(epochs.len() as u64), &|| true).unwrap();
        prop_assert!(disk.read("replica.img", VOLUME_BYTES).unwrap().unwrap() == model);
    }
}
