//! What a browser sees: plain words, no script, no style, nothing from outside.

use axum::http::header::{
    CACHE_CONTROL, CONTENT_SECURITY_POLICY, REFERRER_POLICY, X_CONTENT_TYPE_OPTIONS,
};
use axum::response::{Html, IntoResponse};

const POLICY: &str =
    "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

const PAGE: &str = r#"<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Secondsite</title>
</head>
<body>
<h1>Secondsite</h1>
<p>This is the control server of a Secondsite deployment: it replicates the disks of Linux servers
to a second site. It is watched and managed from the command line, on this host:</p>
<pre>
secondsite status
secondsite status SERVER
secondsite points SERVER
secondsite protect SERVER --volumes all
</pre>
<p>To protect another server, make a token here, and use it there:</p>
<pre>
secondsite token
secondsite join HOST:PORT --token TOKEN
</pre>
</body>
</html>
"#;

pub(super) async fn page() -> impl IntoResponse {
    let headers = [
        (CONTENT_SECURITY_POLICY, POLICY),
        (X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (REFERRER_POLICY, "no-referrer"),
        (CACHE_CONTROL, "no-store"),
    ];
    (headers, Html(PAGE))
}
