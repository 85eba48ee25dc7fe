//! Kernel, memory, clock: what the host itself brings.

use super::{Findings, Roles};
use crate::cli::Context;
use jiff::Timestamp;
use nix::sys::resource::{Resource, getrlimit};
use nix::sys::statfs::{BPF_FS_MAGIC, TMPFS_MAGIC, statfs};
use secondsite_control::pki::Identity;
use secondsite_tracker::ebpf::Ebpf;
use std::path::Path;

/// Oldest kernel that takes the programs (bpf_loop).
const KERNEL_MIN: (u32, u32) = (5, 17);
const BTF: &str = "/sys/kernel/btf/vmlinux";
const BPFFS: &str = "/sys/fs/bpf";
/// Memory that the agent locks besides its own `memory`: the freezer.
const LOCKED_BYTES_MIN: u64 = 128 << 20;
/// Capability to lock memory without a limit.
const CAP_IPC_LOCK: u32 = 14;
/// Before this, a clock was never set. (2025-01-01)
const CLOCK_MIN_SECONDS: i64 = 1_735_689_600;

pub(super) fn check(context: &Context, roles: Roles, findings: &mut Findings) {
    user(findings);
    if roles.may_be_server() {
        kernel(findings);
        bpffs(findings);
        memlock(findings);
    }
    run_dir(context, findings);
    clock(context, findings);
}

fn user(findings: &mut Findings) {
    if nix::unistd::geteuid().is_root() {
        findings.ok("user", "root");
    } else {
        findings.warn(
            "user",
            "not root: what only root may read is shown as failing",
            "sudo secondsite doctor",
        );
    }
}

fn kernel(findings: &mut Findings) {
    let upgrade = "boot a kernel of 5.17 or later, or protect with --tracker compare";
    let release = nix::sys::utsname::uname()
        .map(|name| name.release().to_string_lossy().into_owned())
        .unwrap_or_default();
    match version(&release) {
        Some(found) if found >= KERNEL_MIN => findings.ok("kernel", release),
        Some(_) => findings.warn("kernel", format!("{release} is too old for eBPF"), upgrade),
        None => findings.warn("kernel", format!("{release:?} is no version"), upgrade),
    }
    if Path::new(BTF).exists() {
        findings.ok("btf", BTF);
    } else {
        let text = format!("{BTF} is missing: the kernel has no type information");
        findings.warn("btf", text, "boot a kernel with CONFIG_DEBUG_INFO_BTF");
    }
    match Ebpf::supported() {
        Ok(()) => findings.ok("bpf-programs", "the kernel takes the programs (bpf_loop, tracing)"),
        Err(why) => {
            let text = format!("volumes can only be compared: {why}");
            findings.warn("bpf-programs", text, upgrade);
        }
    }
}

/// Major and minor of `6.1.0-13-amd64`.
fn version(release: &str) -> Option<(u32, u32)> {
    let mut parts = release.split(|letter: char| !letter.is_ascii_digit());
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

fn bpffs(findings: &mut Findings) {
    match statfs(BPFFS) {
        Ok(facts) if facts.filesystem_type() == BPF_FS_MAGIC => {
            findings.ok("bpffs", format!("{BPFFS} is mounted"));
        }
        Ok(_) => findings.warn(
            "bpffs",
            format!("{BPFFS} is not mounted; the agent mounts it when it starts"),
            format!("mount -t bpf bpf {BPFFS}"),
        ),
        Err(error) => findings.warn(
            "bpffs",
            format!("{BPFFS}: {error}"),
            "boot a kernel with CONFIG_BPF_SYSCALL, or protect with --tracker compare",
        ),
    }
}

fn memlock(findings: &mut Findings) {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let capabilities = line.and_then(|line| u64::from_str_radix(line.trim(), 16).ok());
    if capabilities.is_some_and(|bits| bits >> CAP_IPC_LOCK & 1 == 1) {
        return findings.ok("memlock", "no limit (CAP_IPC_LOCK)");
    }
    match getrlimit(Resource::RLIMIT_MEMLOCK) {
        Ok((soft, _)) if soft >= LOCKED_BYTES_MIN => {
            findings.ok("memlock", crate::cli::units::bytes(soft));
        }
        Ok((soft, _)) => findings.warn(
            "memlock",
            format!("{} may be locked in memory", crate::cli::units::bytes(soft)),
            "run the agent as root, or with LimitMEMLOCK=infinity in its unit",
        ),
        Err(error) => findings.warn("memlock", error.to_string(), "ulimit -l"),
    }
}

/// Locks and the note of what is frozen must be gone after a reboot.
fn run_dir(context: &Context, findings: &mut Findings) {
    let run = &context.paths.run;
    let there = run.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
    let shown = run.display();
    match statfs(there) {
        Ok(facts) if facts.filesystem_type() == TMPFS_MAGIC => {
            findings.ok("run-dir", format!("{shown} is in memory"));
        }
        // Another configuration folder keeps it below itself, for tests and trials.
        Ok(_) if !context.paths.is_default() => findings.ok("run-dir", format!("{shown}")),
        Ok(_) => findings.warn(
            "run-dir",
            format!("{shown} is not in memory: locks of before a reboot would stay"),
            "mount -t tmpfs tmpfs /run",
        ),
        Err(error) => findings.fail("run-dir", format!("{shown}: {error}"), "mount /run"),
    }
}

/// The clock decides what is expired and when a point was cut.
fn clock(context: &Context, findings: &mut Findings) {
    let now = Timestamp::now();
    let set = "timedatectl set-ntp true";
    if now.as_second() < CLOCK_MIN_SECONDS {
        return findings.fail("clock", format!("{now} cannot be"), set);
    }
    for name in super::places::identities(context) {
        if let Ok(identity) = Identity::load(&context.paths.pki, name)
            && identity.not_before() > now
        {
            let begins = identity.not_before();
            let text = format!("{now}, but the certificate of {name} begins {begins}");
            return findings.fail("clock", text, set);
        }
    }
    // SAFETY: an all-zero timex is valid, its `modes` of zero only asks, and the kernel writes
    // nothing but this structure, which outlives the call.
    let (state, facts) = unsafe {
        let mut facts: libc::timex = std::mem::zeroed();
        (libc::adjtimex(&mut facts), facts)
    };
    if state < 0 || facts.status & libc::STA_UNSYNC != 0 {
        let text = format!("{now}, and nothing keeps it in step");
        return findings.warn("clock", text, set);
    }
    findings.ok("clock", format!("{now}, kept in step"));
}

#[cfg(test)]
mod tests {
    use super::version;

    #[test]
    fn versions_of_kernels() {
        assert_eq!(version("6.1.0-13-amd64"), Some((6, 1)));
        assert_eq!(version("5.17"), Some((5, 17)));
        assert_eq!(version("linux"), None);
    }
}
