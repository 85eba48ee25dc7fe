//! Who asks, and what was sent: checked before a handler runs.
//!
//! TLS has checked the certificate's chain; here its role, its end and its revocation are, on every
//! request, since a connection may outlive them.

use crate::certificate::{CertificateInfo, Role};
use crate::deployment::Deployment;
use crate::problem::{Refused, Result, exit};
use crate::store::{access, servers, targets};
use axum::body::Bytes;
use axum::extract::{FromRequest, FromRequestParts, Query, Request};
use axum::http::StatusCode;
use axum::http::request::Parts;
use serde::de::DeserializeOwned;
use serde_json::Value;
use std::sync::Arc;
use std::time::Duration;

/// A body must have arrived in this time.
const BODY_TIMEOUT: Duration = Duration::from_secs(20);

/// The certificate of the connection that a request came over; put there by the listener.
#[derive(Debug, Clone)]
pub(crate) struct Peer(pub(crate) Option<Arc<CertificateInfo>>);

/// Anybody with a good certificate.
pub(super) struct Anyone(pub(super) Role);

/// The agent of the server with this id.
pub(super) struct Agent(pub(super) String);

/// The target with this id.
pub(super) struct Target(pub(super) String);

/// A person, by name.
pub(super) struct Operator(pub(super) String);

type State = Arc<Deployment>;

impl FromRequestParts<State> for Anyone {
    type Rejection = Refused;

    async fn from_request_parts(parts: &mut Parts, deployment: &State) -> Result<Self> {
        let Some(Peer(Some(info))) = parts.extensions.get::<Peer>() else {
            return Err(Refused::new(
                StatusCode::UNAUTHORIZED,
                exit::PERMISSION,
                "this needs a certificate of this deployment, and none was shown",
            )
            .hint("a server gets one by: secondsite join"));
        };
        admit(info, deployment).await?;
        Ok(Self(info.role.clone()))
    }
}

async fn admit(info: &CertificateInfo, deployment: &Deployment) -> Result<()> {
    if info.not_after <= deployment.now() {
        return Err(Refused::new(
            StatusCode::UNAUTHORIZED,
            exit::PERMISSION,
            format!("the certificate ended {}", info.not_after),
        ));
    }
    let mut tx = deployment.store.begin().await?;
    let known = match &info.role {
        Role::Agent(id) => servers::by_id(&mut tx, id).await?.is_some_and(|row| !row.revoked),
        Role::Target(id) => targets::by_id(&mut tx, id).await?.is_some(),
        Role::Operator(_) | Role::Control => true,
    };
    if !known || access::is_revoked(&mut tx, info).await? {
        return Err(Refused::forbidden("the certificate was revoked, or its holder is unknown"));
    }
    Ok(())
}

/// Refuses a role that the route is not for.
macro_rules! role_extractor {
    ($extractor:ident, $role:ident, $who:literal) => {
        impl FromRequestParts<State> for $extractor {
            type Rejection = Refused;

            async fn from_request_parts(parts: &mut Parts, state: &State) -> Result<Self> {
                match Anyone::from_request_parts(parts, state).await?.0 {
                    Role::$role(id) => Ok(Self(id)),
                    other => Err(Refused::forbidden(format!("this is for {}, not {other}", $who))),
                }
            }
        }
    };
}

role_extractor!(Agent, Agent, "agents");
role_extractor!(Target, Target, "targets");
role_extractor!(Operator, Operator, "operators");

/// A JSON body, in whose texts no control character is left but line ends: they end up on terminals.
pub(super) struct Document<T>(pub(super) T);

impl<T: DeserializeOwned> FromRequest<State> for Document<T> {
    type Rejection = Refused;

    async fn from_request(request: Request, state: &State) -> Result<Self> {
        let bytes = tokio::time::timeout(BODY_TIMEOUT, Bytes::from_request(request, state))
            .await
            .map_err(|_| {
                let status = StatusCode::REQUEST_TIMEOUT;
                Refused::new(status, exit::LATER, "the request's body did not come in time")
            })?
            .map_err(|rejection| {
                Refused::new(rejection.status(), exit::USAGE, rejection.body_text())
            })?;
        let wrong = |error| Refused::usage(format!("the request cannot be read: {error}"));
        let mut value: Value = serde_json::from_slice(&bytes).map_err(wrong)?;
        clean(&mut value);
        serde_json::from_value(value).map(Self).map_err(wrong)
    }
}

fn clean(value: &mut Value) {
    match value {
        Value::String(text) => text.retain(|letter| letter == '\n' || !letter.is_control()),
        Value::Array(items) => items.iter_mut().for_each(clean),
        Value::Object(fields) => fields.values_mut().for_each(clean),
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}

/// The part of an address behind `?`.
pub(super) struct Params<T>(pub(super) T);

impl<T: DeserializeOwned> FromRequestParts<State> for Params<T> {
    type Rejection = Refused;

    async fn from_request_parts(parts: &mut Parts, state: &State) -> Result<Self> {
        match Query::from_request_parts(parts, state).await {
            Ok(Query(params)) => Ok(Self(params)),
            Err(rejection) => Err(Refused::usage(rejection.body_text())),
        }
    }
}
