//! Tokens and certificates: who may come in.

use super::Result;
use crate::certificate::CertificateInfo;
use jiff::Timestamp;
use sqlx::FromRow;
use sqlx::sqlite::SqliteConnection;

/// Tokens are forgotten this long after their end.
const TOKEN_KEPT_SECONDS: i64 = 7 * 24 * 3600;

/// A row of `tokens`.
#[derive(Debug, Clone, FromRow)]
pub(crate) struct TokenRow {
    pub(crate) role: String,
    pub(crate) ends_s: i64,
    pub(crate) used_s: Option<i64>,
}

pub(crate) async fn insert_token(
    db: &mut SqliteConnection,
    sha256: &str,
    role: &str,
    ends_s: i64,
    now: Timestamp,
) -> Result<()> {
    sqlx::query("DELETE FROM tokens WHERE ends_s < $1")
        .bind(now.as_second() - TOKEN_KEPT_SECONDS)
        .execute(&mut *db)
        .await?;
    sqlx::query("INSERT INTO tokens (sha256, role, ends_s) VALUES ($1, $2, $3)")
        .bind(sha256)
        .bind(role)
        .bind(ends_s)
        .execute(db)
        .await?;
    Ok(())
}

pub(crate) async fn token(db: &mut SqliteConnection, sha256: &str) -> Result<Option<TokenRow>> {
    Ok(sqlx::query_as("SELECT * FROM tokens WHERE sha256 = $1")
        .bind(sha256)
        .fetch_optional(db)
        .await?)
}

/// Uses a token up. True for exactly one caller.
pub(crate) async fn use_token(
    db: &mut SqliteConnection,
    sha256: &str,
    now: Timestamp,
) -> Result<bool> {
    let done = sqlx::query(
        "UPDATE tokens SET used_s = $2 WHERE sha256 = $1 AND used_s IS NULL AND ends_s > $2",
    )
    .bind(sha256)
    .bind(now.as_second())
    .execute(db)
    .await?;
    Ok(done.rows_affected() == 1)
}

pub(crate) async fn insert_certificate(
    db: &mut SqliteConnection,
    info: &CertificateInfo,
) -> Result<()> {
    sqlx::query(
        "INSERT INTO certificates (serial, role, begins_s, ends_s) VALUES ($1, $2, $3, $4)",
    )
    .bind(&info.serial)
    .bind(info.role.to_string())
    .bind(info.not_before.as_second())
    .bind(info.not_after.as_second())
    .execute(db)
    .await?;
    Ok(())
}

/// Whether this certificate, or any of its holder, was revoked.
pub(crate) async fn is_revoked(db: &mut SqliteConnection, info: &CertificateInfo) -> Result<bool> {
    let count: i64 =
        sqlx::query_scalar("SELECT COUNT(*) FROM certificates WHERE serial = $1 AND revoked = 1")
            .bind(&info.serial)
            .fetch_one(db)
            .await?;
    Ok(count > 0)
}

/// Revokes all certificates of one holder.
pub(crate) async fn revoke_certificates(db: &mut SqliteConnection, role: &str) -> Result<()> {
    sqlx::query("UPDATE certificates SET revoked = 1 WHERE role = $1")
        .bind(role)
        .execute(db)
        .await?;
    Ok(())
}

/// The newest certificate of a holder.
#[derive(Debug, Clone, FromRow)]
pub(crate) struct Newest {
    pub(crate) role: String,
    pub(crate) begins_s: i64,
    pub(crate) ends_s: i64,
}

/// The newest certificate of every holder that is not revoked.
pub(crate) async fn newest_certificates(db: &mut SqliteConnection) -> Result<Vec<Newest>> {
    Ok(sqlx::query_as(
        "SELECT role, MAX(begins_s) AS begins_s, MAX(ends_s) AS ends_s FROM certificates
         WHERE revoked = 0 GROUP BY role ORDER BY role",
    )
    .fetch_all(db)
    .await?)
}
