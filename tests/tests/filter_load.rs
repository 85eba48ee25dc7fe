//! What tests of the kernel lab run beside a filter: an application on a device that is interrupted.
//! Ignored elsewhere: it needs a device to overwrite.

use secondsite_tests::direct::Application;
use secondsite_tests::random::Random;
use std::path::PathBuf;

fn given(name: &str) -> PathBuf {
    std::env::var(name).unwrap_or_else(|_| panic!("{name}: a path")).into()
}

/// Reads and writes SECONDSITE_LAB_DEVICE, of SECONDSITE_LAB_MIB, which must read as zero, until
/// the file SECONDSITE_LAB_STOP is there. Then every block is checked, there and on
/// SECONDSITE_LAB_BACKING.
#[test]
#[ignore = "the kernel lab gives it a device"]
fn in_the_lab_a_device_keeps_every_block() {
    let (device, stop) = (given("SECONDSITE_LAB_DEVICE"), given("SECONDSITE_LAB_STOP"));
    let mib: u64 = std::env::var("SECONDSITE_LAB_MIB").unwrap().parse().unwrap();
    let mut application = Application::new(&device, mib << 20, Random::printed("filter_load"));
    let done = application.run(|| stop.exists());
    let blocks = application.verify(&device);
    application.verify(&given("SECONDSITE_LAB_BACKING"));
    println!(
        "{} writes, {} reads, {} flushes, longest {} ms; {blocks} blocks written and checked",
        done.writes,
        done.reads,
        done.flushes,
        done.worst.as_millis()
    );
}
