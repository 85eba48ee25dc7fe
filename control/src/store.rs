//! What control must not forget, in SQLite: one file, mode 0600, write-ahead log, full durability.
//!
//! All access goes through one connection, so that no two changes interleave and none meets a busy
//! file; a change of several rows is one transaction. Statements are portable SQL (`$1`). Only the
//! deployment and `setup` use this; no decision is taken here.

pub(crate) mod access;
pub(crate) mod orders;
pub(crate) mod servers;
pub(crate) mod targets;

use jiff::Timestamp;
use sqlx::migrate::Migrator;
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePool, SqlitePoolOptions};
use sqlx::sqlite::{SqliteConnection, SqliteSynchronous};
use sqlx::{Connection, Sqlite, Transaction};
use std::collections::HashMap;
use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How long a statement waits for the one before it.
const TURN_TIMEOUT: Duration = Duration::from_secs(30);

/// A newer Secondsite wrote the database.
#[derive(Debug, thiserror::Error)]
#[error(
    "{} was written by a newer Secondsite (migration {found}, this one knows up to {known}); \
     nothing was changed", path.display()
)]
pub struct NewerStore {
    /// The file.
    pub path: PathBuf,
    /// Its newest migration.
    pub found: i64,
    /// The newest migration known here.
    pub known: i64,
}

/// Brings the tables from any earlier version to this one.
static MIGRATOR: Migrator = sqlx::migrate!("./migrations");

/// Why the store did not do it.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The file cannot be made.
    #[error("{path}: {cause}")]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        cause: std::io::Error,
    },
    /// A newer Secondsite wrote it.
    #[error("store")]
    Newer(#[from] NewerStore),
    /// The database refused.
    #[error("store: {0}")]
    Sql(#[from] sqlx::Error),
    /// Its tables could not be brought to this version.
    #[error("store: {0}")]
    Migrate(#[from] sqlx::migrate::MigrateError),
    /// A document in it cannot be read.
    #[error("store: a document of another version or damaged: {0}")]
    Document(#[from] serde_json::Error),
}

/// Result of what the store does.
pub(crate) type Result<T> = std::result::Result<T, StoreError>;

/// The database.
#[derive(Debug, Clone)]
pub(crate) struct Store {
    pool: SqlitePool,
}

impl Store {
    /// Opens the file, makes it if it is missing, and brings its tables to this version.
    pub(crate) async fn open(path: &Path) -> Result<Self> {
        refuse_newer(path).await?;
        // SQLite gives its log and index files the mode of the database.
        OpenOptions::new()
            .append(true)
            .create(true)
            .mode(crate::files::SECRET_MODE)
            .open(path)
            .map_err(|cause| StoreError::File { path: path.to_owned(), cause })?;
        let options = SqliteConnectOptions::new()
            .filename(path)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Full)
            .foreign_keys(true);
        let pool = SqlitePoolOptions::new()
            .max_connections(1)
            .acquire_timeout(TURN_TIMEOUT)
            .connect_with(options)
            .await?;
        MIGRATOR.run(&pool).await?;
        Ok(Self { pool })
    }

    /// Begins a transaction; dropped without `commit`, nothing happened. One at a time: never begin
    /// a second one while holding one.
    pub(crate) async fn begin(&self) -> Result<Transaction<'static, Sqlite>> {
        Ok(self.pool.begin().await?)
    }

    /// Ends the connection, with the log written back.
    pub(crate) async fn close(&self) {
        self.pool.close().await;
    }
}

/// Looks at the database without changing it: what a newer version wrote stays byte for byte, its
/// write-ahead log included. One that cannot be read this way is left to [`Store::open`].
async fn refuse_newer(path: &Path) -> Result<()> {
    if std::fs::metadata(path).is_ok_and(|file| file.len() > 0) {
        let options = SqliteConnectOptions::new().filename(path).read_only(true);
        let mut db = SqliteConnection::connect_with(&options).await?;
        let found: sqlx::Result<Option<i64>> =
            sqlx::query_scalar("SELECT max(version) FROM _sqlx_migrations")
                .fetch_one(&mut db)
                .await;
        db.close().await?;
        let known = MIGRATOR.iter().map(|migration| migration.version).max().unwrap_or(0);
        if let Ok(Some(found)) = found
            && found > known
        {
            return Err(NewerStore { path: path.to_owned(), found, known }.into());
        }
    }
    Ok(())
}

/// A setting, if it was ever set.
pub(crate) async fn setting(db: &mut SqliteConnection, name: &str) -> Result<Option<String>> {
    Ok(sqlx::query_scalar("SELECT value FROM settings WHERE name = $1")
        .bind(name)
        .fetch_optional(db)
        .await?)
}

/// Sets a setting.
pub(crate) async fn set_setting(db: &mut SqliteConnection, name: &str, value: &str) -> Result<()> {
    sqlx::query(
        "INSERT INTO settings (name, value) VALUES ($1, $2)
         ON CONFLICT (name) DO UPDATE SET value = excluded.value",
    )
    .bind(name)
    .bind(value)
    .execute(db)
    .await?;
    Ok(())
}

/// Records who did what.
pub(crate) async fn audit(
    db: &mut SqliteConnection,
    now: Timestamp,
    who: &str,
    what: &str,
) -> Result<()> {
    sqlx::query("INSERT INTO audit (at_ns, who, what) VALUES ($1, $2, $3)")
        .bind(nanoseconds(now))
        .bind(who)
        .bind(what)
        .execute(db)
        .await?;
    Ok(())
}

/// When a server joined, was protected, unprotected or revoked last, by name; null where the record
/// does not say.
pub(crate) async fn decided(db: &mut SqliteConnection) -> Result<HashMap<String, Timestamp>> {
    let rows: Vec<(String, i64)> = sqlx::query_as(
        "SELECT servers.name, MAX(audit.at_ns) FROM servers JOIN audit
         ON audit.what IN ('joined as ' || name, 'unprotected ' || name, 'revoked ' || name)
             OR substr(audit.what, 1, length(name) + 11) = 'protected ' || name || ':'
         GROUP BY servers.name",
    )
    .fetch_all(db)
    .await?;
    Ok(rows.into_iter().map(|(name, at)| (name, timestamp(at))).collect())
}

/// A time as the store keeps it.
pub(crate) fn nanoseconds(time: Timestamp) -> i64 {
    i64::try_from(time.as_nanosecond()).unwrap_or(i64::MAX)
}

/// A time from the store.
pub(crate) fn timestamp(nanoseconds: i64) -> Timestamp {
    Timestamp::from_nanosecond(i128::from(nanoseconds)).unwrap_or(Timestamp::UNIX_EPOCH)
}
