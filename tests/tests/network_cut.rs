//! The network between the two sites breaks in the middle of epochs, loudly and silently, and
//! replication goes on by itself where it was.

use secondsite_tests::block::{LoopDevice, Mount, assert_equal};
use secondsite_tests::lab::{Lab, SERVER, Side};
use secondsite_tests::load::Load;
use secondsite_tests::random::Random;
use secondsite_tests::{soak, wait_until};
use std::time::Duration;

const VOLUME_BYTES: u64 = 384 << 20;
const PATIENCE: Duration = Duration::from_secs(150);

#[test]
fn replication_resumes_after_every_cut() {
    let mut random = Random::printed("network_cut");
    let dir = tempfile::tempdir().expect("a folder");
    let device = LoopDevice::sparse(dir.path(), "source.img", VOLUME_BYTES);
    device.format_ext4(&[]);
    let mount = Mount::new(device.path(), &dir.path().join("mnt"), "defaults");
    let mut lab = Lab::on_a_network();
    lab.join();
    lab.protect(device.path(), &["--rpo", "3s"]).ok();
    let mut epoch = lab.wait_for_epoch_after(0, PATIENCE);
    let load = Load::start(Load::mixed(mount.path(), &mut random, Duration::from_millis(2)));

    for turn in 0..soak(4, 40) {
        let more = |bytes: u64| {
            let until = load.written() + bytes;
            wait_until("the load goes on", PATIENCE, || {
                if load.written() >= until { Ok(()) } else { Err(load.written().to_string()) }
            });
        };
        more(random.below(16 << 20));
        let silent = turn % 2 == 1;
        eprintln!("turn {turn}: the network breaks at epoch {epoch}, silent: {silent}");
        if silent {
            lab.network().set_silent(true)
        } else {
            lab.network().set_up(false)
        }
        // The application never notices.
        more((8 << 20) + random.below(16 << 20));
        if silent {
            lab.network().set_silent(false)
        } else {
            lab.network().set_up(true)
        }
        epoch = lab.wait_for_epoch_after(epoch, PATIENCE);
    }

    load.stop();
    mount.unmount();
    lab.cut();
    let replica = lab.wait_until_promoted(PATIENCE);
    assert_equal(device.path(), &replica);
    lab.cli(Side::Site, &["unprotect", SERVER, "--yes"]).ok();
}
