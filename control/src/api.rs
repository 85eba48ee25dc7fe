//! What control, agents, targets and the CLI say to each other: JSON over mutual TLS, `/api/v1`.
//!
//! Units stand in the names; times are RFC 3339 UTC where people read them and nanoseconds or
//! seconds since 1970 where machines do. Ids are 32 hex digits. Unknown fields are ignored, so that
//! one side may be newer.

use crate::codes::{Reason, State};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Version of every JSON document that a command prints.
pub const SCHEMA_VERSION: u32 = 1;

/// How a volume's writes are followed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TrackerChoice {
    /// The best that the host offers.
    Auto,
    /// A filter in the write path, or refuse.
    Ublk,
    /// eBPF or refuse.
    Ebpf,
    /// By schedule, reading everything.
    Compare,
}

/// What an agent is to do; whole and declarative, replaced when `version` rises.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentAssignment {
    /// Rises with every change.
    pub version: u64,
    /// This server.
    pub server_id: String,
    /// Its name.
    pub server_name: String,
    /// Where the target listens, `HOST:PORT`; none before there is one.
    pub target: Option<String>,
    /// The goal (RPO), seconds.
    pub goal_seconds: u64,
    /// The protected volumes; empty if none.
    pub volumes: Vec<VolumeAssignment>,
}

/// One protected volume, as its agent sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeAssignment {
    /// Its id.
    pub id: String,
    /// Its name (`sda`, `vg0/pg`, `loop3`).
    pub name: String,
    /// The device node; always one of the agent's own inventory.
    pub path: String,
    /// Size when it was protected, bytes.
    pub size_bytes: u64,
    /// How to follow it.
    pub tracker: TrackerChoice,
    /// Unit of tracking, bytes.
    pub block_bytes: u32,
    /// Excluded byte ranges (offset, length): swap.
    #[serde(default)]
    pub excluded: Vec<(u64, u64)>,
    /// Behind a filter: a device of the server for blocks that memory has no room to preserve, and
    /// for marks that outlive a reboot.
    #[serde(default)]
    pub reserve: Option<String>,
}

/// Something to do once. Numbers rise per server; an order seen again is answered again, not done
/// again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Order {
    /// Its number.
    pub number: u64,
    /// What to do.
    pub what: OrderKind,
}

/// The kinds of [`Order`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OrderKind {
    /// Cut as soon as possible; done when a point cut after the order is committed on the target
    /// and, unless a volume is compare-only, exact.
    Cut,
    /// Compare source and newest point without marking.
    Verify,
}

/// How far an order is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "lowercase")]
pub enum OrderState {
    /// Not seen by the agent yet.
    Waiting,
    /// In work.
    Running {
        /// 0..=100, only growing.
        percent: u8,
        /// What it waits for or does, for people.
        note: String,
    },
    /// Done.
    Done {
        /// What came of it.
        result: OrderResult,
    },
    /// It could not be done.
    Failed {
        /// Exit code of the command that waits for it (see the conventions of the CLI).
        exit_code: u8,
        /// What failed, where, why, and what to type.
        message: String,
    },
}

/// What came of an order.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OrderResult {
    /// The committed point.
    Cut {
        /// Its id (the cut id).
        point: String,
        /// Whether it is exact.
        exact: bool,
    },
    /// The comparison, by volume.
    Verify {
        /// A row a volume.
        volumes: Vec<VerifyResult>,
    },
}

/// Outcome of a verify for one volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VerifyResult {
    /// The volume's name.
    pub name: String,
    /// Bytes compared.
    pub compared_bytes: u64,
    /// Bytes that differ and were held by no bitmap and no later epoch.
    pub differing_bytes: u64,
    /// The first differing ranges (offset, length), bytes.
    #[serde(default)]
    pub differing: Vec<(u64, u64)>,
}

/// Agent to control, `POST /api/v1/agent/report`: on every change (at most twice a second) and
/// every 5 s.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AgentReport {
    /// Version of Secondsite.
    pub agent_version: String,
    /// A row a protected volume.
    pub volumes: Vec<VolumeReport>,
    /// State of every order not yet known to be finished at control.
    pub orders: BTreeMap<u64, OrderState>,
    /// Why nothing runs at all (another machine, no certificate), if so.
    pub stopped: Option<String>,
}

/// What a volume is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VolumePhase {
    /// No session with the target yet, or none now.
    Connecting,
    /// The first copy.
    FirstCopy,
    /// Source and target are compared.
    Comparing,
    /// Changes are followed.
    Following,
    /// It cannot go on; `reason` says why and what to do.
    Stopped,
}

/// One volume, as its agent sees it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VolumeReport {
    /// Its id.
    pub id: String,
    /// What it is doing.
    pub phase: VolumePhase,
    /// Why it is not simply following: a sentence with the remedy; empty if there is nothing to say.
    pub reason: String,
    /// The same as a code; an older agent says none.
    #[serde(default)]
    pub code: Option<Reason>,
    /// The tracker in use: `ebpf`, `compare`; `none` before it runs.
    pub tracker: String,
    /// Why this tracker and no better one; empty if it is the best.
    pub tracker_reason: String,
    /// The same as a code; an older agent says none.
    #[serde(default)]
    pub tracker_code: Option<Reason>,
    /// How the last cut was made: `quiet`, `freeze`, `compare`, `unproven`; `none` before.
    pub cut: String,
    /// Done and total bytes of the first copy or compare.
    pub progress_bytes: Option<(u64, u64)>,
    /// Bytes not yet committed on the target.
    pub backlog_bytes: u64,
    /// Bytes sent since the daemon started.
    pub sent_bytes: u64,
    /// Compares that a doubt about the tracker made necessary, since the daemon started.
    pub compares: u64,
}

/// What a target is to serve.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TargetAssignment {
    /// Rises with every change.
    pub version: u64,
    /// The servers whose agents may connect.
    pub servers: Vec<TargetServer>,
}

/// One server, as the target sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TargetServer {
    /// Its id; also its folder's name in the store.
    pub id: String,
    /// Its name, for people.
    pub name: String,
    /// Digest of its machine's identity, 64 hex digits.
    pub machine: String,
    /// False after `unprotect` or revocation: no session, replica and points stay.
    pub active: bool,
    /// Which recovery points to keep; none: as few as there can be.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keep: Option<KeepPolicy>,
    /// Its volumes.
    pub volumes: Vec<TargetVolume>,
}

/// Which recovery points are kept: all for an hour, then one per 5 minutes, then one per hour.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeepPolicy {
    /// One per 5 minutes (all in the first hour) for so long.
    pub fine_seconds: u64,
    /// One per hour for so long.
    pub coarse_seconds: u64,
}

/// One volume, as the target sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TargetVolume {
    /// Its id; also its folder's name in the store.
    pub id: String,
    /// Its name, for people and for `[[device]]` in target.toml.
    pub name: String,
    /// Size, bytes.
    pub size_bytes: u64,
    /// Unit of tracking, bytes.
    pub block_bytes: u32,
}

/// Target to control, `POST /api/v1/target/report`: on every change (at most twice a second) and
/// every 5 s.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TargetReport {
    /// Version of Secondsite.
    pub target_version: String,
    /// A row a volume in the store.
    pub volumes: Vec<TargetVolumeReport>,
    /// All recovery points, by server, oldest first.
    pub points: Vec<PointReport>,
    /// Free space of the store, bytes.
    pub free_bytes: u64,
}

/// One volume, as the target sees it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TargetVolumeReport {
    /// Its id.
    pub id: String,
    /// Whether an agent is connected.
    pub connected: bool,
    /// The first copy is complete.
    pub copied: bool,
    /// Its generation.
    pub generation: u64,
    /// Newest committed epoch; none before.
    pub epoch: Option<u64>,
    /// Epoch that the replica volume equals (while promoting: the one before); none before.
    pub promoted_epoch: Option<u64>,
    /// The replica volume: absolute path of a file or device.
    pub replica: String,
    /// Bytes of the journal.
    pub journal_bytes: u64,
    /// Why the volume stopped here, if it did.
    pub error: Option<String>,
    /// The last refusal of a session, for people, if it was the last thing that happened.
    pub refused: Option<String>,
}

/// One recovery point.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PointReport {
    /// The server's id.
    pub server: String,
    /// The cut id, 32 hex digits: `points[].id`.
    pub id: String,
    /// Time of the cut by the agent's clock, nanoseconds since 1970 UTC.
    pub time_ns: u64,
    /// Its generation.
    pub generation: u64,
    /// Epoch by volume id.
    pub epochs: BTreeMap<String, u64>,
    /// `application`, `crash` or `fuzzy`.
    pub consistency: String,
    /// Ids of protected volumes that it lacks.
    pub lacking: Vec<String>,
    /// Why it is fuzzy, for people; empty if it is exact.
    pub reason: String,
    /// Somebody keeps it beyond its time.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub kept: bool,
    /// Its name, if somebody gave it one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
}

/// An attached block device that could be protected.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InventoryDevice {
    /// Its name (`sda`, `sda1`, `vg0/pg`, `loop3`).
    pub name: String,
    /// The device node.
    pub path: String,
    /// `disk`, `part`, `lvm`, `loop`, …
    pub kind: String,
    /// Size, bytes.
    pub size_bytes: u64,
    /// Where it or its parts are mounted, and what else uses it, for people.
    pub used_by: String,
    /// Swap on it: (offset, length) in bytes, with the partition's name.
    #[serde(default)]
    pub swap: Vec<(String, u64, u64)>,
    /// Name of the whole disk or volume that it lies on; empty if it is whole itself.
    #[serde(default)]
    pub parent: String,
    /// Trackers it could have, best first: `ebpf`, `compare`.
    pub trackers: Vec<String>,
    /// Why it cannot be protected, or not by a better tracker, with what to choose instead.
    #[serde(default)]
    pub refused: String,
}

/// New machine to control, `POST /enrol`. The certificate request is PEM; names in it are ignored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EnrolRequest {
    /// The one-time token.
    pub token: String,
    /// Certificate request, PEM.
    pub request_pem: String,
    /// Wished name, `[A-Za-z0-9._-]{1,64}`.
    pub name: String,
    /// Digest of the machine's identity, 64 hex digits.
    pub machine: String,
    /// Its devices.
    pub inventory: Vec<InventoryDevice>,
}

/// Answer to [`EnrolRequest`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EnrolReply {
    /// The id given.
    pub id: String,
    /// The name given.
    pub name: String,
    /// The certificate, PEM.
    pub certificate_pem: String,
    /// The authority, PEM.
    pub authority_pem: String,
}

/// `POST /api/v1/renew`, and its answer in [`EnrolReply`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RenewRequest {
    /// Certificate request, PEM, for a fresh key.
    pub request_pem: String,
}

/// Agent, `GET /api/v1/agent/poll?assignment=V&order=N&wait_seconds=S`: answers at once if there is
/// a newer assignment or an order above N, else when there is one or the wait is over.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentPoll {
    /// The assignment, if it is newer than V.
    pub assignment: Option<AgentAssignment>,
    /// Orders above N, rising.
    pub orders: Vec<Order>,
}

/// Target, `GET /api/v1/target/poll?assignment=V&wait_seconds=S`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TargetPoll {
    /// The assignment, if it is newer than V.
    pub assignment: Option<TargetAssignment>,
}

/// `POST /api/v1/tokens`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenRequest {
    /// `agent`, `target` or `relay`.
    pub role: String,
    /// Life, seconds; at most 3600.
    pub ttl_seconds: u64,
}

/// Answer to [`TokenRequest`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenReply {
    /// Shown once; control keeps only its digest.
    pub token: String,
    /// SHA-256 of the authority's certificate, `SHA256:` and 64 hex digits.
    pub fingerprint: String,
    /// Seconds it is good for.
    pub ttl_seconds: u64,
}

/// `POST /api/v1/servers/NAME/protect`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProtectRequest {
    /// Device paths or names, or the one word `all`.
    pub volumes: Vec<String>,
    /// The goal, seconds.
    pub goal_seconds: u64,
    /// How long recovery points are kept: `none`, or as in `24h,15d` ([`crate::keep`]).
    pub keep: String,
    /// How to follow.
    pub tracker: TrackerChoice,
    /// With a filter: a device of the server for blocks that memory has no room to preserve, and for
    /// marks that outlive a reboot; the same for all its volumes.
    #[serde(default)]
    pub reserve: Option<String>,
    /// Unit of tracking, bytes; none: 4 KiB up to 4 TiB, 16 KiB above.
    pub block_bytes: Option<u32>,
    /// Ship swap too.
    pub include_swap: bool,
    /// Say what would be done, do nothing.
    pub dry_run: bool,
}

/// What `protect` does or would do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProtectReply {
    /// The server's name.
    pub server: String,
    /// A row a volume newly protected.
    pub volumes: Vec<PlannedVolume>,
    /// What `all` leaves out: a sentence a device, with the reason.
    #[serde(default)]
    pub left_out: Vec<String>,
}

/// One volume of a plan.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlannedVolume {
    /// Its name.
    pub name: String,
    /// The device node.
    pub path: String,
    /// Size, bytes.
    pub size_bytes: u64,
    /// The tracker it will have, as far as the inventory tells.
    pub tracker: String,
    /// Unit of tracking, bytes.
    pub block_bytes: u32,
    /// What is left out: partition name and bytes.
    pub skipped_swap: Vec<(String, u64)>,
}

/// `GET /api/v1/status` (all servers) and `/api/v1/servers/NAME/status` (one).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// [`SCHEMA_VERSION`].
    pub schema_version: u32,
    /// A row a server.
    pub servers: Vec<ServerStatus>,
    /// What needs attention beyond single servers: certificates near their end, a silent target.
    pub warnings: Vec<Warning>,
}

/// What needs attention beyond single servers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Warning {
    /// What kind.
    pub code: Reason,
    /// What, where, and what to type.
    pub text: String,
}

/// One server.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ServerStatus {
    /// Its name.
    pub name: String,
    /// Its state.
    pub state: State,
    /// Why it is not protected; none if it is.
    #[serde(default)]
    pub code: Option<Reason>,
    /// The same for people, with what to type; empty if it is protected.
    pub reason: String,
    /// Since when it is so, as far as control knows, RFC 3339.
    #[serde(default)]
    pub since: Option<String>,
    /// Now minus the cut time of the newest exact point; none before the first.
    pub loss_seconds: Option<f64>,
    /// Bytes not yet committed on the target.
    pub backlog_bytes: u64,
    /// The goal.
    pub goal_seconds: u64,
    /// From the oldest recovery point to the newest, seconds; none: no point.
    #[serde(default)]
    pub history_seconds: Option<f64>,
    /// How long the policy keeps recovery points, seconds; none: the newest alone.
    #[serde(default)]
    pub keep_seconds: Option<u64>,
    /// How far the first copy or compare is, 0..=100; 100 only when all of it is durable. None in
    /// every other state.
    #[serde(default)]
    pub percent: Option<u8>,
    /// Seconds that the first copy or compare will take by the speed of the last minute; none if
    /// there is none, or too little is known.
    #[serde(default)]
    pub left_seconds: Option<f64>,
    /// Bytes a second to the target over the last minute; none if too little is known.
    #[serde(default)]
    pub sending_bytes_per_second: Option<f64>,
    /// Seconds since the agent was last heard; none before.
    pub heard_seconds: Option<f64>,
    /// When the agent's certificate ends, RFC 3339.
    pub certificate_ends: String,
    /// A row a volume.
    pub volumes: Vec<VolumeStatus>,
}

/// One volume.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VolumeStatus {
    /// Its name.
    pub name: String,
    /// The device node on the server.
    pub path: String,
    /// Size, bytes.
    pub size_bytes: u64,
    /// What it is doing.
    pub phase: VolumePhase,
    /// Why, if there is something to say.
    pub reason: String,
    /// The same as a code.
    #[serde(default)]
    pub code: Option<Reason>,
    /// Since when it is so, as far as control knows, RFC 3339.
    #[serde(default)]
    pub since: Option<String>,
    /// The tracker in use.
    pub tracker: String,
    /// Why no better one.
    pub tracker_reason: String,
    /// The same as a code.
    #[serde(default)]
    pub tracker_code: Option<Reason>,
    /// How the last cut was made.
    pub cut: String,
    /// Done and total bytes of the first copy or compare.
    pub progress_bytes: Option<(u64, u64)>,
    /// Bytes not yet committed.
    pub backlog_bytes: u64,
    /// Bytes sent since the agent started.
    pub sent_bytes: u64,
    /// Compares that a doubt made necessary, since the agent started.
    pub compares: u64,
    /// Newest committed epoch on the target; none before.
    pub epoch: Option<u64>,
    /// Epoch of the replica volume; none before.
    pub promoted_epoch: Option<u64>,
    /// Absolute path of the replica volume on the target; none before there is one.
    pub replica: Option<String>,
}

/// `GET /api/v1/servers/NAME/points`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Points {
    /// [`SCHEMA_VERSION`].
    pub schema_version: u32,
    /// Oldest first.
    pub points: Vec<Point>,
}

/// One recovery point, for people.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Point {
    /// The cut id.
    pub id: String,
    /// Time of the cut, RFC 3339 UTC.
    pub time: String,
    /// Its generation.
    pub generation: u64,
    /// Epoch by volume name.
    pub epochs: BTreeMap<String, u64>,
    /// `application`, `crash` or `fuzzy`.
    pub consistency: String,
    /// Names of protected volumes that it lacks.
    pub lacking: Vec<String>,
    /// Why it is fuzzy; empty if it is exact.
    pub reason: String,
    /// Somebody keeps it beyond its time.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub kept: bool,
    /// Its name, if somebody gave it one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
}

/// `POST /api/v1/servers/NAME/orders` with an [`OrderKind`]; answered with the order's number.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OrderReply {
    /// The order's number; `GET /api/v1/servers/NAME/orders/NUMBER?wait_seconds=S` gives its
    /// [`OrderState`], at once if it is finished.
    pub number: u64,
}

/// `GET /api/v1/servers`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Servers {
    /// [`SCHEMA_VERSION`].
    pub schema_version: u32,
    /// A row a server, by name.
    pub servers: Vec<ServerEntry>,
}

/// One server, as it joined.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServerEntry {
    /// Its id.
    pub id: String,
    /// Its name.
    pub name: String,
    /// Its certificates were revoked.
    pub revoked: bool,
    /// Its devices, as its agent offered them last: at `/enrol`, or by
    /// `POST /api/v1/agent/inventory` (a list of [`InventoryDevice`]).
    pub inventory: Vec<InventoryDevice>,
}

/// Body of every answer that is not a success.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// Exit code that the command should end with.
    pub exit_code: u8,
    /// What failed, where and why.
    pub message: String,
    /// What to type or do.
    #[serde(default)]
    pub hint: String,
}
