//! Configuration, keys, certificates, state and store: what lies on this host's disks.

use super::{Findings, Roles};
use crate::cli::failure::Failure;
use crate::cli::units::{bytes, span};
use crate::cli::{Context, setup};
use crate::config::{self, TargetConfig};
use jiff::Timestamp;
use nix::sys::statvfs::{FsFlags, statvfs};
use nix::unistd::{AccessFlags, access, geteuid};
use secondsite_control::pki::Identity;
use secondsite_control::run::CONTROL;
use secondsite_control::setup::{AGENT, OPERATOR, TARGET};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// Certificates renew themselves after a third of their life: with less than this share left,
/// something is in the way.
const WARN_SHARE: f64 = 1.0 / 3.0;
/// Share of a store below which its space is short.
const SPACE_SHARE: f64 = 0.1;

pub(super) fn check(context: &Context, roles: Roles, findings: &mut Findings) {
    configuration(context, findings);
    folder("config-dir", &context.paths.config, false, findings);
    folder("pki-dir", &context.paths.pki, true, findings);
    folder("state-dir", &context.paths.state, false, findings);
    for (is, role) in [(roles.target, TARGET), (roles.agent, AGENT)] {
        if is {
            folder("state-dir", &context.paths.state.join(role), true, findings);
        }
    }
    keys(&context.paths.pki, findings);
    certificates(context, findings);
    if roles.target
        && let Ok(config) = TargetConfig::load(&context.paths)
    {
        store(&config, findings);
    }
}

fn configuration(context: &Context, findings: &mut Findings) {
    let checked = config::check(&context.paths);
    let show = context.command("config check --show");
    if checked.problems.is_empty() && !checked.roles.is_empty() {
        findings.ok("config", format!("sound: {}", checked.roles.join(", ")));
    }
    for problem in checked.problems {
        let text = problem.to_string();
        let hint = Failure::from(problem).hint;
        findings.fail("config", text, if hint.is_empty() { show.clone() } else { hint });
    }
}

/// Its owner is the one who runs the daemons, and nobody else may write it; with `secret` nobody
/// else may enter it.
fn folder(check: &'static str, dir: &Path, secret: bool, findings: &mut Findings) {
    let shown = dir.display();
    let facts = match fs::metadata(dir) {
        Ok(facts) => facts,
        // It is made when it is needed.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return,
        Err(error) => {
            return findings.fail(check, format!("{shown}: {error}"), "sudo secondsite doctor");
        }
    };
    let mode = facts.mode() & 0o7777;
    let forbidden = if secret { 0o077 } else { 0o022 };
    if !facts.is_dir() {
        findings.fail(check, format!("{shown} is not a folder"), format!("ls -ld {shown}"));
    } else if facts.uid() != 0 && facts.uid() != geteuid().as_raw() {
        let text = format!("{shown} belongs to user {}", facts.uid());
        findings.fail(check, text, format!("chown root: {shown}"));
    } else if mode & forbidden != 0 {
        let (text, right) = match secret {
            true => (format!("{shown}: others may enter it (mode {mode:04o})"), "go-rwx"),
            false => (format!("{shown}: others may write it (mode {mode:04o})"), "go-w"),
        };
        findings.fail(check, text, format!("chmod {right} {shown}"));
    } else {
        findings.ok(check, format!("{shown}, mode {mode:04o}"));
    }
}

fn keys(pki: &Path, findings: &mut Findings) {
    for entry in fs::read_dir(pki).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.extension().is_none_or(|extension| extension != "key") {
            continue;
        }
        let shown = path.display();
        match fs::metadata(&path).map(|facts| facts.mode() & 0o777) {
            Ok(mode) if mode & 0o077 != 0 => {
                let text = format!("{shown}: others may read it (mode {mode:04o})");
                findings.fail("key", text, format!("chmod 600 {shown}"));
            }
            Ok(_) => {}
            Err(error) => {
                findings.fail("key", format!("{shown}: {error}"), "sudo secondsite doctor")
            }
        }
    }
}

/// Names of the identities that this host should have.
pub(super) fn identities(context: &Context) -> Vec<&'static str> {
    let roles = Roles::of(context);
    let all = [
        (roles.control, CONTROL),
        (roles.control, OPERATOR),
        (roles.target, TARGET),
        (roles.agent, AGENT),
    ];
    all.iter().filter(|(is, _)| *is).map(|(_, name)| *name).collect()
}

fn certificates(context: &Context, findings: &mut Findings) {
    let now = Timestamp::now();
    for name in identities(context) {
        let (again, late) = match name {
            AGENT => (
                "secondsite token on control's host, then here: secondsite join ADDR:PORT --token -",
                "systemctl status secondsite-agent",
            ),
            CONTROL => {
                ("systemctl restart secondsite-control", "systemctl restart secondsite-control")
            }
            TARGET => ("secondsite setup --store DIR", "systemctl status secondsite-target"),
            _ => ("secondsite setup --store DIR", "secondsite status"),
        };
        let identity = match Identity::load(&context.paths.pki, name) {
            Ok(identity) => identity,
            // Control makes its own when it starts; a second site with its roles on two hosts has
            // no operator on the target's.
            Err(_) if name == CONTROL && !context.paths.pki.join("control.pem").exists() => {
                continue;
            }
            Err(error) => {
                findings.fail("certificate", format!("{name}: {error:#}"), again);
                continue;
            }
        };
        let (begins, ends) = (identity.not_before(), identity.not_after());
        let (left, life) = (seconds(now, ends), seconds(begins, ends));
        if left <= 0.0 {
            findings.fail("certificate", format!("{name}: it ended {ends}"), again);
        } else if left < life * WARN_SHARE {
            let text = format!("{name}: it ends in {} and was not renewed", span(left));
            findings.warn("certificate", text, late);
        } else {
            findings.ok("certificate", format!("{name}: good for {}", span(left)));
        }
    }
}

fn seconds(from: Timestamp, to: Timestamp) -> f64 {
    to.duration_since(from).as_secs_f64()
}

fn store(config: &TargetConfig, findings: &mut Findings) {
    let dir = &config.store;
    let shown = dir.display();
    let kind = match setup::kind_of(dir) {
        Ok(kind) => kind,
        Err(error) => {
            let text = format!("{shown}: {error}");
            return findings.fail("store", text, "secondsite config check --show");
        }
    };
    match kind {
        "tmpfs" => findings.warn(
            "store",
            format!("{shown} is in memory: it is gone after a reboot"),
            "set `store` in target.toml to a folder on a disk",
        ),
        "nfs" => findings.warn(
            "store",
            format!("{shown} is on nfs: durability is that of the other host"),
            "set `store` in target.toml to a folder on a local disk",
        ),
        _ => findings.ok("store", format!("{shown} is on {kind}")),
    }
    let read_only =
        statvfs(dir.as_path()).is_ok_and(|facts| facts.flags().contains(FsFlags::ST_RDONLY));
    match access(dir.as_path(), AccessFlags::W_OK | AccessFlags::X_OK) {
        Ok(()) if !read_only => findings.ok("store-writable", format!("{shown}")),
        _ if read_only => findings.fail(
            "store-writable",
            format!("{shown} is mounted read-only"),
            "dmesg --level err",
        ),
        Ok(()) => {}
        Err(error) => {
            findings.fail("store-writable", format!("{shown}: {error}"), format!("ls -ld {shown}"));
        }
    }
    let Ok(facts) = statvfs(dir.as_path()) else { return };
    let unit = facts.fragment_size();
    let free = facts.blocks_available().saturating_mul(unit);
    let all = facts.blocks().saturating_mul(unit).max(1);
    let text = format!(
        "{} of {} free, {} in reserve",
        bytes(free),
        bytes(all),
        bytes(config.reserve_bytes)
    );
    let remedy = format!("make room or grow the file system: df -h {shown}");
    if free <= config.reserve_bytes {
        findings.fail("store-space", format!("full: {text}"), remedy);
    } else if (free as f64) < all as f64 * SPACE_SHARE {
        findings.warn("store-space", text, remedy);
    } else {
        findings.ok("store-space", text);
    }
}
