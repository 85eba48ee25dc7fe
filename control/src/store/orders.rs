//! Numbered orders to agents.

use super::{Result, nanoseconds, timestamp};
use crate::api::{Order, OrderKind, OrderState};
use jiff::Timestamp;
use sqlx::FromRow;
use sqlx::sqlite::SqliteConnection;

/// A row of `orders`.
#[derive(Debug, Clone, FromRow)]
pub(crate) struct OrderRow {
    pub(crate) server: String,
    pub(crate) number: i64,
    kind: String,
    state: Option<String>,
    ended_ns: Option<i64>,
    pub(crate) listed: bool,
}

impl OrderRow {
    /// The order as the agent gets it.
    pub(crate) fn order(&self) -> Result<Order> {
        let what: OrderKind = serde_json::from_str(&self.kind)?;
        Ok(Order { number: self.number.cast_unsigned(), what })
    }

    /// Its final state, as the agent reported it, and when that was.
    pub(crate) fn ended(&self) -> Result<Option<(OrderState, Timestamp)>> {
        let (Some(state), Some(at)) = (&self.state, self.ended_ns) else { return Ok(None) };
        Ok(Some((serde_json::from_str(state)?, timestamp(at))))
    }
}

/// Makes the next order of a server.
pub(crate) async fn insert(
    db: &mut SqliteConnection,
    server: &str,
    kind: OrderKind,
    now: Timestamp,
) -> Result<u64> {
    let number: i64 = sqlx::query_scalar(
        "UPDATE servers SET orders_made = orders_made + 1 WHERE id = $1 RETURNING orders_made",
    )
    .bind(server)
    .fetch_one(&mut *db)
    .await?;
    sqlx::query("INSERT INTO orders (server, number, kind, made_ns) VALUES ($1, $2, $3, $4)")
        .bind(server)
        .bind(number)
        .bind(serde_json::to_string(&kind)?)
        .bind(nanoseconds(now))
        .execute(db)
        .await?;
    Ok(number.cast_unsigned())
}

/// The unfinished orders of a server above a number, rising.
pub(crate) async fn open_above(
    db: &mut SqliteConnection,
    server: &str,
    number: u64,
) -> Result<Vec<OrderRow>> {
    Ok(sqlx::query_as(
        "SELECT * FROM orders WHERE server = $1 AND number > $2 AND state IS NULL ORDER BY number",
    )
    .bind(server)
    .bind(i64::try_from(number).unwrap_or(i64::MAX))
    .fetch_all(db)
    .await?)
}

pub(crate) async fn get(
    db: &mut SqliteConnection,
    server: &str,
    number: u64,
) -> Result<Option<OrderRow>> {
    Ok(sqlx::query_as("SELECT * FROM orders WHERE server = $1 AND number = $2")
        .bind(server)
        .bind(i64::try_from(number).unwrap_or(i64::MAX))
        .fetch_optional(db)
        .await?)
}

/// Keeps an order's final state; the first one stays.
pub(crate) async fn end(
    db: &mut SqliteConnection,
    server: &str,
    number: u64,
    state: &OrderState,
    now: Timestamp,
) -> Result<()> {
    sqlx::query(
        "UPDATE orders SET state = $3, ended_ns = $4
         WHERE server = $1 AND number = $2 AND state IS NULL",
    )
    .bind(server)
    .bind(i64::try_from(number).unwrap_or(i64::MAX))
    .bind(serde_json::to_string(state)?)
    .bind(nanoseconds(now))
    .execute(db)
    .await?;
    Ok(())
}

/// Finished orders whose point no target has listed yet.
pub(crate) async fn unlisted(db: &mut SqliteConnection) -> Result<Vec<OrderRow>> {
    Ok(sqlx::query_as("SELECT * FROM orders WHERE state IS NOT NULL AND listed = 0")
        .fetch_all(db)
        .await?)
}

/// A target has listed an order's point, or there is none to list.
pub(crate) async fn set_listed(db: &mut SqliteConnection, server: &str, number: i64) -> Result<()> {
    sqlx::query("UPDATE orders SET listed = 1 WHERE server = $1 AND number = $2")
        .bind(server)
        .bind(number)
        .execute(db)
        .await?;
    Ok(())
}
