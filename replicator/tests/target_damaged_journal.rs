//! Attacks the journal at rest and the disk below it: damage, newer formats, a full disk, a sync
//! that fails. Nothing may be guessed around, and nothing that was not understood may be changed.

mod target_support;

use secondsite::target::disk::Disk;
use secondsite::target::disk::memory::MemoryDisk;
use secondsite::target::keeper::Keeper;
use secondsite::target::promote::promote;
use secondsite_format::frame::Frame;
use secondsite_format::ids::Epoch;
use secondsite_format::message::RefusalCode;
use target_support::{KEY, Put, SYNC, Script, VOLUME_BYTES, open, sync_frame};

fn copied(disk: &MemoryDisk) -> Keeper {
    let keeper = open(disk.clone()).unwrap();
    keeper.copy_begin(SYNC).unwrap();
    keeper.copy_data(&sync_frame(&[Put::Fill(0, 1)])).unwrap();
    keeper.copy_done(SYNC).unwrap();
    keeper
}

fn receive(keeper: &Keeper, script: &Script) {
    script.data().iter().for_each(|frame| keeper.data(frame).unwrap());
    let previous = keeper.volume().durable().map_or([0; 32], |facts| facts.chain);
    keeper.commit(&script.commit(previous), &KEY).unwrap();
}

fn one_block(epoch: u64) -> Script {
    Script::new(epoch, vec![(1, vec![Put::Fill(epoch, epoch as u8)])])
}

#[test]
fn damage_before_a_commit_stops_the_volume_and_names_the_place() {
    let disk = MemoryDisk::default();
    let keeper = copied(&disk);
    receive(&keeper, &one_block(1));
    drop(keeper);
    let before = disk.read("journal/00000001.seg", 1 << 20).unwrap().unwrap();
    disk.damage("journal/00000001.seg", 600);
    let error = open(disk.clone()).err().expect("damage is not believed").to_string();
    assert!(error.contains("journal/00000001.seg is damaged at offset 512"), "{error}");
    assert!(error.contains("epoch 1 was committed behind it"), "{error}");
    disk.damage("journal/00000001.seg", 600); // flips it back
    let after = disk.read("journal/00000001.seg", 1 << 20).unwrap().unwrap();
    assert!(before == after, "opening changed what it could not read");
    assert_eq!(open(disk).unwrap().volume().durable().unwrap().epoch, Epoch(1));
}

#[test]
fn a_missing_segment_before_a_commit_stops_the_volume() {
    let disk = MemoryDisk::default();
    let keeper = copied(&disk);
    (1..=6).for_each(|epoch| receive(&keeper, &one_block(epoch)));
    assert!(disk.list("journal").unwrap().len() > 2, "the test needs several segments");
    drop(keeper);
    disk.remove("journal/00000002.seg").unwrap();
    let error = open(disk).err().expect("a gap is not believed").to_string();
    assert!(error.contains("00000002.seg is missing"), "{error}");
}

/// The newest commit, unreadable, looks like one that was never acknowledged; but a promotion of it
/// may have written a part of it into the replica volume.
#[test]
fn a_begun_promotion_without_its_epoch_is_damage() {
    let disk = MemoryDisk::default();
    let keeper = copied(&disk);
    receive(&keeper, &one_block(1));
    let (record, _) = keeper.volume().plan_promotion(Epoch(1)).expect("an epoch");
    record.store(&disk).unwrap();
    let end = disk.open("journal/00000001.seg").unwrap().bytes().unwrap() as usize;
    drop(keeper);
    disk.damage("journal/00000001.seg", end - 1);
    let before = disk.read("journal/00000001.seg", 1 << 20).unwrap().unwrap();
    let error = open(disk.clone()).err().expect("half a promotion is not believed").to_string();
    assert!(error.contains("damaged") && error.contains("epoch 1 was committed"), "{error}");
    assert!(disk.read("journal/00000001.seg", 1 << 20).unwrap().unwrap() == before);
    disk.damage("journal/00000001.seg", end - 1); // flips it back
    assert_eq!(open(disk).unwrap().volume().durable().unwrap().epoch, Epoch(1));
}

#[test]
fn what_stands_behind_the_last_commit_is_dropped() {
    let disk = MemoryDisk::default();
    let keeper = copied(&disk);
    receive(&keeper, &one_block(1));
    let torn = one_block(2).data();
    keeper.data(&torn[0]).unwrap();
    assert!(keeper.volume().staged().is_some());
    drop(keeper);
    let keeper = open(disk).unwrap();
    assert_eq!(keeper.volume().durable().unwrap().epoch, Epoch(1));
    assert_eq!(keeper.volume().staged(), None);
    receive(&keeper, &one_block(2));
}

/// Every file with its content.
fn everything(disk: &MemoryDisk) -> Vec<(String, Vec<u8>)> {
    let journal = disk.list("journal").unwrap();
    let journal = journal.into_iter().map(|name| format!("journal/{name}"));
    let names = disk.list("").unwrap().into_iter().chain(journal);
    let content = |name: &str| disk.read(name, 1 << 30).unwrap().unwrap();
    names.map(|name| (name.clone(), content(&name))).collect()
}

/// Opens a disk that holds something newer; says what, and sees that nothing was changed.
fn refused(disk: &MemoryDisk, what: &str) {
    let before = everything(disk);
    let error = open(disk.clone()).err().unwrap_or_else(|| panic!("{what} was read")).to_string();
    for part in [what, "newer Secondsite", "install the newer one", "nothing was changed"] {
        assert!(error.contains(part), "{what}: no {part:?} in: {error}");
    }
    assert!(everything(disk) == before, "{what} was changed");
}

#[test]
fn newer_formats_are_refused_and_left_alone() {
    let disk = MemoryDisk::default();
    receive(&copied(&disk), &one_block(1));
    let segment = disk.open("journal/00000001.seg").unwrap();
    segment.write_at(4, &[2, 0]).unwrap();
    refused(&disk, "segment version 2, this one reads up to 1");
    segment.write_at(4, &[1, 0]).unwrap();
    let state = disk.read("state.json", 1 << 20).unwrap().unwrap();
    let newer = String::from_utf8(state).unwrap().replace("\"format\": 3", "\"format\": 4");
    disk.replace("state.json", newer.as_bytes()).unwrap();
    refused(&disk, "format 4, this one reads up to 3");
}

/// An epoch of a newer version in a segment of this one: it was acknowledged, and this version
/// cannot see that. Taken for a torn tail it would be cut off.
#[test]
fn newer_frames_and_manifests_are_refused_and_left_alone() {
    for (what, epoch) in [("frame", 2), ("manifest", 2), ("frame", 1), ("manifest", 1)] {
        let disk = MemoryDisk::default();
        let keeper = copied(&disk);
        receive(&keeper, &one_block(1));
        let first = keeper.volume().durable().unwrap().chain;
        let segment = disk.open("journal/00000001.seg").unwrap();
        let (script, at, previous) = match epoch {
            1 => (one_block(1), 512, [0; 32]),
            _ => (one_block(2), segment.bytes().unwrap(), first),
        };
        drop(keeper);
        let (data, commit) = (script.data().remove(0), script.commit(previous));
        let mut bytes = [data.header_bytes().as_slice(), &data.body].concat();
        if what == "frame" {
            bytes[4] = 2;
        } else {
            let mut body = commit.body.clone();
            body[136 + 4] = 2; // behind key and signature, the magic
            let newer = Frame::new(commit.header, body);
            bytes.extend(newer.header_bytes());
            bytes.extend(&newer.body);
        }
        segment.write_at(at, &bytes).unwrap();
        segment.sync().unwrap();
        refused(&disk, &format!("{what} version 2, this one reads up to 1"));
    }
}

#[test]
fn a_failed_sync_is_never_retried_and_believed() {
    let disk = MemoryDisk::default();
    let keeper = copied(&disk);
    receive(&keeper, &one_block(1));
    let script = one_block(2);
    keeper.data(&script.data()[0]).unwrap();
    disk.fail_syncs();
    let commit = script.commit(keeper.volume().durable().unwrap().chain);
    let refusal = keeper.commit(&commit, &KEY).unwrap_err();
    assert_eq!(refusal.code, RefusalCode::Storage);
    assert_eq!(keeper.commit(&commit, &KEY).unwrap_err().code, RefusalCode::Storage);
    assert_eq!(keeper.welcome().unwrap_err().code, RefusalCode::Storage);
    assert_eq!(keeper.volume().durable().unwrap().epoch, Epoch(1));
}

#[test]
fn a_full_disk_loses_nothing_and_goes_on_when_there_is_room() {
    let disk = MemoryDisk::default();
    let keeper = copied(&disk);
    receive(&keeper, &one_block(1));
    let script = one_block(2);
    // Said beforehand by the file system.
    disk.set_free_bytes(100);
    assert_eq!(keeper.data(&script.data()[0]).unwrap_err().code, RefusalCode::NoSpace);
    disk.set_free_bytes(1 << 30);
    // Found out while writing, half of it written: data, then commit.
    for writes in 0..2 {
        disk.full_after(Some(writes));
        assert_eq!(keeper.data(&script.data()[0]).unwrap_err().code, RefusalCode::NoSpace);
    }
    disk.full_after(None);
    keeper.data(&script.data()[0]).unwrap();
    disk.full_after(Some(1));
    let commit = script.commit(keeper.volume().durable().unwrap().chain);
    assert_eq!(keeper.commit(&commit, &KEY).unwrap_err().code, RefusalCode::NoSpace);
    disk.full_after(None);
    keeper.commit(&commit, &KEY).unwrap();
    drop(keeper);
    let keeper = open(disk).unwrap();
    assert_eq!(keeper.volume().durable().unwrap().epoch, Epoch(2));
}

#[test]
fn promotion_that_finds_no_space_goes_on_later() {
    let disk = MemoryDisk::default();
    let keeper = copied(&disk);
    let mut model = vec![0; VOLUME_BYTES as usize];
    target_support::apply(&mut model, &target_support::content(&[Put::Fill(0, 1)]));
    let script =
        Script::new(1, (1..9).map(|block| (1, vec![Put::Fill(block, block as u8)])).collect());
    receive(&keeper, &script);
    script.apply(&mut model);
    disk.full_after(Some(4));
    let refusal = promote(&keeper, Epoch(1), &|| true).unwrap_err();
    assert_eq!(refusal.code, RefusalCode::NoSpace);
    assert!(keeper.volume().record().promoting.is_some(), "the replica is between two");
    disk.full_after(None);
    // Nobody asks for epoch 1 any more, and yet what was begun is finished.
    assert!(promote(&keeper, Epoch(0), &|| true).unwrap());
    assert!(disk.read("replica.img", VOLUME_BYTES).unwrap().unwrap() == model);
}

#[test]
fn space_that_promotion_needs_is_not_given_to_the_journal() {
    let disk = MemoryDisk::default();
    let keeper = copied(&disk);
    let script = one_block(1);
    let frame = &script.data()[0];
    // Enough for the frame, not for what it unpacks to in the replica.
    disk.set_free_bytes(frame.total_bytes() + 4000);
    assert_eq!(keeper.data(frame).unwrap_err().code, RefusalCode::NoSpace);
    disk.set_free_bytes(frame.total_bytes() + 4096);
    keeper.data(frame).unwrap();
}
