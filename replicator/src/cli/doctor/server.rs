//! A server to protect: pins in the kernel, and every block device with how it can be tracked.

use super::Findings;
use crate::cli::Context;
use crate::cli::units::bytes;
use crate::daemon::agent_side::ASSIGNMENT;
use crate::daemon::replicate::PIN_ROOT;
use crate::daemon::state;
use crate::inventory;
use secondsite_control::api::{AgentAssignment, InventoryDevice};
use secondsite_control::setup::AGENT;
use secondsite_tracker::device::Device;
use std::fs;
use std::path::Path;

pub(super) fn check(context: &Context, findings: &mut Findings) {
    pins(context, Path::new(PIN_ROOT), findings);
    match inventory::take(&[], &context.paths.run.join("filter")) {
        Ok(devices) if devices.is_empty() => {
            findings.warn("device", "no block device could be protected", "lsblk");
        }
        Ok(devices) => devices.iter().for_each(|one| device(one, findings)),
        Err(error) => findings.fail("device", error.to_string(), "apt install util-linux"),
    }
}

/// What is pinned marks every write: right for a protected volume, a burden for nobody otherwise.
fn pins(context: &Context, root: &Path, findings: &mut Findings) {
    let state = &context.paths.state;
    let assignment = state::peek::<AgentAssignment>(state, AGENT, ASSIGNMENT).ok().flatten();
    let (mut adopted, mut orphaned) = (0, 0);
    for server in folders(root) {
        for volume in folders(&server) {
            let name =
                |path: &Path| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let ours = assignment.as_ref().filter(|ours| ours.server_id == name(&server));
            let known =
                ours.is_some_and(|ours| ours.volumes.iter().any(|one| one.id == name(&volume)));
            if known {
                adopted += 1;
                continue;
            }
            orphaned += 1;
            let text = match ours {
                Some(_) => format!("{} marks for a volume that is not protected", volume.display()),
                None => format!("{} belongs to no agent of this configuration", volume.display()),
            };
            let remedy = format!("if no other agent runs here: rm -r {}", volume.display());
            findings.warn("pins", text, remedy);
        }
    }
    if orphaned == 0 {
        findings.ok(
            "pins",
            format!("{adopted} volumes are marked in the kernel, nothing is left over"),
        );
    }
}

fn folders(dir: &Path) -> Vec<std::path::PathBuf> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let mut paths: Vec<_> =
        entries.map(|entry| entry.path()).filter(|path| path.is_dir()).collect();
    paths.sort();
    paths
}

fn device(device: &InventoryDevice, findings: &mut Findings) {
    let used = match device.used_by.as_str() {
        "" => "not in use".into(),
        used => format!("used by {used}"),
    };
    let text = format!("{}  {} {}, {used}", device.path, bytes(device.size_bytes), device.kind);
    match device.trackers.first().map(String::as_str) {
        Some("ebpf") => findings.ok("device", format!("{text}: eBPF, {}", cut(device))),
        Some(_) => findings.warn(
            "device",
            format!("{text}: can only be compared: {}", device.refused),
            "choose another device, or protect it with --tracker compare",
        ),
        None => findings.warn(
            "device",
            format!("{text}: cannot be protected: {}", device.refused),
            "choose another device; this one is left out of --volumes all",
        ),
    }
}

/// How a cut of the device can be made.
fn cut(device: &InventoryDevice) -> String {
    let mounts = Device::open(Path::new(&device.path)).and_then(|device| device.mounts());
    let Ok(mounts) = mounts else { return "cut when quiet".into() };
    let stubborn: Vec<String> = mounts
        .iter()
        .filter(|mount| !mount.freezable)
        .map(|mount| format!("{} ({})", mount.path.display(), mount.kind))
        .collect();
    match (mounts.is_empty(), stubborn.is_empty()) {
        (true, _) => "cut when quiet".into(),
        (_, true) => "cut when quiet, else by freeze".into(),
        _ => format!("cut when quiet only: {} cannot be frozen", stubborn.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Findings, Level};
    use super::pins;
    use crate::cli::Context;
    use crate::config::Paths;
    use crate::daemon::agent_side::ASSIGNMENT;
    use crate::daemon::state::StateDir;
    use serde_json::json;

    #[test]
    fn pins_of_nobody_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let paths = Paths::of(dir.path());
        let assignment = json!({
            "version": 1, "server_id": "s1", "server_name": "db1", "target": null,
            "goal_seconds": 30, "volumes": [{ "id": "v1", "name": "sda", "path": "/dev/sda",
                "size_bytes": 1, "tracker": "auto", "block_bytes": 4096 }],
        });
        StateDir::open(&paths.state, "agent").unwrap().write(ASSIGNMENT, &assignment).unwrap();
        let context = Context { paths, json: false, yes: false };
        let root = dir.path().join("bpf");
        let look = || {
            let mut findings = Findings::default();
            pins(&context, &root, &mut findings);
            findings.checks
        };
        std::fs::create_dir_all(root.join("s1/v1")).unwrap();
        let fine = look();
        assert_eq!((fine.len(), fine[0].level), (1, Level::Ok));
        assert!(fine[0].text.starts_with("1 volumes"), "{}", fine[0].text);
        std::fs::create_dir_all(root.join("s1/v2")).unwrap();
        std::fs::create_dir_all(root.join("s2/v1")).unwrap();
        let left_over = look();
        let texts: Vec<&str> = left_over.iter().map(|check| check.text.as_str()).collect();
        assert_eq!(texts.len(), 2, "{texts:?}");
        assert!(texts[0].contains("s1/v2 marks for a volume that is not protected"), "{texts:?}");
        assert!(texts[1].contains("s2/v1 belongs to no agent"), "{texts:?}");
        assert!(left_over.iter().all(|check| check.remedy.contains("rm -r ")));
    }
}
