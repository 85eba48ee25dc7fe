//! Answers that are not a success: a status for HTTP, an exit code for the command, what failed and
//! what to type.

use crate::api::Problem;
use crate::store::StoreError;
use axum::Json;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};

/// Exit codes of commands.
pub mod exit {
    /// The operation failed.
    pub const FAILED: u8 = 1;
    /// Wrong usage.
    pub const USAGE: u8 = 64;
    /// Data differs, or cannot be read.
    pub const DATA: u8 = 65;
    /// Something needed is not there.
    pub const UNAVAILABLE: u8 = 69;
    /// Reading or writing failed.
    pub const IO: u8 = 74;
    /// Try again later.
    pub const LATER: u8 = 75;
    /// Not allowed.
    pub const PERMISSION: u8 = 77;
    /// The configuration does not allow it.
    pub const CONFIGURATION: u8 = 78;
}

/// Why a request is not done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Refused {
    status: StatusCode,
    problem: Problem,
}

pub(crate) type Result<T> = std::result::Result<T, Refused>;

impl Refused {
    pub(crate) fn new(status: StatusCode, exit_code: u8, message: impl Into<String>) -> Self {
        let problem = Problem { exit_code, message: message.into(), hint: String::new() };
        Self { status, problem }
    }

    /// What failed, where and why.
    pub(crate) fn message(&self) -> &str {
        &self.problem.message
    }

    /// The request itself is wrong.
    pub(crate) fn usage(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, exit::USAGE, message)
    }

    /// What is there does not allow it.
    pub(crate) fn conflict(exit_code: u8, message: impl Into<String>) -> Self {
        Self::new(StatusCode::CONFLICT, exit_code, message)
    }

    /// The one who asks may not.
    pub(crate) fn forbidden(message: impl Into<String>) -> Self {
        Self::new(StatusCode::FORBIDDEN, exit::PERMISSION, message)
    }

    /// There is no such thing.
    pub(crate) fn unknown(message: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, exit::USAGE, message)
    }

    /// With what to type or do.
    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.problem.hint = hint.into();
        self
    }

    #[cfg(test)]
    pub(crate) fn problem(&self) -> &Problem {
        &self.problem
    }
}

impl From<StoreError> for Refused {
    fn from(error: StoreError) -> Self {
        tracing::error!("{error}");
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, exit::IO, format!("control: {error}"))
            .hint("look at control's log, and at the space of its disk")
    }
}

impl From<sqlx::Error> for Refused {
    fn from(error: sqlx::Error) -> Self {
        StoreError::from(error).into()
    }
}

impl From<anyhow::Error> for Refused {
    fn from(error: anyhow::Error) -> Self {
        tracing::error!("{error:#}");
        let message = format!("control: {error:#}");
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, exit::FAILED, message)
            .hint("look at control's log")
    }
}

impl IntoResponse for Refused {
    fn into_response(self) -> Response {
        (self.status, Json(self.problem)).into_response()
    }
}
