//! Inventories from recorded `lsblk` output.

use super::{Facts, WaitsFor, bounded, read};
use secondsite_control::api::InventoryDevice;
use std::path::Path;
use std::sync::{Mutex, mpsc};
use std::time::Duration;

/// A host as the fixtures were recorded on.
struct Recorded {
    ebpf: bool,
    filtered: bool,
}

impl Facts for Recorded {
    fn volume(&self, path: &Path) -> Result<(), String> {
        match path.to_str() {
            Some("/dev/sdb" | "/dev/sdc") => Err("member of md0: choose /dev/md0".into()),
            _ => Ok(()),
        }
    }
    fn filter(&self) -> Result<(), String> {
        if self.filtered { Ok(()) } else { Err("no filter runs".into()) }
    }
    fn filter_of(&self, path: &Path) -> Option<String> {
        (path == Path::new("/dev/ublkb0")).then(|| "vg0/pg".into())
    }
    fn ebpf(&self) -> Result<(), String> {
        if self.ebpf { Ok(()) } else { Err("the kernel has no BTF".into()) }
    }
    fn start_bytes(&self, kname: &str) -> Option<u64> {
        match kname {
            "sda3" => Some(2048 << 20),
            "loop7p1" => Some(1 << 20),
            _ => None,
        }
    }
    fn swap(&self, path: &Path) -> bool {
        path == Path::new("/dev/loop7p1")
    }
    fn backing(&self, kname: &str) -> Option<String> {
        (kname == "loop7").then(|| "/srv/disk.img".to_string())
    }
}

fn inventory(fixture: &str, ebpf: bool) -> Vec<InventoryDevice> {
    read(fixture.as_bytes(), &Recorded { ebpf, filtered: false }).unwrap()
}

fn find<'a>(devices: &'a [InventoryDevice], name: &str) -> &'a InventoryDevice {
    devices.iter().find(|device| device.name == name).unwrap_or_else(|| panic!("{name}"))
}

const SERVER: &str = include_str!("fixtures/server.json");
const LOOP: &str = include_str!("fixtures/loop.json");

#[test]
fn a_server_with_a_root_disk_and_lvm_over_raid() {
    let devices = inventory(SERVER, true);
    let names: Vec<_> = devices.iter().map(|device| device.name.as_str()).collect();
    assert_eq!(
        names,
        ["sda", "sda1", "sda2", "sda3", "sda4", "sdb", "md0", "vg0/pg", "vg0/pg-log", "sdc"],
        "each once, no optical drive, no memory disk"
    );
    let sda = find(&devices, "sda");
    assert_eq!(sda.used_by, "/boot/efi /boot /, swap");
    assert_eq!(sda.swap, [("sda3".to_string(), 2048 << 20, 17_179_869_184)]);
    assert_eq!(sda.parent, "");
    assert_eq!(sda.trackers, ["ebpf", "compare"]);
    assert_eq!(find(&devices, "sda4").parent, "sda");
    assert!(find(&devices, "sda3").swap.is_empty(), "a swap volume is taken as what it is");

    let sdb = find(&devices, "sdb");
    assert!(sdb.trackers.is_empty());
    assert!(sdb.refused.contains("choose /dev/md0"));
    let md = find(&devices, "md0");
    assert_eq!(
        (md.parent.as_str(), md.trackers.as_slice()),
        ("", ["compare".to_string()].as_slice())
    );
    let pg = find(&devices, "vg0/pg");
    assert_eq!((pg.parent.as_str(), pg.path.as_str()), ("md0", "/dev/mapper/vg0-pg"));
    assert_eq!(pg.used_by, "lvm: /var/lib/postgresql");
}

#[test]
fn loop_devices_and_hosts_without_udev_or_btf() {
    let devices = inventory(LOOP, false);
    let whole = find(&devices, "loop7");
    assert_eq!(whole.used_by, "/mnt/data, swap (file /srv/disk.img)");
    assert_eq!(whole.swap, [("loop7p1".to_string(), 1 << 20, 20_971_520)]);
    assert_eq!(whole.trackers, ["compare"]);
    assert_eq!(whole.refused, "the kernel has no BTF");
    assert_eq!(devices.len(), 3, "an empty zram device is no volume");
}

#[test]
fn nothing_attached_is_an_empty_inventory() {
    assert!(inventory("", true).is_empty());
    assert!(read(b"{\"blockdevices\": 3}", &Recorded { ebpf: true, filtered: false }).is_err());
}

#[test]
fn a_look_that_stalls_is_left_alone_until_it_ends() {
    static WAITS_FOR: Mutex<Option<WaitsFor>> = Mutex::new(None);
    let short = Duration::from_millis(1);
    let (answer, device) = mpsc::channel::<()>();
    let stalls = move || {
        *super::lock(&WAITS_FOR) = Some(WaitsFor::Device("/dev/sdx".into()));
        device.recv()
    };
    // The second does not even begin.
    let first = bounded(&WAITS_FOR, short, stalls).unwrap_err();
    assert!(["lsblk", "/dev/sdx"].contains(&first.as_str()), "{first}");
    let began = |_| unreachable!("a second look began");
    assert!(bounded(&WAITS_FOR, short, move || began(())).is_err());
    answer.send(()).unwrap();
    let patient = Duration::from_secs(10);
    let found = std::iter::repeat_with(|| bounded(&WAITS_FOR, patient, || 7)).find_map(Result::ok);
    assert_eq!(found, Some(7));
    // One that panics stands in nobody's way.
    assert!(bounded(&WAITS_FOR, patient, || panic!("a broken invariant")).is_err());
    assert_eq!(bounded(&WAITS_FOR, patient, || 8).ok(), Some(8));
}

#[test]
fn where_a_filter_runs_it_is_offered_for_what_it_can_be_put_under() {
    let devices = read(SERVER.as_bytes(), &Recorded { ebpf: true, filtered: true }).unwrap();
    // First where nothing changes for the users of the volume, last where they open another device.
    assert_eq!(find(&devices, "vg0/pg").trackers, ["ublk", "compare"]);
    assert_eq!(find(&devices, "vg0/pg").refused, "");
    assert_eq!(find(&devices, "sda").trackers, ["ebpf", "ublk", "compare"]);
    let filter = br#"{"blockdevices": [{"name": "ublkb0", "kname": "ublkb0", "path": "/dev/ublkb0",
        "type": "disk", "size": 1073741824, "mountpoints": [null], "fstype": null}]}"#;
    let devices = read(filter, &Recorded { ebpf: true, filtered: true }).unwrap();
    assert_eq!(devices[0].trackers, [""; 0]);
    assert!(devices[0].refused.contains("choose that volume"), "{}", devices[0].refused);
}
