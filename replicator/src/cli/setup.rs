//! `secondsite setup`: makes this host the second site.
//!
//! It checks first and changes nothing if a check fails; what is there already stays. Cut short
//! anywhere, it is simply done again.

use super::args::SetupArgs;
use super::failure::{Exit, Failure};
use super::operator::dialled;
use super::services::{self, CONTROL_SERVICE, TARGET_SERVICE};
use super::{Context, output, units};
use crate::config::{ControlConfig, Paths, TargetConfig};
use crate::daemon;
use nix::sys::statfs::{
    BTRFS_SUPER_MAGIC, EXT4_SUPER_MAGIC, FsType, NFS_SUPER_MAGIC, TMPFS_MAGIC, XFS_SUPER_MAGIC,
    statfs,
};
use secondsite_control::api::SCHEMA_VERSION;
use secondsite_control::pki::Identity;
use secondsite_control::run::CONTROL;
use secondsite_control::setup::{OPERATOR, SetupReply, SetupRequest, TARGET, reissue, setup};
use serde_json::json;
use std::fs::{DirBuilder, OpenOptions};
use std::io::{ErrorKind, Write};
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;
use std::process::Command;

/// What a machine of the second site is started with.
const QEMU: &str = "qemu-system-x86_64";

pub(super) fn run(context: &Context, args: &SetupArgs) -> Result<(), Failure> {
    let paths = &context.paths;
    if !args.dry_run && is_configured(paths)? {
        let config = ControlConfig::load(paths)?;
        let target = TargetConfig::load(paths)?;
        // It succeeds only where an earlier setup was cut short after it wrote its files.
        return match setup(&request(paths, &config, target.listen)) {
            Ok(made) => finish(context, args, &made),
            Err(error) => repair(context, &config, &error),
        };
    }
    let store = std::path::absolute(&args.store)
        .map_err(|error| Failure::io("find", &args.store, &error))?;
    let target_listen = match args.target_listen {
        Some(address) => address,
        None => next_port(args.listen)?,
    };
    output::talk("Checking this host");
    services::check_way_to(&store)?;
    check_store(&store, args.dry_run)?;
    check_port(CONTROL, args.listen)?;
    check_port(TARGET, target_listen)?;
    if let Some(version) = qemu_version() {
        talk_ok(&format!("qemu {version} present"));
    }
    if args.dry_run {
        output::talk("Run without --dry-run to set up.");
        return Ok(());
    }
    write_config(paths, args.listen, &store, target_listen)?;
    let config = ControlConfig::load(paths)?;
    let made = setup(&request(paths, &config, target_listen))
        .map_err(|error| Failure::new(Exit::Failed, format!("setup: {error:#}")))?;
    finish(context, args, &made)
}

/// Starts what can be started, and says how to go on.
fn finish(context: &Context, args: &SetupArgs, made: &SetupReply) -> Result<(), Failure> {
    let store = TargetConfig::load(&context.paths)?.store;
    services::hand_over(&context.paths, &store)?;
    let started = services::start(context, args.no_start, &[CONTROL_SERVICE, TARGET_SERVICE]);
    if context.json {
        output::document(&json!({
            "schema_version": SCHEMA_VERSION,
            "token": made.token,
            "token_seconds": made.token_seconds,
            "fingerprint": made.fingerprint,
            "page": made.page,
            "control": made.control_address,
            "target": made.target_address,
            "started": started,
        }));
        return Ok(());
    }
    output::data(&format!(
        "Created  certificate authority  {}\nPage     {}\nToken    {}\n",
        made.fingerprint, made.page, made.token
    ));
    output::talk(&format!(
        "Next, on each server to protect (the token is valid {}, one use):\n  secondsite join {} --token {}",
        units::goal(made.token_seconds),
        made.control_address,
        made.token
    ));
    Ok(())
}

/// The configuration files of control and target. They come before everything else is made, so
/// that a setup that was cut short anywhere is simply done again.
fn write_config(
    paths: &Paths,
    listen: SocketAddr,
    store: &Path,
    target_listen: SocketAddr,
) -> Result<(), Failure> {
    let table = |pairs: &[(&str, String)]| -> toml::Table {
        pairs.iter().map(|(key, value)| (key.to_string(), value.clone().into())).collect()
    };
    let target = table(&[
        ("store", store.display().to_string()),
        ("listen", target_listen.to_string()),
        ("control", dialled(listen).to_string()),
    ]);
    write_toml(&paths.file(TARGET), &target)?;
    write_toml(&paths.file(CONTROL), &table(&[("listen", listen.to_string())]))
}

fn request(paths: &Paths, config: &ControlConfig, target_listen: SocketAddr) -> SetupRequest {
    let database = daemon::control::database(paths, config);
    let hosts = daemon::control::hosts(config.listen);
    let mut request = SetupRequest::new(paths.pki.clone(), database, config.listen, hosts);
    request.certificate_life = config.certificate_life;
    // One that listens on every address is dialled where its agent dials control.
    request.target_address = Some(target_listen.to_string());
    request
}

/// Whether an earlier setup got as far as certificates and database.
fn is_configured(paths: &Paths) -> Result<bool, Failure> {
    if !paths.file(CONTROL).exists() || !paths.file(TARGET).exists() {
        return Ok(false);
    }
    let config = ControlConfig::load(paths)?;
    Ok(daemon::control::database(paths, &config).exists()
        && Identity::load(&paths.pki, OPERATOR).is_ok())
}

/// A second setup changes nothing, except that certificates of this host that have ended are made
/// anew: nobody else could do that.
fn repair(context: &Context, config: &ControlConfig, error: &anyhow::Error) -> Result<(), Failure> {
    let paths = &context.paths;
    if let Some(newer) = daemon::control::newer(error) {
        return Err(newer);
    }
    let failed = |error: anyhow::Error| Failure::new(Exit::Failed, format!("setup: {error:#}"));
    let mut renewed = Vec::new();
    for name in [OPERATOR, TARGET] {
        let identity = Identity::load(&paths.pki, name).map_err(failed)?;
        let now = jiff::Timestamp::now();
        if identity.not_after() > now {
            continue;
        }
        let db = daemon::control::database(paths, config);
        reissue(&paths.pki, &db, name, config.certificate_life).map_err(failed)?;
        renewed.push(name);
    }
    services::hand_over(paths, &TargetConfig::load(paths)?.store)?;
    if renewed.is_empty() {
        return Err(Failure::new(Exit::Config, format!("{error:#}"))
            .hint(format!("{}   for a new token", context.command("token"))));
    }
    if context.json {
        output::document(&json!({ "schema_version": SCHEMA_VERSION, "renewed": renewed }));
    } else {
        output::data(&format!("Renewed  certificates that had ended: {}\n", renewed.join(", ")));
    }
    Ok(())
}

fn next_port(listen: SocketAddr) -> Result<SocketAddr, Failure> {
    match listen.port().checked_add(1) {
        Some(port) if listen.port() != 0 => Ok(SocketAddr::new(listen.ip(), port)),
        _ => Err(Failure::new(
            Exit::Usage,
            format!("--listen {listen}: the target needs the port after it"),
        )
        .hint("give --target-listen ADDR:PORT, or another port")),
    }
}

/// The store exists or can be made, and is on a file system with room.
fn check_store(store: &Path, dry_run: bool) -> Result<(), Failure> {
    if !dry_run {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(store)
            .map_err(|error| Failure::io("create the store", store, &error))?;
    }
    // The nearest folder that exists tells what a new one would be on.
    let there = store.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
    if !there.is_dir() {
        return Err(Failure::new(Exit::Io, format!("{} is not a folder", there.display()))
            .hint("give another --store"));
    }
    let facts = statfs(there)
        .map_err(|error| Failure::io("look at", there, &std::io::Error::from(error)))?;
    let free =
        u64::try_from(facts.block_size()).unwrap_or(0).saturating_mul(facts.blocks_available());
    let kind = kind(facts.filesystem_type());
    let text = format!("{}  {kind}, {} free", store.display(), units::bytes(free));
    if kind == "tmpfs" {
        output::talk(&format!("  note  {text}: in memory, gone after a reboot"));
    } else {
        talk_ok(&text);
    }
    Ok(())
}

/// The kind of file system that a folder is on.
pub(super) fn kind_of(dir: &Path) -> nix::Result<&'static str> {
    Ok(kind(statfs(dir)?.filesystem_type()))
}

fn kind(magic: FsType) -> &'static str {
    match magic {
        EXT4_SUPER_MAGIC => "ext4",
        XFS_SUPER_MAGIC => "xfs",
        BTRFS_SUPER_MAGIC => "btrfs",
        TMPFS_MAGIC => "tmpfs",
        NFS_SUPER_MAGIC => "nfs",
        _ => "file system",
    }
}

fn check_port(who: &str, address: SocketAddr) -> Result<(), Failure> {
    match TcpListener::bind(address) {
        Ok(_) => {
            talk_ok(&format!("port {} free ({who})", address.port()));
            Ok(())
        }
        Err(error) => {
            let option = if who == "control" { "--listen" } else { "--target-listen" };
            let exit = match error.kind() {
                ErrorKind::PermissionDenied => Exit::Permission,
                _ => Exit::Unavailable,
            };
            Err(Failure::new(exit, format!("{who} cannot listen on {address}: {error}"))
                .still("nothing was changed")
                .hint(format!("give another {option} ADDR:PORT, or end what listens there")))
        }
    }
}

/// `7.2` of `QEMU emulator version 7.2.11 (Debian …)`; none if it is not there.
fn qemu_version() -> Option<String> {
    let output = Command::new(QEMU).arg("--version").output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    let version = text.split_once("version ")?.1;
    let mut parts = version.split(|c: char| !c.is_ascii_digit());
    Some(format!("{}.{}", parts.next()?, parts.next()?))
}

fn talk_ok(text: &str) {
    output::talk(&format!("  ok    {text}"));
}

/// Writes a configuration file whole.
pub(super) fn write_toml(path: &Path, table: &toml::Table) -> Result<(), Failure> {
    let text = toml::to_string(table)
        .map_err(|error| Failure::new(Exit::Failed, format!("{}: {error}", path.display())))?;
    let write = || -> std::io::Result<()> {
        if let Some(dir) = path.parent() {
            DirBuilder::new().recursive(true).mode(0o755).create(dir)?;
        }
        let beside = path.with_added_extension("new");
        let mut file =
            OpenOptions::new().write(true).create(true).truncate(true).mode(0o644).open(&beside)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        std::fs::rename(&beside, path)?;
        path.parent().map_or(Ok(()), |dir| std::fs::File::open(dir)?.sync_all())
    };
    write().map_err(|error| Failure::io("write", path, &error))
}
