//! Attacks a replica volume on a block device: one that is mounted or held, one too small, one
//! that changed its place; and shows that a good one is written and zeroed. Needs root and loop
//! devices: feature `real`.

mod target_support;

use secondsite::target::disk::Folder;
use secondsite::target::keeper::{Keeper, OpenError, VolumeSpec};
use secondsite::target::promote::promote;
use secondsite::target::space::Space;
use secondsite_format::ids::Epoch;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use target_support::{KEY, Put, SYNC, Script, VOLUME_BYTES, spec, sync_frame, verify};

/// A loop device, detached when dropped.
struct Loop(PathBuf);

impl Loop {
    fn new(file: &Path, bytes: u64) -> Self {
        // Not zero before: nobody may count on that.
        std::fs::write(file, vec![0xd5; bytes as usize]).unwrap();
        let made = Command::new("losetup").args(["-f", "--show"]).arg(file).output().unwrap();
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        Self(String::from_utf8(made.stdout).unwrap().trim().into())
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let detached = Command::new("losetup").arg("-d").arg(&self.0).status();
        assert!(detached.is_ok_and(|status| status.success()), "detaching {}", self.0.display());
    }
}

fn open(store: &Path, device: &Path) -> Result<Keeper, OpenError> {
    std::fs::create_dir_all(store).unwrap();
    let folder = Folder::create(store, "servers/a/b", &["journal", "history"]).unwrap();
    let spec = VolumeSpec { device: Some(device.to_owned()), ..spec() };
    Keeper::open(Arc::new(folder), Some(&spec), Arc::new(Space::new(0)), Arc::default(), verify)
}

#[test]
fn a_device_becomes_the_volume_and_is_held() {
    let dir = tempfile::tempdir().unwrap();
    let device = Loop::new(&dir.path().join("disk"), VOLUME_BYTES + 4096);
    let keeper = open(dir.path(), &device.0).unwrap();
    assert!(!keeper.welcome().unwrap().reads_zero, "nobody knows what it held");
    let error = open(&dir.path().join("other"), &device.0).err();
    let error = error.or_else(|| open(dir.path(), &device.0).err()).expect("held").to_string();
    assert!(error.contains("is in use") && error.contains(device.0.to_str().unwrap()), "{error}");
    keeper.copy_begin(SYNC).unwrap();
    keeper.copy_data(&sync_frame(&[Put::Fill(0, 1), Put::Zero(1, 15)])).unwrap();
    keeper.copy_done(SYNC).unwrap();
    let script = Script::new(1, vec![(1, vec![Put::Fill(3, 3), Put::Discard(4, 2)])]);
    script.data().iter().for_each(|frame| keeper.data(frame).unwrap());
    keeper.commit(&script.commit([0; 32]), &KEY).unwrap();
    promote(&keeper, Epoch(1), &|| true).unwrap();
    drop(keeper);
    let mut model = vec![0; VOLUME_BYTES as usize];
    target_support::apply(&mut model, &target_support::content(&[Put::Fill(0, 1)]));
    script.apply(&mut model);
    let found = std::fs::read(&device.0).unwrap();
    assert!(found[..VOLUME_BYTES as usize] == model);
    assert!(found[VOLUME_BYTES as usize..].iter().all(|byte| *byte == 0xd5), "beyond the volume");
    // Another device in target.toml is not silently taken for it.
    let other = Loop::new(&dir.path().join("other-disk"), VOLUME_BYTES);
    let error = open(dir.path(), &other.0).err().expect("moved").to_string();
    assert!(error.contains("target.toml now says"), "{error}");
}

#[test]
fn a_mounted_or_small_device_is_refused_with_the_remedy() {
    let dir = tempfile::tempdir().unwrap();
    let small = Loop::new(&dir.path().join("small"), VOLUME_BYTES - 4096);
    let error = open(dir.path(), &small.0).err().expect("too small").to_string();
    assert!(error.contains(small.0.to_str().unwrap()) && error.contains("at least"), "{error}");
    let mounted = Loop::new(&dir.path().join("mounted"), 4 << 20);
    let made = Command::new("mkfs.ext4").arg("-q").arg(&mounted.0).status().unwrap();
    assert!(made.success());
    let point = dir.path().join("mnt");
    std::fs::create_dir(&point).unwrap();
    assert!(Command::new("mount").arg(&mounted.0).arg(&point).status().unwrap().success());
    let error = open(&dir.path().join("m"), &mounted.0).err();
    assert!(Command::new("umount").arg(&point).status().unwrap().success());
    let error = error.expect("mounted").to_string();
    assert!(error.contains("is in use") && error.contains("unmount"), "{error}");
}
