//! Volumes behind the filter, cut under saturation: every point on the target is a prefix of the
//! write order. In the kernel lab, over the devices in SECONDSITE_LAB_DEVICES, with a running
//! `secondsite filter` in SECONDSITE_FILTER_DIR.

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use secondsite::filter::client::Client;
use secondsite_control::api::TrackerChoice;
use secondsite_tests::load::Load;
use secondsite_tests::random::Random;
use secondsite_tests::site::InProcess;
use secondsite_tests::stamps::Stamps;
use secondsite_tests::wait_until;
use secondsite_tracker::device::Device;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Blocks that are written: few, so that most of them are in every cut.
const PLACES: u64 = 400;

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().expect(name))
}

#[test]
#[ignore = "needs the kernel lab: tests/lab/order.sh"]
fn every_point_is_a_prefix_of_the_writes() {
    let mut random = Random::printed("filter_order");
    let devices = std::env::var("SECONDSITE_LAB_DEVICES").expect("SECONDSITE_LAB_DEVICES");
    let devices: Vec<PathBuf> = devices.split(',').map(PathBuf::from).collect();
    let dir: PathBuf =
        std::env::var("SECONDSITE_FILTER_DIR").expect("SECONDSITE_FILTER_DIR").into();
    let folder = tempfile::tempdir().expect("a folder");
    let mut site = InProcess::start(folder.path(), &devices, TrackerChoice::Ublk, &dir);
    site.follow();
    assert!(site.trackers().iter().all(|tracker| tracker == "ublk"), "{:?}", site.trackers());

    // Under a volume of device-mapper the filter was put while it is there; in front of another
    // device it has a name of its own.
    let is_mapped = |path: &Path| Device::open(path).is_ok_and(|device| device.is_mapped());
    let names = devices.iter().enumerate().map(|(number, path)| match is_mapped(path) {
        true => path.clone(),
        false => format!("/dev/secondsite/disk{number}").into(),
    });
    let stamps = Stamps::new(&names.collect::<Vec<PathBuf>>(), PLACES);
    let threads = number("SECONDSITE_LAB_THREADS", 6);
    let load = Load::start((0..threads).map(|_| stamps.writer(&mut random)).collect());
    let (mut highest, mut waves) = (0, Duration::ZERO);
    let points = number("SECONDSITE_LAB_POINTS", 20);
    let begun = Instant::now();
    let (kills, restarts) =
        (number("SECONDSITE_LAB_KILLS", 0), number("SECONDSITE_LAB_RESTARTS", 0));
    let due =
        |count: u64, point: u64| count > 0 && (point + 1).is_multiple_of((points / count).max(1));
    for point in 0..points {
        if due(kills, point) {
            kill_server(&dir);
        }
        if due(restarts, point) {
            site.start_source();
            site.follow();
        }
        let cut = Instant::now();
        let exact = site.cut().unwrap_or_else(|why| panic!("point {point}: {why}"));
        waves += cut.elapsed();
        assert!(exact, "point {point} is fuzzy");
        let images = site.replicas();
        let up_to = stamps.check(&images).unwrap_or_else(|why| panic!("point {point}: {why}"));
        assert!(up_to >= highest, "point {point} went back from {highest} to {up_to}");
        highest = up_to;
    }
    let (issued, given_up) = (stamps.issued(), site.given_up());
    eprintln!(
        "{points} points in {:?}, {:?} a cut, {issued} writes, the last point up to {highest}, \
         {given_up} epochs given up",
        begun.elapsed(),
        waves / points as u32
    );
    assert!(highest > 0 && issued > points * 10, "it was written all along");
    assert_eq!(site.compares(), 0, "nothing was in doubt");
    load.stop();
}

/// Kills the process that carries the requests; its keeper starts another one.
fn kill_server(dir: &Path) {
    let hello = wait_until("the filter answers", Duration::from_secs(60), || {
        let client = Client::connect(dir, Duration::from_secs(5)).map_err(|e| e.to_string())?;
        client.hello().map_err(|error| error.to_string())
    });
    kill(Pid::from_raw(hello.pid.cast_signed()), Signal::SIGKILL).expect("it ran");
}
