//! Attacks the journal at rest and the disk below it: damage, newer formats, a full disk, a sync
//! that fails. Nothing may be guessed around, and nothing that was not understood may be changed.

mod target_support;

use secondsite::target::disk::Disk;
use secondsite::target::disk::memory::MemoryDisk;
use secondsite::target::keeper::Keeper;
use secondsite::target::promote::promote;
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

#[test]
fn newer_formats_are_refused_and_left_alone() {
    let disk = MemoryDisk::default();
    receive(&copied(&disk), &one_block(1));
    let segment = disk.open("journal/00000001.seg").unwrap();
    segment.write_at(4, &[2, 0]).unwrap();
    let before = disk.operations();
    let error = open(disk.clone()).err().expect("a newer segment").to_string();
    assert!(error.contains("newer Secondsite") && error.contains("upgrade"), "{error}");
    segment.write_at(4, &[1, 0]).unwrap();
    let state = disk.read("state.json", 1 << 20).unwrap().unwrap();
    let newer = String::from_utf8(state).unwrap().replace("\"format\": 1", "\"format\": 2");
    disk.replace("state.json", newer.as_bytes()).unwrap();
    let changed = disk.operations();
    let error = open(disk.clone()).err().expect("a newer state").to_string();
    assert!(error.contains("format 2") && error.contains("upgrade"), "{error}");
    assert_eq!(disk.operations(), changed, "a newer state was changed");
    // This test's own six, and the syncs of folder, replica and segment before it was read.
    assert_eq!(changed - before, 9, "a newer segment was changed");
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
