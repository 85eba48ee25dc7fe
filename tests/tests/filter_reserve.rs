//! The reserve of a filtered volume, in the kernel lab: points that need the spill area, and what is
//! sent after a power cut. Over the device in SECONDSITE_LAB_DEVICES (a partition, filled with
//! something) and the reserve in SECONDSITE_LAB_RESERVE, with a running `secondsite filter` in
//! SECONDSITE_FILTER_DIR whose list is SECONDSITE_FILTER_LIST.

use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use secondsite::filter::client::Client;
use secondsite_control::api::TrackerChoice;
use secondsite_tests::load::Load;
use secondsite_tests::random::Random;
use secondsite_tests::site::InProcess;
use secondsite_tests::stamps::Stamps;
use secondsite_tests::wait_until;
use secondsite_tracker::ublk::Control;
use secondsite_tracker::ublk::device::is_ours;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// Blocks that are written under load: many more than memory has room to preserve.
const PLACES: u64 = 400;
const POINTS: u64 = 25;
const REGION_BYTES: u64 = 4 << 20;
const BLOCK: usize = 4096;

fn path_of(name: &str) -> PathBuf {
    std::env::var_os(name).expect(name).into()
}

/// Kilobytes that the kernel has written to a device.
fn written_kib(device: &Path) -> u64 {
    let name = device.file_name().expect("a node").to_str().expect("UTF-8");
    let text = std::fs::read_to_string(format!("/sys/class/block/{name}/stat")).expect("counters");
    text.split_whitespace().nth(6).and_then(|n| n.parse::<u64>().ok()).expect("a number") / 2
}

#[test]
#[ignore = "needs the kernel lab: tests/lab/reserve.sh"]
fn points_spill_and_a_power_cut_sends_little() {
    let mut random = Random::printed("filter_reserve");
    let (device, reserve) = (path_of("SECONDSITE_LAB_DEVICES"), path_of("SECONDSITE_LAB_RESERVE"));
    let (dir, list) = (path_of("SECONDSITE_FILTER_DIR"), path_of("SECONDSITE_FILTER_LIST"));
    let folder = tempfile::tempdir().expect("a folder");
    let devices = [device.clone()];
    let tracker = TrackerChoice::Ublk;
    let mut site =
        InProcess::start_with(folder.path(), &devices, tracker, &dir, Some(reserve.as_path()));
    site.follow();
    let name = PathBuf::from("/dev/secondsite/disk0");

    // More is overwritten before it is read than memory could preserve.
    let before = written_kib(&reserve);
    let stamps = Stamps::new(std::slice::from_ref(&name), PLACES);
    let load = Load::start((0..6).map(|_| stamps.writer(&mut random)).collect());
    let mut highest = 0;
    for point in 0..POINTS {
        let exact = site.cut().unwrap_or_else(|why| panic!("point {point}: {why}"));
        assert!(exact, "point {point} is fuzzy");
        let up_to = stamps.check(&site.replicas()).unwrap_or_else(|why| panic!("{point}: {why}"));
        assert!(up_to >= highest, "point {point} went back from {highest} to {up_to}");
        highest = up_to;
    }
    load.stop();
    let (spilled, given_up) = (written_kib(&reserve) - before, site.given_up());
    eprintln!("{POINTS} points, {spilled} KiB to the reserve, {given_up} epochs given up");
    assert_eq!(given_up, 0, "what is preserved fits");
    // A record of the log a cut, and some more.
    let records = 4 * (POINTS + 10);
    assert!(spilled > 2 * records, "only {spilled} KiB were written to the reserve");

    // All of the volume is written, and committed; then the marks on disk are cleared.
    let regions = std::fs::metadata(&site.replicas()[0]).expect("a replica").len() / REGION_BYTES;
    let whole = |file: &File, seed: u8| {
        for region in 0..regions {
            write(file, region * REGION_BYTES + u64::from(seed) * BLOCK as u64, seed);
        }
    };
    let open = |path: &Path| {
        let mut options = OpenOptions::new();
        options.read(true).write(true).custom_flags(libc::O_DIRECT | libc::O_SYNC);
        options.open(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
    };
    let file = open(&name);
    whole(&file, 3);
    site.cut().expect("a point");
    std::thread::sleep(Duration::from_secs(12));
    site.cut().expect("a point");
    std::thread::sleep(Duration::from_secs(12));

    // Written, and in no point: in some regions of which most have left the list of the active ones.
    let last: Vec<u64> =
        (0..regions).map(|region| region * REGION_BYTES + 9 * BLOCK as u64).collect();
    last.iter().for_each(|at| write(&file, *at, 7));
    drop(file);
    power_cut(&mut site, &dir, &device);
    start_filter(&dir, &list);
    site.start_source();
    site.follow();
    assert_eq!(site.compares(), 0, "the log says what to send");
    site.cut().expect("a point");
    let (sent, bytes) = (site.sent_bytes(), regions * REGION_BYTES);
    eprintln!("after the power cut {} KiB of {} KiB were sent", sent >> 10, bytes >> 10);
    assert!(sent < bytes * 2 / 5, "{sent} bytes were sent");
    same(&device, &site.replicas()[0]);

    // Nobody would believe a log that misses a write.
    power_cut(&mut site, &dir, &device);
    write(&open(&device), 11 * REGION_BYTES, 13);
    start_filter(&dir, &list);
    site.start_source();
    site.follow();
    assert_eq!(site.compares(), 1, "it was written to before its filter was there");
    site.cut().expect("a point");
    same(&device, &site.replicas()[0]);
}

fn write(file: &File, at: u64, seed: u8) {
    let mut memory = vec![seed; 2 * BLOCK];
    let skip = memory.as_ptr().align_offset(BLOCK);
    let block = &mut memory[skip..skip + BLOCK];
    block[..8].copy_from_slice(&at.to_le_bytes());
    file.write_all_at(block, at).expect("no write fails");
}

fn same(device: &Path, replica: &Path) {
    let (ours, theirs) = (File::open(device).expect("a device"), File::open(replica).expect("it"));
    let (mut one, mut other) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    let bytes = theirs.metadata().expect("it").len();
    for at in (0..bytes).step_by(1 << 20) {
        let count = (bytes - at).min(1 << 20) as usize;
        ours.read_exact_at(&mut one[..count], at).expect("the device");
        theirs.read_exact_at(&mut other[..count], at).expect("the replica");
        assert!(one[..count] == other[..count], "they differ within 1 MiB from {at} on");
    }
}

fn server(dir: &Path) -> Result<i32, String> {
    let client = Client::connect(dir, Duration::from_secs(5)).map_err(|e| e.to_string())?;
    client.hello().map(|hello| hello.pid.cast_signed()).map_err(|error| error.to_string())
}

/// As a reset of the machine does it: the filter is gone at once, and with it all that was in
/// memory, the kernel's counters of the device among it.
fn power_cut(site: &mut InProcess, dir: &Path, device: &Path) {
    site.stop_source();
    let pid = server(dir).expect("the filter runs");
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("it runs");
    let after = stat.rsplit_once(") ").expect("a line of stat").1;
    let keeper: i32 = after.split(' ').nth(1).and_then(|n| n.parse().ok()).expect("its parent");
    for pid in [keeper, pid] {
        kill(Pid::from_raw(pid), Signal::SIGKILL).expect("it ran");
    }
    let mut control = Control::open().expect("the control device");
    wait_until("the filter's devices are gone", Duration::from_secs(60), || {
        for info in
            control.devices().map_err(|error| error.to_string())?.iter().filter(|i| is_ours(i))
        {
            let _ = control.stop(info.dev_id);
            control.delete(info.dev_id).map_err(|error| error.to_string())?;
        }
        Ok(())
    });
    umount2(dir, MntFlags::MNT_DETACH).expect("its tmpfs");
    let name = device.file_name().expect("a node").to_str().expect("UTF-8");
    let sysfs = PathBuf::from(format!("/sys/class/block/{name}"));
    let number =
        |what: &str| std::fs::read_to_string(sysfs.join(what)).expect(what).trim().to_string();
    let (part, start, size) = (number("partition"), number("start"), number("size"));
    let disk = device.to_str().expect("UTF-8").trim_end_matches(part.as_str());
    wait_until("the partition is let go of", Duration::from_secs(60), || {
        let status = Command::new("delpart").args([disk, &part]).status().expect("delpart");
        if status.success() { Ok(()) } else { Err("delpart".into()) }
    });
    let added =
        Command::new("addpart").args([disk, &part, &start, &size]).status().expect("addpart");
    assert!(added.success());
    wait_until("its node is there", Duration::from_secs(60), || {
        if device.exists() { Ok(()) } else { Err(device.display().to_string()) }
    });
}

#[expect(clippy::zombie_processes, reason = "it is killed, or ends with the guest")]
fn start_filter(dir: &Path, list: &Path) {
    let mut command = Command::new("secondsite");
    command.arg("filter").arg("--preserve=16KiB").arg("--dir").arg(dir).arg("--list").arg(list);
    command.spawn().expect("secondsite filter");
    wait_until("the filter answers", Duration::from_secs(60), || {
        let client = Client::connect(dir, Duration::from_secs(5)).map_err(|e| e.to_string())?;
        let volumes = client.list().map_err(|error| error.to_string())?;
        match volumes.iter().find(|volume| volume.reserve_state == "log") {
            Some(_) => Ok(()),
            None => Err(format!("{volumes:?}")),
        }
    });
}
