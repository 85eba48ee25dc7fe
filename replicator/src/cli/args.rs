//! The arguments of every command.

use super::units::{parse_bytes, parse_seconds};
use crate::config::DEFAULT_CONFIG_DIR;
use crate::daemon::log::LogFormat;
use clap::{Args, Parser, Subcommand, ValueEnum};
use secondsite_control::api::TrackerChoice;
use secondsite_control::keep::DEFAULT;
use secondsite_format::limits::{BLOCK_BYTES_MAX, BLOCK_BYTES_MIN};
use std::net::SocketAddr;
use std::path::PathBuf;

/// Longest life of a token, seconds.
const TOKEN_SECONDS_MAX: u64 = 3600;

/// Disaster recovery for physical Linux servers.
#[derive(Debug, Parser)]
#[command(name = "secondsite", version, about, propagate_version = true)]
pub struct Cli {
    /// Options of every command.
    #[command(flatten)]
    pub global: Global,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// Options of every command, before or after its own.
#[derive(Debug, Args)]
pub struct Global {
    /// Folder of the configuration; with another than this, state and sockets lie below it
    #[arg(long, global = true, value_name = "DIR", default_value = DEFAULT_CONFIG_DIR)]
    pub config_dir: PathBuf,
    /// Print one JSON document on stdout
    #[arg(long, global = true)]
    pub json: bool,
    /// Answer questions with yes
    #[arg(long, global = true)]
    pub yes: bool,
}

/// All commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Make this host the second site: authority, control, target, store
    Setup(SetupArgs),
    /// Run the control server in the foreground
    Control(LogArgs),
    /// Run the target in the foreground
    Target(LogArgs),
    /// Run the agent in the foreground
    Replicate(LogArgs),
    /// Run the filter in the write path in the foreground, or show it
    Filter(FilterArgs),
    /// Make a one-time token for a machine that is to join
    Token(TokenArgs),
    /// Make this server known to control; nothing is replicated yet
    Join(JoinArgs),
    /// Replicate volumes of a server
    Protect(ProtectArgs),
    /// Stop replicating a server; its replica and points stay
    Unprotect(UnprotectArgs),
    /// What is protected, and how well
    Status(StatusArgs),
    /// Recovery points of a server, oldest first
    Points(ServerArgs),
    /// Serve a recovery point over NBD, on the target's host; what is written goes to a scratch area
    Open(OpenArgs),
    /// Serve recovery points no longer; what was written to them is gone
    Close(CloseArgs),
    /// Keep a recovery point beyond its time, and name it
    Keep(KeepArgs),
    /// Write a volume of a recovery point into an image file
    Export(ExportArgs),
    /// Make a recovery point now
    Cut(CutArgs),
    /// Compare a server with its newest recovery point
    Verify(ServerArgs),
    /// What a state or a reason means, what still works, and what to type
    Explain(ExplainArgs),
    /// One server for Nagios: exit code 0 ok, 1 warning, 2 critical, 3 unknown
    Check(CheckArgs),
    /// Check this host for all that is needed; changes nothing
    Doctor,
    /// The configuration files
    Config(ConfigArgs),
    /// Make what packages ship besides the binary
    #[command(hide = true)]
    Generate(GenerateArgs),
}

/// Options of the daemons.
#[derive(Debug, Args)]
pub struct LogArgs {
    /// Form of the log; SECONDSITE_LOG chooses what is logged
    #[arg(
        long,
        value_name = "FORMAT",
        env = "SECONDSITE_LOG_FORMAT",
        value_enum,
        default_value = "auto"
    )]
    pub log_format: LogFormat,
}

/// `filter`.
#[derive(Debug, Args)]
pub struct FilterArgs {
    /// Show the volumes of the filter that runs
    #[arg(long)]
    pub status: bool,
    /// Folder for its own tmpfs [default: filter below the folder of sockets]
    #[arg(long, value_name = "DIR")]
    pub dir: Option<PathBuf>,
    /// List of volumes that outlives a reboot [default: filter/volumes below the state]
    #[arg(long, value_name = "FILE")]
    pub list: Option<PathBuf>,
    /// Say one line to the filter that runs, and print what it answers
    #[arg(long, value_name = "LINE", hide = true)]
    pub ask: Option<String>,
    /// It lies in its own tmpfs already
    #[arg(long, hide = true)]
    pub in_place: bool,
    /// New devices fail what was on its way when a server died
    #[arg(long, hide = true)]
    pub no_reissue: bool,
    /// Queues of new devices
    #[arg(long, value_name = "N", hide = true)]
    pub queues: Option<u16>,
    /// Memory a volume for what a cut still needs of blocks that are overwritten
    #[arg(long, value_name = "SIZE", default_value = "32MiB", value_parser = preserve_size)]
    pub preserve: u64,
    /// A known mistake, for the tests that must notice it
    #[arg(long, value_name = "NAME", hide = true)]
    pub mistake: Option<String>,
}

/// `setup`.
#[derive(Debug, Args)]
pub struct SetupArgs {
    /// Where replicas and journals are kept
    #[arg(long, value_name = "DIR")]
    pub store: PathBuf,
    /// Where control listens
    #[arg(long, value_name = "ADDR:PORT", default_value = "0.0.0.0:7443")]
    pub listen: SocketAddr,
    /// Where the target listens [default: control's address, port + 1]
    #[arg(long, value_name = "ADDR:PORT")]
    pub target_listen: Option<SocketAddr>,
    /// Configure only, start nothing
    #[arg(long)]
    pub no_start: bool,
    /// Check this host, change nothing
    #[arg(long)]
    pub dry_run: bool,
}

/// `token`.
#[derive(Debug, Args)]
pub struct TokenArgs {
    /// What joins with it
    #[arg(long, value_enum, default_value = "agent")]
    pub role: TokenRole,
    /// How long it is good for, at most 1h
    #[arg(long, value_name = "TIME", default_value = "1h", value_parser = token_life)]
    pub ttl: u64,
}

/// Roles that join by token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum TokenRole {
    /// A server to protect.
    Agent,
    /// A target on another host.
    Target,
    /// A relay.
    Relay,
}

/// `join`.
#[derive(Debug, Args)]
pub struct JoinArgs {
    /// Where control listens
    #[arg(value_name = "ADDR:PORT", value_parser = host_port)]
    pub control: String,
    /// The token, or - to read it from stdin
    #[arg(long, value_name = "TOKEN|-")]
    pub token: String,
    /// Name of this server [default: its host name]
    #[arg(long, value_parser = server_name)]
    pub name: Option<String>,
    /// Join only, start nothing
    #[arg(long)]
    pub no_start: bool,
    /// Show what would be reported, join nothing
    #[arg(long)]
    pub dry_run: bool,
}

/// `protect`.
#[derive(Debug, Args)]
pub struct ProtectArgs {
    /// Name of the server
    #[arg(value_parser = server_name)]
    pub server: String,
    /// Device paths, or all (whole disks, without loop devices)
    #[arg(long, value_name = "PATH[,PATH]|all", required = true, value_delimiter = ',')]
    pub volumes: Vec<String>,
    /// The goal: how much may be lost, as time
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = goal)]
    pub rpo: u64,
    /// How long recovery points are kept: all for an hour, then one per 5 minutes up to the first
    /// time, then one per hour up to the second; or none, for the newest alone
    #[arg(long, value_name = "TIME[,TIME]|none", default_value = DEFAULT, value_parser = keep)]
    pub keep: String,
    /// How writes are followed
    #[arg(long, value_enum, default_value = "auto")]
    pub tracker: Tracker,
    /// With a filter: a blank device of the server for what memory has no room for, and for marks
    /// that outlive a reboot. All that is on it is lost
    #[arg(long, value_name = "DEVICE")]
    pub reserve: Option<String>,
    /// Unit of tracking, a power of two [default: 4KiB up to 4 TiB, 16KiB above]
    #[arg(long, value_name = "SIZE", value_parser = block_size)]
    pub block_size: Option<u32>,
    /// Replicate swap partitions too
    #[arg(long)]
    pub include_swap: bool,
    /// Wait until the server is protected, and show how far it is
    #[arg(long, conflicts_with = "dry_run")]
    pub wait: bool,
    /// Show the plan, change nothing
    #[arg(long)]
    pub dry_run: bool,
}

/// How writes are followed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Tracker {
    /// The best that the host offers.
    Auto,
    /// A filter in the write path or refuse. Users of an unmounted disk open /dev/secondsite/NAME
    /// from then on.
    Ublk,
    /// eBPF or refuse.
    Ebpf,
    /// By schedule, reading everything.
    Compare,
}

impl From<Tracker> for TrackerChoice {
    fn from(tracker: Tracker) -> Self {
        match tracker {
            Tracker::Auto => Self::Auto,
            Tracker::Ublk => Self::Ublk,
            Tracker::Ebpf => Self::Ebpf,
            Tracker::Compare => Self::Compare,
        }
    }
}

/// `unprotect`.
#[derive(Debug, Args)]
pub struct UnprotectArgs {
    /// Name of the server
    #[arg(value_parser = server_name)]
    pub server: String,
    /// Say what would be stopped, change nothing
    #[arg(long)]
    pub dry_run: bool,
}

/// `status`.
#[derive(Debug, Args)]
pub struct StatusArgs {
    /// Name of a server; all without one
    #[arg(value_parser = server_name)]
    pub server: Option<String>,
    /// Go on until interrupted: redraws a terminal, else prints a block for every change
    #[arg(long)]
    pub watch: bool,
    /// Go on until interrupted, without redrawing; with --json one document a line
    #[arg(long)]
    pub follow: bool,
}

/// `explain`.
#[derive(Debug, Args)]
pub struct ExplainArgs {
    /// A server, or a code that status showed; without it all that needs attention
    #[arg(value_name = "SERVER|CODE", value_parser = server_name)]
    pub what: Option<String>,
    /// One volume of the server, by name or path
    pub volume: Option<String>,
    /// List all codes
    #[arg(long, conflicts_with = "what")]
    pub list: bool,
}

/// `check`.
#[derive(Debug, Args)]
pub struct CheckArgs {
    /// Name of the server
    #[arg(value_parser = server_name)]
    pub server: String,
    /// Loss above which it is a warning [default: the goal]
    #[arg(long, value_name = "TIME", value_parser = goal)]
    pub warning: Option<u64>,
    /// Loss above which it is critical [default: twice the goal]
    #[arg(long, value_name = "TIME", value_parser = goal)]
    pub critical: Option<u64>,
}

/// `config`.
#[derive(Debug, Args)]
pub struct ConfigArgs {
    /// What to do with them.
    #[command(subcommand)]
    pub action: ConfigAction,
}

/// What can be done with the configuration files.
#[derive(Debug, Subcommand)]
pub enum ConfigAction {
    /// Check every file and drop-in: unknown keys, bad values, what is missing
    Check(ConfigCheckArgs),
}

/// `config check`.
#[derive(Debug, Args)]
pub struct ConfigCheckArgs {
    /// Print every value that counts, and the file it comes from
    #[arg(long)]
    pub show: bool,
}

/// `generate`.
#[derive(Debug, Args)]
pub struct GenerateArgs {
    /// Completions for a shell on stdout, or man pages
    #[arg(value_enum)]
    pub what: Generated,
    /// Folder of the man pages
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
}

/// What can be generated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Generated {
    /// Completions.
    Bash,
    /// Completions.
    Zsh,
    /// Completions.
    Fish,
    /// Man pages.
    Man,
}

/// A command about one server.
#[derive(Debug, Args)]
pub struct ServerArgs {
    /// Name of the server
    #[arg(value_parser = server_name)]
    pub server: String,
}

/// Which recovery point.
#[derive(Debug, Args)]
pub struct PointArgs {
    /// The newest exact point of this time or before: 2026-11-21T10:30:00Z, '10 min ago', 10:30
    /// [default: the newest exact one]
    #[arg(long, value_name = "TIME")]
    pub at: Option<String>,
    /// A point, by id or name
    #[arg(long, value_name = "ID|NAME", conflicts_with = "at")]
    pub point: Option<String>,
}

/// `open`.
#[derive(Debug, Args)]
pub struct OpenArgs {
    /// Name of the server
    #[arg(value_parser = server_name, required_unless_present = "list")]
    pub server: Option<String>,
    /// Which point.
    #[command(flatten)]
    pub point: PointArgs,
    /// Only this volume
    #[arg(long, value_name = "NAME")]
    pub volume: Option<String>,
    /// Show what is open
    #[arg(long, conflicts_with_all = ["at", "point", "volume"])]
    pub list: bool,
}

/// `close`.
#[derive(Debug, Args)]
pub struct CloseArgs {
    /// Name of the server
    #[arg(value_parser = server_name)]
    pub server: String,
    /// Only this point, by id or name [default: all of the server]
    #[arg(long, value_name = "ID|NAME")]
    pub point: Option<String>,
}

/// `keep`.
#[derive(Debug, Args)]
pub struct KeepArgs {
    /// Name of the server
    #[arg(value_parser = server_name)]
    pub server: String,
    /// The point, by id or name
    #[arg(long, value_name = "ID|NAME")]
    pub point: String,
    /// What to call it: letters, digits and -_.
    #[arg(long, value_name = "NAME", conflicts_with = "release")]
    pub name: Option<String>,
    /// Keep it no longer than its time
    #[arg(long)]
    pub release: bool,
}

/// `export`.
#[derive(Debug, Args)]
pub struct ExportArgs {
    /// Name of the server
    #[arg(value_parser = server_name)]
    pub server: String,
    /// Which point.
    #[command(flatten)]
    pub point: PointArgs,
    /// Which volume [default: the only one]
    #[arg(long, value_name = "NAME")]
    pub volume: Option<String>,
    /// Format of the image
    #[arg(long, value_enum, default_value = "qcow2")]
    pub format: ImageFormat,
    /// The image file; it appears when it is whole
    #[arg(long, short, value_name = "FILE")]
    pub output: PathBuf,
}

/// Formats of image files.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ImageFormat {
    /// The bytes as they are, sparse
    Raw,
    /// QEMU
    Qcow2,
    /// VMware
    Vmdk,
    /// Hyper-V
    Vhdx,
}

impl ImageFormat {
    /// As qemu-img calls it.
    pub fn word(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
            Self::Vmdk => "vmdk",
            Self::Vhdx => "vhdx",
        }
    }
}

/// `cut`.
#[derive(Debug, Args)]
pub struct CutArgs {
    /// Name of the server
    #[arg(value_parser = server_name)]
    pub server: String,
    /// Wait until the point is committed, listed and exact
    #[arg(long)]
    pub wait: bool,
}

fn server_name(text: &str) -> Result<String, String> {
    if secondsite_control::pki::is_name(text) {
        Ok(text.to_string())
    } else {
        Err("a name has 1 to 64 of A-Z a-z 0-9 . _ -".into())
    }
}

fn host_port(text: &str) -> Result<String, String> {
    let good = text.rsplit_once(':').is_some_and(|(host, port)| {
        !host.is_empty() && port.parse::<u16>().is_ok_and(|port| port != 0)
    });
    if good { Ok(text.to_string()) } else { Err("expected ADDR:PORT, such as dr1:7443".into()) }
}

fn token_life(text: &str) -> Result<u64, String> {
    match parse_seconds(text).map_err(|error| error.to_string())? {
        seconds @ 1..=TOKEN_SECONDS_MAX => Ok(seconds),
        _ => Err("a token is good for 1s to 1h".into()),
    }
}

fn keep(text: &str) -> Result<String, String> {
    secondsite_control::keep::parse(text).map_err(|error| error.to_string())?;
    Ok(text.to_owned())
}

fn goal(text: &str) -> Result<u64, String> {
    match parse_seconds(text).map_err(|error| error.to_string())? {
        0 => Err("a goal is at least 1s".into()),
        seconds => Ok(seconds),
    }
}

const PRESERVE_BYTES_MIN: u64 = 16 << 10;
const PRESERVE_BYTES_MAX: u64 = 4 << 30;

fn preserve_size(text: &str) -> Result<u64, String> {
    match parse_bytes(text).map_err(|error| error.to_string())? {
        bytes @ PRESERVE_BYTES_MIN..=PRESERVE_BYTES_MAX => Ok(bytes),
        _ => Err("from 16KiB to 4GiB a volume".into()),
    }
}

fn block_size(text: &str) -> Result<u32, String> {
    let bytes = parse_bytes(text).map_err(|error| error.to_string())?;
    match u32::try_from(bytes) {
        Ok(bytes @ BLOCK_BYTES_MIN..=BLOCK_BYTES_MAX) if bytes.is_power_of_two() => Ok(bytes),
        _ => Err("a block size is a power of two from 4KiB to 1MiB".into()),
    }
}
