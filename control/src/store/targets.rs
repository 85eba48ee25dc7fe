//! Targets.

use super::{Result, nanoseconds};
use crate::api::TargetReport;
use jiff::Timestamp;
use sqlx::FromRow;
use sqlx::sqlite::SqliteConnection;

/// A row of `targets`.
#[derive(Debug, Clone, FromRow)]
pub(crate) struct Target {
    pub(crate) id: String,
    pub(crate) name: String,
    pub(crate) address: String,
    pub(crate) assignment_version: i64,
    report: Option<String>,
    pub(crate) heard_ns: Option<i64>,
}

impl Target {
    /// The last report that was saved.
    pub(crate) fn report(&self) -> Result<Option<TargetReport>> {
        Ok(self.report.as_deref().map(serde_json::from_str).transpose()?)
    }
}

pub(crate) async fn all(db: &mut SqliteConnection) -> Result<Vec<Target>> {
    Ok(sqlx::query_as("SELECT * FROM targets ORDER BY name").fetch_all(db).await?)
}

pub(crate) async fn by_id(db: &mut SqliteConnection, id: &str) -> Result<Option<Target>> {
    Ok(sqlx::query_as("SELECT * FROM targets WHERE id = $1").bind(id).fetch_optional(db).await?)
}

/// Makes a target or changes the address of the one with its id.
pub(crate) async fn put(
    db: &mut SqliteConnection,
    id: &str,
    name: &str,
    address: &str,
) -> Result<()> {
    sqlx::query(
        "INSERT INTO targets (id, name, address) VALUES ($1, $2, $3)
         ON CONFLICT (id) DO UPDATE SET name = excluded.name, address = excluded.address",
    )
    .bind(id)
    .bind(name)
    .bind(address)
    .execute(db)
    .await?;
    Ok(())
}

pub(crate) async fn save_report(
    db: &mut SqliteConnection,
    id: &str,
    report: &TargetReport,
    heard: Timestamp,
) -> Result<()> {
    sqlx::query("UPDATE targets SET report = $2, heard_ns = $3 WHERE id = $1")
        .bind(id)
        .bind(serde_json::to_string(report)?)
        .bind(nanoseconds(heard))
        .execute(db)
        .await?;
    Ok(())
}

/// What targets are to do has changed.
pub(crate) async fn changed(db: &mut SqliteConnection) -> Result<()> {
    sqlx::query("UPDATE targets SET assignment_version = assignment_version + 1")
        .execute(db)
        .await?;
    Ok(())
}
