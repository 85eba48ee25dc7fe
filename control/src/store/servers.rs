//! Servers and their volumes.

use super::{Result, nanoseconds};
use crate::api::{AgentReport, InventoryDevice, TrackerChoice};
use jiff::Timestamp;
use sqlx::FromRow;
use sqlx::sqlite::SqliteConnection;

/// A row of `servers`.
#[derive(Debug, Clone, FromRow)]
pub(crate) struct Server {
    pub(crate) id: String,
    pub(crate) name: String,
    pub(crate) machine: String,
    pub(crate) revoked: bool,
    pub(crate) goal_s: i64,
    pub(crate) keep: String,
    pub(crate) assignment_version: i64,
    pub(crate) certificate_ends_s: i64,
    inventory: String,
    report: Option<String>,
    pub(crate) heard_ns: Option<i64>,
}

impl Server {
    /// The devices that its agent offered last.
    pub(crate) fn inventory(&self) -> Result<Vec<InventoryDevice>> {
        Ok(serde_json::from_str(&self.inventory)?)
    }

    /// The last report that was saved.
    pub(crate) fn report(&self) -> Result<Option<AgentReport>> {
        Ok(self.report.as_deref().map(serde_json::from_str).transpose()?)
    }
}

/// Whether a volume is replicated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, sqlx::Type)]
#[sqlx(type_name = "TEXT", rename_all = "lowercase")]
pub(crate) enum VolumeState {
    /// It is.
    Protected,
    /// It was; its replica and points stay and are taken up again.
    Unprotected,
    /// It was, and its device has another size now.
    Retired,
}

/// A row of `volumes`.
#[derive(Debug, Clone, FromRow)]
pub(crate) struct Volume {
    pub(crate) id: String,
    pub(crate) server: String,
    pub(crate) name: String,
    pub(crate) path: String,
    pub(crate) size_bytes: i64,
    tracker: String,
    pub(crate) block_bytes: i64,
    excluded: String,
    pub(crate) state: VolumeState,
    pub(crate) reserve: Option<String>,
}

impl Volume {
    /// A volume that is protected from now on.
    pub(crate) fn protected(
        id: String,
        server: &str,
        device: &InventoryDevice,
        tracker: TrackerChoice,
        block_bytes: u32,
        excluded: &[(u64, u64)],
        reserve: Option<String>,
    ) -> Result<Self> {
        Ok(Self {
            id,
            server: server.to_owned(),
            name: device.name.clone(),
            path: device.path.clone(),
            size_bytes: i64::try_from(device.size_bytes).unwrap_or(i64::MAX),
            tracker: serde_json::to_string(&tracker)?,
            block_bytes: i64::from(block_bytes),
            excluded: serde_json::to_string(excluded)?,
            state: VolumeState::Protected,
            reserve,
        })
    }

    pub(crate) fn tracker(&self) -> Result<TrackerChoice> {
        Ok(serde_json::from_str(&self.tracker)?)
    }

    pub(crate) fn excluded(&self) -> Result<Vec<(u64, u64)>> {
        Ok(serde_json::from_str(&self.excluded)?)
    }

    pub(crate) fn size_bytes(&self) -> u64 {
        self.size_bytes.cast_unsigned()
    }

    pub(crate) fn block_bytes(&self) -> u32 {
        u32::try_from(self.block_bytes).unwrap_or(0)
    }
}

pub(crate) async fn all(db: &mut SqliteConnection) -> Result<Vec<Server>> {
    Ok(sqlx::query_as("SELECT * FROM servers ORDER BY name").fetch_all(db).await?)
}

pub(crate) async fn by_name(db: &mut SqliteConnection, name: &str) -> Result<Option<Server>> {
    Ok(sqlx::query_as("SELECT * FROM servers WHERE name = $1")
        .bind(name)
        .fetch_optional(db)
        .await?)
}

pub(crate) async fn by_id(db: &mut SqliteConnection, id: &str) -> Result<Option<Server>> {
    Ok(sqlx::query_as("SELECT * FROM servers WHERE id = $1").bind(id).fetch_optional(db).await?)
}

pub(crate) async fn insert(
    db: &mut SqliteConnection,
    id: &str,
    name: &str,
    machine: &str,
    inventory: &[InventoryDevice],
    certificate_ends: Timestamp,
) -> Result<()> {
    sqlx::query(
        "INSERT INTO servers (id, name, machine, inventory, certificate_ends_s)
         VALUES ($1, $2, $3, $4, $5)",
    )
    .bind(id)
    .bind(name)
    .bind(machine)
    .bind(serde_json::to_string(inventory)?)
    .bind(certificate_ends.as_second())
    .execute(db)
    .await?;
    Ok(())
}

pub(crate) async fn set_inventory(
    db: &mut SqliteConnection,
    id: &str,
    inventory: &[InventoryDevice],
) -> Result<()> {
    sqlx::query("UPDATE servers SET inventory = $2 WHERE id = $1")
        .bind(id)
        .bind(serde_json::to_string(inventory)?)
        .execute(db)
        .await?;
    Ok(())
}

pub(crate) async fn set_certificate_ends(
    db: &mut SqliteConnection,
    id: &str,
    ends: Timestamp,
) -> Result<()> {
    sqlx::query("UPDATE servers SET certificate_ends_s = $2 WHERE id = $1")
        .bind(id)
        .bind(ends.as_second())
        .execute(db)
        .await?;
    Ok(())
}

pub(crate) async fn set_goal(db: &mut SqliteConnection, id: &str, goal_s: u64) -> Result<()> {
    sqlx::query("UPDATE servers SET goal_s = $2 WHERE id = $1")
        .bind(id)
        .bind(i64::try_from(goal_s).unwrap_or(i64::MAX))
        .execute(db)
        .await?;
    Ok(())
}

pub(crate) async fn set_keep(db: &mut SqliteConnection, id: &str, keep: &str) -> Result<()> {
    let query = sqlx::query("UPDATE servers SET keep = $2 WHERE id = $1");
    query.bind(id).bind(keep).execute(db).await?;
    Ok(())
}

pub(crate) async fn revoke(db: &mut SqliteConnection, id: &str) -> Result<()> {
    sqlx::query("UPDATE servers SET revoked = 1 WHERE id = $1").bind(id).execute(db).await?;
    Ok(())
}

pub(crate) async fn save_report(
    db: &mut SqliteConnection,
    id: &str,
    report: &AgentReport,
    heard: Timestamp,
) -> Result<()> {
    sqlx::query("UPDATE servers SET report = $2, heard_ns = $3 WHERE id = $1")
        .bind(id)
        .bind(serde_json::to_string(report)?)
        .bind(nanoseconds(heard))
        .execute(db)
        .await?;
    Ok(())
}

/// What this server's agent and every target are to do has changed.
pub(crate) async fn changed(db: &mut SqliteConnection, id: &str) -> Result<()> {
    sqlx::query("UPDATE servers SET assignment_version = assignment_version + 1 WHERE id = $1")
        .bind(id)
        .execute(&mut *db)
        .await?;
    super::targets::changed(db).await
}

/// Volumes of all servers that are not retired, by name.
pub(crate) async fn all_volumes(db: &mut SqliteConnection) -> Result<Vec<Volume>> {
    Ok(sqlx::query_as("SELECT * FROM volumes WHERE state <> 'retired' ORDER BY name")
        .fetch_all(db)
        .await?)
}

/// Volumes of one server that are not retired, by name.
pub(crate) async fn volumes(db: &mut SqliteConnection, server: &str) -> Result<Vec<Volume>> {
    Ok(sqlx::query_as(
        "SELECT * FROM volumes WHERE server = $1 AND state <> 'retired' ORDER BY name",
    )
    .bind(server)
    .fetch_all(db)
    .await?)
}

/// Makes a volume or overwrites the one with its id.
pub(crate) async fn put_volume(db: &mut SqliteConnection, volume: &Volume) -> Result<()> {
    sqlx::query(
        "INSERT INTO volumes (id, server, name, path, size_bytes, tracker, block_bytes, excluded,
                              state, reserve)
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)
         ON CONFLICT (id) DO UPDATE SET path = excluded.path, size_bytes = excluded.size_bytes,
             tracker = excluded.tracker, excluded = excluded.excluded, state = excluded.state,
             reserve = excluded.reserve",
    )
    .bind(&volume.id)
    .bind(&volume.server)
    .bind(&volume.name)
    .bind(&volume.path)
    .bind(volume.size_bytes)
    .bind(&volume.tracker)
    .bind(volume.block_bytes)
    .bind(&volume.excluded)
    .bind(volume.state)
    .bind(&volume.reserve)
    .execute(db)
    .await?;
    Ok(())
}

/// Remembers that protected volumes have grown. No assignment changes by it: agents follow a device
/// as far as it goes, targets what their agents have committed.
pub(crate) async fn grow_volumes(
    db: &mut SqliteConnection,
    server: &str,
    inventory: &[InventoryDevice],
) -> Result<()> {
    for device in inventory {
        sqlx::query(
            "UPDATE volumes SET size_bytes = $3
             WHERE server = $1 AND path = $2 AND state = 'protected' AND size_bytes < $3",
        )
        .bind(server)
        .bind(&device.path)
        .bind(i64::try_from(device.size_bytes).unwrap_or(i64::MAX))
        .execute(&mut *db)
        .await?;
    }
    Ok(())
}

pub(crate) async fn set_volume_state(
    db: &mut SqliteConnection,
    id: &str,
    state: VolumeState,
) -> Result<()> {
    sqlx::query("UPDATE volumes SET state = $2 WHERE id = $1")
        .bind(id)
        .bind(state)
        .execute(db)
        .await?;
    Ok(())
}
