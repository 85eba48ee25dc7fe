//! What is in the store and in the reports, as the API shows it.

use crate::api::{
    AgentAssignment, SCHEMA_VERSION, ServerStatus, Status, TargetAssignment, TargetServer,
    TargetVolume, VolumeAssignment, Warning,
};
use crate::certificate::Role;
use crate::codes::Reason;
use crate::deployment::{Deployment, Reports};
use crate::keep;
use crate::observed::{ServerRow, Snapshot};
use crate::problem::{Refused, Result};
use crate::status::{self, AWAY_SECONDS, Known, KnownVolume, duration, seconds_since};
use crate::store::access::{self, Newest};
use crate::store::servers::{Server, Volume, VolumeState};
use crate::store::targets::Target;
use crate::store::{self, servers, targets};
use jiff::Timestamp;
use sqlx::sqlite::SqliteConnection;

/// Certificates renew themselves after a third of their life; one with less than this share left
/// will end unrenewed.
const WARN_SHARE: i64 = 3;

/// The server with this name.
pub(super) async fn server(db: &mut SqliteConnection, name: &str) -> Result<Server> {
    servers::by_name(db, name).await?.ok_or_else(|| {
        Refused::unknown(format!("there is no server named {name:?}")).hint("secondsite status")
    })
}

/// What an agent is to do.
pub(super) async fn agent_assignment(
    db: &mut SqliteConnection,
    server: &Server,
) -> Result<AgentAssignment> {
    // One target serves all servers.
    let target = targets::all(db).await?.into_iter().next().map(|target| target.address);
    let protected = servers::volumes(db, &server.id).await?;
    let protected = protected.iter().filter(|volume| volume.state == VolumeState::Protected);
    let volumes = protected.map(|volume| {
        Ok(VolumeAssignment {
            id: volume.id.clone(),
            name: volume.name.clone(),
            path: volume.path.clone(),
            size_bytes: volume.size_bytes(),
            tracker: volume.tracker()?,
            block_bytes: volume.block_bytes(),
            excluded: volume.excluded()?,
            reserve: volume.reserve.clone(),
        })
    });
    Ok(AgentAssignment {
        version: server.assignment_version.cast_unsigned(),
        server_id: server.id.clone(),
        server_name: server.name.clone(),
        target,
        goal_seconds: server.goal_s.cast_unsigned(),
        volumes: volumes.collect::<Result<_>>()?,
    })
}

/// What a target is to serve. An active server has its protected volumes, since points lack what is
/// missing of them; one that is not keeps all that it ever had.
pub(super) async fn target_assignment(
    db: &mut SqliteConnection,
    target: &Target,
) -> Result<TargetAssignment> {
    let volumes = servers::all_volumes(db).await?;
    let of_server = |server: Server| {
        let own = || volumes.iter().filter(|volume| volume.server == server.id);
        let is_protected = |volume: &Volume| volume.state == VolumeState::Protected;
        let active = !server.revoked && own().any(is_protected);
        let volumes = own().filter(|volume| !active || is_protected(volume));
        let volumes = volumes.map(|volume| TargetVolume {
            id: volume.id.clone(),
            name: volume.name.clone(),
            size_bytes: volume.size_bytes(),
            block_bytes: volume.block_bytes(),
        });
        let volumes = volumes.collect();
        // What was stored was checked; what a newer control stored is not known here.
        let keep = keep::parse(&server.keep).unwrap_or_default();
        let Server { id, name, machine, .. } = server;
        TargetServer { id, name, machine, active, keep, volumes }
    };
    let servers = servers::all(db).await?.into_iter().map(of_server).collect();
    Ok(TargetAssignment { version: target.assignment_version.cast_unsigned(), servers })
}

/// The status of all servers, or of one.
pub(super) async fn status(deployment: &Deployment, name: Option<&str>) -> Result<Status> {
    let now = deployment.now();
    let mut tx = deployment.store.begin().await?;
    let rows = match name {
        Some(name) => vec![server(&mut tx, name).await?],
        None => servers::all(&mut tx).await?,
    };
    let volumes = servers::all_volumes(&mut tx).await?;
    let targets = targets::all(&mut tx).await?;
    let certificates = access::newest_certificates(&mut tx).await?;
    let decided = store::decided(&mut tx).await?;
    let everybody = match name {
        Some(_) => servers::all(&mut tx).await?,
        None => rows.clone(),
    };
    drop(tx);
    let reports = deployment.reports();
    let mut warnings: Vec<Warning> =
        targets.iter().filter_map(|target| target_warning(target, &reports, now)).collect();
    let ending = certificates.iter().filter_map(|row| certificate_warning(row, &everybody, now));
    warnings.extend(ending);
    let row =
        |row: &Server| server_status(row, &volumes, &reports, decided.get(&row.name).copied(), now);
    let servers = rows.iter().map(row).collect();
    Ok(Status { schema_version: SCHEMA_VERSION, servers, warnings })
}

fn server_status(
    server: &Server,
    volumes: &[Volume],
    reports: &Reports,
    decided: Option<Timestamp>,
    now: Timestamp,
) -> ServerStatus {
    let agent = reports.agents.get(&server.id);
    let targets = || reports.targets.values().map(|heard| &heard.report);
    let own = volumes.iter().filter(|volume| volume.server == server.id);
    let volumes = own.map(|volume| KnownVolume {
        id: &volume.id,
        name: &volume.name,
        path: &volume.path,
        size_bytes: volume.size_bytes(),
        protected: volume.state == VolumeState::Protected,
        agent: agent.and_then(|heard| heard.report.volumes.iter().find(|row| row.id == volume.id)),
        since: reports.phase_since(&volume.id),
        target: targets().flat_map(|report| &report.volumes).find(|row| row.id == volume.id),
    });
    let points = targets().flat_map(|report| &report.points);
    let known = Known {
        name: &server.name,
        revoked: server.revoked,
        goal_seconds: server.goal_s.cast_unsigned(),
        keep_seconds: keep::parse(&server.keep).unwrap_or_default().map(|keep| keep.coarse_seconds),
        certificate_ends: Timestamp::from_second(server.certificate_ends_s)
            .unwrap_or(Timestamp::MIN),
        decided,
        speed: reports.speed(&server.id),
        volumes: volumes.collect(),
        agent: agent.map(|heard| (&heard.report, heard.at)),
        points: points.filter(|point| point.server == server.id).collect(),
    };
    status::server_status(&known, now)
}

/// What metrics show.
pub(crate) async fn snapshot(deployment: &Deployment) -> Result<Snapshot> {
    let status = status(deployment, None).await?;
    let mut tx = deployment.store.begin().await?;
    let rows = servers::all(&mut tx).await?;
    let targets = targets::all(&mut tx).await?;
    let certificates = access::newest_certificates(&mut tx).await?;
    drop(tx);
    let reports = deployment.reports();
    let named = |id: &str| rows.iter().find(|row| row.id == id).map(|row| row.name.clone());
    let server = |server: ServerStatus| {
        let id = rows.iter().find(|row| row.name == server.name).map(|row| row.id.as_str());
        let points = reports.targets.values().flat_map(|heard| &heard.report.points);
        let exact = points
            .filter(|point| Some(point.server.as_str()) == id && point.consistency != "fuzzy");
        ServerRow {
            newest_exact_ns: exact.map(|point| point.time_ns).max(),
            heard: id.and_then(|id| reports.agents.get(id)).map(|heard| heard.at),
            name: server.name,
            state: server.state,
            goal_seconds: server.goal_seconds,
            backlog_bytes: server.backlog_bytes,
        }
    };
    let target =
        |row: &Target| (row.name.clone(), reports.targets.get(&row.id).map(|heard| heard.at));
    let certificate = |row: &Newest| {
        let ends = Timestamp::from_second(row.ends_s).ok()?;
        let (role, name) = match row.role.parse::<Role>().ok()? {
            Role::Agent(id) => ("agent", named(&id)?),
            Role::Target(id) => {
                ("target", targets.iter().find(|row| row.id == id).map(|row| row.name.clone())?)
            }
            Role::Operator(name) => ("operator", name),
            Role::Control => ("control", "control".to_owned()),
        };
        Some((role.to_owned(), name, ends))
    };
    Ok(Snapshot {
        servers: status.servers.into_iter().map(server).collect(),
        targets: targets.iter().map(target).collect(),
        certificates: certificates.iter().filter_map(certificate).collect(),
    })
}

fn target_warning(target: &Target, reports: &Reports, now: Timestamp) -> Option<Warning> {
    let name = &target.name;
    let Some(heard) = reports.targets.get(&target.id) else {
        let text = format!(
            "target {name} has not reported yet. On its host: systemctl status secondsite-target"
        );
        return Some(Warning { code: Reason::TargetNotStarted, text });
    };
    let silent = seconds_since(heard.at, now);
    (silent > AWAY_SECONDS).then(|| Warning {
        code: Reason::TargetSilent,
        text: format!(
            "target {name} was not heard for {}: points and loss are as of then. On its host: \
             systemctl status secondsite-target",
            duration(silent)
        ),
    })
}

fn certificate_warning(row: &Newest, servers: &[Server], now: Timestamp) -> Option<Warning> {
    let left = row.ends_s - now.as_second();
    if left > (row.ends_s - row.begins_s) / WARN_SHARE {
        return None;
    }
    let again = "secondsite setup, as before: it makes the certificate anew";
    let (holder, remedy, ended) = match row.role.parse::<Role>().ok()? {
        Role::Agent(id) => {
            let name = &servers.iter().find(|server| server.id == id)?.name;
            (
                format!("server {name}"),
                "systemctl status secondsite-agent, on the server",
                "secondsite token; then on the server: secondsite join, with the same name",
            )
        }
        Role::Target(_) => ("the target".to_owned(), "systemctl status secondsite-target", again),
        Role::Operator(name) => {
            (format!("operator {name}"), "any command renews it: secondsite status", again)
        }
        Role::Control => {
            let restart = "systemctl restart secondsite-control";
            ("control".to_owned(), restart, restart)
        }
    };
    Some(match left > 0 {
        true => Warning {
            code: Reason::CertificateEnding,
            text: format!(
                "the certificate of {holder} ends in {} and was not renewed. Type: {remedy}",
                duration(left as f64)
            ),
        },
        false => Warning {
            code: Reason::CertificateEnded,
            text: format!("the certificate of {holder} has ended. Type: {ended}"),
        },
    })
}
