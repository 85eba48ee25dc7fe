//! Making tokens: by the first setup, and by an operator.

use crate::api::TokenReply;
use crate::deployment::Deployment;
use crate::store::{access, audit};
use crate::token::Token;
use sqlx::sqlite::SqliteConnection;

/// Makes and records a token.
pub(crate) async fn make(
    deployment: &Deployment,
    db: &mut SqliteConnection,
    who: &str,
    role: &str,
    ttl_seconds: u64,
) -> anyhow::Result<TokenReply> {
    let now = deployment.now();
    let fingerprint = deployment.authority.fingerprint();
    let token = Token::new(fingerprint)?;
    let ends_s = now.as_second().saturating_add_unsigned(ttl_seconds);
    access::insert_token(db, &token.sha256(), role, ends_s, now).await?;
    audit(db, now, who, &format!("made a token for the role {role}")).await?;
    Ok(TokenReply { token: token.to_string(), fingerprint: fingerprint.to_string(), ttl_seconds })
}
