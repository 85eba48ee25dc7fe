//! The units of this host: hands each daemon what is its own, and starts it, where systemd is init,
//! the units are installed and the configuration is the system's. Elsewhere says what to type.

use super::failure::{Exit, Failure};
use super::{Context, output};
use crate::config::Paths;
use nix::unistd::{Gid, Group, Uid, User, chown};
use secondsite_control::run::CONTROL;
use secondsite_control::setup::{OPERATOR, TARGET};
use std::fs::{DirBuilder, Permissions, set_permissions};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::Command;

/// Where units of packages and of `scripts/install` lie.
const UNIT_DIRS: [&str; 4] = [
    "/etc/systemd/system",
    "/usr/local/lib/systemd/system",
    "/usr/lib/systemd/system",
    "/lib/systemd/system",
];
/// Drop-in that opens the store to the target.
const STORE_DROP_IN: &str = "/etc/systemd/system/secondsite-target.service.d/50-store.conf";
/// Group of both daemons of a second site.
const GROUP: &str = "secondsite";
/// Only the owner of a file there may replace it.
const PKI_MODE: u32 = 0o1770;
/// Folders that the target's unit hides unless told otherwise.
const HOMES: [&str; 3] = ["/home", "/root", "/run/user"];

/// A daemon, its unit without the suffix, and the command that is the same by hand.
pub(super) struct Service {
    pub unit: &'static str,
    pub command: &'static str,
}

pub(super) const CONTROL_SERVICE: Service =
    Service { unit: "secondsite-control", command: "control" };
pub(super) const TARGET_SERVICE: Service = Service { unit: "secondsite-target", command: "target" };
pub(super) const AGENT_SERVICE: Service =
    Service { unit: "secondsite-agent", command: "replicate" };

/// Enables and starts units, or says how. Whether they were started.
pub(super) fn start(context: &Context, no_start: bool, services: &[Service]) -> bool {
    let by_hand = |why: &str| {
        output::talk(why);
        for service in services {
            output::talk(&format!("  {}", context.command(service.command)));
        }
        false
    };
    if no_start {
        return by_hand("Not started, as asked. To start:");
    }
    if !systemd_runs() {
        return by_hand("systemd does not run here: nothing was started. To start:");
    }
    if !context.paths.is_default() {
        return by_hand(
            "The units of this host use /etc/secondsite: nothing was started. To start:",
        );
    }
    if let Some(missing) = services.iter().find(|service| !is_installed(service)) {
        return by_hand(&format!(
            "{}.service is not installed (scripts/install does): nothing was started. To start:",
            missing.unit
        ));
    }
    let units: Vec<&str> = services.iter().map(|service| service.unit).collect();
    // A second `join` or `setup` finds them running, with what was there before.
    let done = systemctl(&["daemon-reload"])
        .and_then(|()| systemctl(&[&["enable"], &units[..]].concat()))
        .and_then(|()| systemctl(&[&["restart"], &units[..]].concat()));
    match done {
        Ok(()) => {
            output::talk(&format!("Started  {}", units.join(", ")));
            true
        }
        Err(why) => by_hand(&format!("{why}. To start by hand:")),
    }
}

/// Gives the two daemons of a second site what setup made as root, and opens the store to the
/// target's unit. Where the units' users are missing, root runs the daemons and nothing changes.
pub(super) fn hand_over(paths: &Paths, store: &Path) -> Result<(), Failure> {
    let lookup = |name: &str| User::from_name(name).ok().flatten().map(|user| user.uid);
    let group = Group::from_name(GROUP).ok().flatten().map(|group| group.gid);
    let (Some(control), Some(target), Some(group)) =
        (lookup("secondsite-control"), lookup("secondsite-target"), group)
    else {
        return Ok(());
    };
    if !paths.is_default() || !Uid::effective().is_root() {
        return Ok(());
    }
    own(&paths.pki, Uid::from_raw(0), group)?;
    set_permissions(&paths.pki, Permissions::from_mode(PKI_MODE))
        .map_err(|error| Failure::io("set the mode of", &paths.pki, &error))?;
    for (user, name) in [
        (control, "ca.key".to_owned()),
        (control, "ca.pem".to_owned()),
        (control, format!("{CONTROL}.key")),
        (control, format!("{CONTROL}.pem")),
        (target, format!("{TARGET}.key")),
        (target, format!("{TARGET}.pem")),
        (Uid::from_raw(0), format!("{OPERATOR}.key")),
    ] {
        let path = paths.pki.join(name);
        if path.exists() {
            own(&path, user, group)?;
        }
    }
    for (user, role) in [(control, CONTROL), (target, TARGET)] {
        let dir = paths.state.join(role);
        make(&dir, 0o700)?;
        own_all(&dir, user, group)?;
    }
    // Below /var/lib, others must get past this folder to their own.
    set_permissions(&paths.state, Permissions::from_mode(0o711))
        .map_err(|error| Failure::io("set the mode of", &paths.state, &error))?;
    // Only what is ours: a store may be a mount point with other things in it.
    own(store, target, group)?;
    for name in ["servers", "target.lock"] {
        let path = store.join(name);
        if path.exists() {
            own_all(&path, target, group)?;
        }
    }
    let drop_in = Path::new(STORE_DROP_IN);
    make(drop_in.parent().unwrap_or(drop_in), 0o755)?;
    std::fs::write(drop_in, store_drop_in(store))
        .map_err(|error| Failure::io("write", drop_in, &error))
}

/// What opens a store to the target's unit.
fn store_drop_in(store: &Path) -> String {
    // systemd takes the rest of the line in quotes as one path, and % and quotes in it escaped.
    let quoted = store.display().to_string();
    let quoted = quoted.replace('\\', "\\\\").replace('"', "\\\"").replace('%', "%%");
    let mut text = format!(
        "# Written by `secondsite setup`: where replicas and journals lie.\n[Unit]\n\
         RequiresMountsFor=\"{quoted}\"\n[Service]\nReadWritePaths=\"{quoted}\"\n"
    );
    if HOMES.iter().any(|home| store.starts_with(home)) {
        text += "ProtectHome=no\n";
    }
    text
}

fn make(dir: &Path, mode: u32) -> Result<(), Failure> {
    DirBuilder::new()
        .recursive(true)
        .mode(mode)
        .create(dir)
        .map_err(|error| Failure::io("create", dir, &error))
}

fn own(path: &Path, user: Uid, group: Gid) -> Result<(), Failure> {
    chown(path, Some(user), Some(group))
        .map_err(|error| Failure::io("change the owner of", path, &error.into()))
}

/// A folder and all below it, as far as it is not theirs already. Follows no link.
fn own_all(path: &Path, user: Uid, group: Gid) -> Result<(), Failure> {
    let fails = |error| Failure::io("look at", path, &error);
    let metadata = path.symlink_metadata().map_err(fails)?;
    if metadata.is_symlink() {
        return Ok(());
    }
    if metadata.uid() != user.as_raw() {
        own(path, user, group)?;
    }
    if metadata.is_dir() {
        for entry in std::fs::read_dir(path).map_err(fails)? {
            own_all(&entry.map_err(fails)?.path(), user, group)?;
        }
    }
    Ok(())
}

fn is_installed(service: &Service) -> bool {
    let file = format!("{}.service", service.unit);
    UNIT_DIRS.iter().any(|dir| Path::new(dir).join(&file).exists())
}

fn systemctl(arguments: &[&str]) -> Result<(), String> {
    let line = format!("systemctl {}", arguments.join(" "));
    match Command::new("systemctl").args(arguments).output() {
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => Err(format!("{line}: {}", String::from_utf8_lossy(&output.stderr).trim())),
        Err(error) => Err(format!("{line}: {error}")),
    }
}

/// Whether systemd is init here.
fn systemd_runs() -> bool {
    Path::new("/run/systemd/system").is_dir()
}

/// A failure if the daemons' users cannot get at the store: a folder above it is closed to them.
pub(super) fn check_way_to(store: &Path) -> Result<(), Failure> {
    let has_users = User::from_name("secondsite-target").ok().flatten().is_some();
    let closed = store
        .ancestors()
        .skip(1)
        .find(|dir| dir.metadata().is_ok_and(|meta| meta.permissions().mode() & 0o001 == 0));
    match closed {
        Some(dir) if has_users => Err(Failure::new(
            Exit::Permission,
            format!(
                "the target's user cannot reach {}: {} is closed to it",
                store.display(),
                dir.display()
            ),
        )
        .still("nothing was changed")
        .hint(format!("chmod o+x {}", dir.display()))),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::store_drop_in;
    use std::path::Path;

    #[test]
    fn a_store_is_opened_to_the_unit_whatever_its_name() {
        let text = store_drop_in(Path::new("/mnt/a \"b\" 10%"));
        assert!(text.contains("ReadWritePaths=\"/mnt/a \\\"b\\\" 10%%\"\n"), "{text}");
        assert!(!text.contains("ProtectHome"), "{text}");
        assert!(store_drop_in(Path::new("/home/dr")).contains("ProtectHome=no\n"));
    }
}
