//! Who may come in, and where to.

use crate::site::{Site, TARGET_ADDRESS, agent_report, target_report};
use secondsite_control::api::{OrderKind, TokenRequest, VolumePhase};
use secondsite_control::pki::{CONTROL_DNS_NAME, Identity, Role};
use secondsite_control::token::Token;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

fn token_request(role: &str) -> TokenRequest {
    TokenRequest { role: role.to_owned(), ttl_seconds: 600 }
}

#[tokio::test]
async fn a_machine_joins_with_a_token_once() {
    let mut site = Site::new().await;
    let token = site.setup.token.clone();
    let db1 = site.enrol(&token, "db1").await.unwrap();
    assert_eq!(db1.reply.name, "db1");
    let identity = Identity::load(&db1.dir, "agent").unwrap();
    assert_eq!(identity.role, Role::Agent(db1.reply.id.clone()));
    assert_eq!(identity.authority_fingerprint().to_string(), site.setup.fingerprint);
    let assignment = db1.client.agent_poll(0, 0, 0).await.unwrap().assignment.unwrap();
    assert_eq!(assignment.server_id, db1.reply.id);
    assert_eq!(assignment.target.as_deref(), Some(TARGET_ADDRESS));
    assert!(assignment.volumes.is_empty());
    let error = site.enrol(&token, "db2").await.err().unwrap();
    assert_eq!((error.exit_code(), error.to_string().contains("used already")), (77, true));
    // A restart forgets nothing of it.
    site.stop().await;
    site.start().await;
    let error = site.enrol(&token, "db2").await.err().unwrap();
    assert!(error.to_string().contains("used already"), "{error}");
    assert_eq!(site.operator().status().await.unwrap().servers[0].state.code(), "joined");
}

#[tokio::test]
async fn wrong_tokens_are_refused_and_say_why() {
    let site = Site::new().await;
    let operator = site.operator();
    let refusal = async |token: &str| {
        let error = site.enrol(token, "db1").await.err().unwrap();
        assert_eq!(error.exit_code(), 77);
        assert!(error.hint().contains("secondsite token"), "{}", error.hint());
        error.to_string()
    };
    let mut wrong = site.setup.token.clone().into_bytes();
    wrong[6] = if wrong[6] == b'0' { b'1' } else { b'0' };
    assert!(refusal(&String::from_utf8(wrong).unwrap()).await.contains("none of this deployment"));
    assert!(refusal("nonsense").await.contains("none of this deployment"));
    let target = operator.token(&token_request("target")).await.unwrap().token;
    assert!(refusal(&target).await.contains("for the role target"));
    let expired = operator.token(&token_request("agent")).await.unwrap().token;
    site.clock.advance(Duration::from_secs(600));
    assert!(refusal(&expired).await.contains("expired"));
    for (role, ttl_seconds) in [("admin", 600), ("agent", 0), ("agent", 3601)] {
        let request = TokenRequest { role: role.to_owned(), ttl_seconds };
        assert_eq!(operator.token(&request).await.unwrap_err().exit_code(), 64);
    }
    // None of that used up the first token, nor does a name that is taken.
    site.enrol(&site.setup.token, "db1").await.unwrap();
    let second = operator.token(&token_request("agent")).await.unwrap().token;
    let error = site.enrol(&second, "db1").await.err().unwrap();
    assert_eq!(error.exit_code(), 64);
    assert!(error.hint().contains("--name"), "{}", error.hint());
    assert_eq!(site.enrol(&second, "../db2").await.err().unwrap().exit_code(), 64);
    site.enrol(&second, "db2").await.unwrap();
}

#[tokio::test]
async fn a_token_of_another_deployment_never_leaves_the_machine() {
    let (site, other) = (Site::new().await, Site::new().await);
    let error = site.stranger(&other.setup.token).status().await.unwrap_err();
    assert_eq!(error.exit_code(), 77);
    assert!(error.to_string().contains("that the token carries"), "{error}");
    let authority = other.setup.token.parse::<Token>().unwrap().authority();
    assert_eq!(authority.to_string(), other.setup.fingerprint);
}

#[tokio::test]
async fn each_route_has_its_role() {
    let site = Site::new().await;
    let agent = site.enrol(&site.setup.token, "db1").await.unwrap().client;
    let (operator, target) = (site.operator(), site.target());
    let stranger = site.stranger(&site.setup.token);
    let report = agent_report(&[], VolumePhase::Following);
    let targets = target_report("", "", &[]);
    for (who, client) in [("operator", &operator), ("target", &target), ("stranger", &stranger)] {
        let code = client.agent_report(&report).await.unwrap_err().exit_code();
        assert_eq!(code, 77, "{who} reports as an agent");
        assert_eq!(client.agent_poll(0, 0, 0).await.unwrap_err().exit_code(), 77, "{who} polls");
    }
    for (who, client) in [("operator", &operator), ("agent", &agent), ("stranger", &stranger)] {
        let code = client.target_report(&targets).await.unwrap_err().exit_code();
        assert_eq!(code, 77, "{who} reports as a target");
        assert_eq!(client.target_poll(0, 0).await.unwrap_err().exit_code(), 77, "{who} polls");
    }
    for (who, client) in [("agent", &agent), ("target", &target), ("stranger", &stranger)] {
        let code = |error: secondsite_control::client_error::ClientError| error.exit_code();
        assert_eq!(client.status().await.map_err(code), Err(77), "{who} sees the status");
        assert_eq!(client.servers().await.map_err(code), Err(77), "{who} lists servers");
        assert_eq!(client.points("db1").await.map_err(code), Err(77), "{who} lists points");
        assert_eq!(client.token(&token_request("agent")).await.map_err(code), Err(77), "{who}");
        assert_eq!(client.unprotect("db1").await.map_err(code), Err(77), "{who} unprotects");
        assert_eq!(client.revoke("db1").await.map_err(code), Err(77), "{who} revokes");
        assert_eq!(client.order("db1", OrderKind::Cut).await.map_err(code), Err(77), "{who}");
        let request = crate::site::protect(&["all"]);
        assert_eq!(client.protect("db1", &request).await.map_err(code), Err(77), "{who}");
    }
    assert!(site.operator().servers().await.unwrap().servers[0].inventory.len() == 3);
}

#[tokio::test]
async fn a_revoked_server_is_out_at_once() {
    let site = Site::new().await;
    let db1 = site.enrol(&site.setup.token, "db1").await.unwrap();
    let operator = site.operator();
    operator.protect("db1", &crate::site::protect(&["sda"])).await.unwrap();
    let before = site.target().target_poll(0, 0).await.unwrap().assignment.unwrap();
    assert!(before.servers[0].active);
    let assignment = db1.client.agent_poll(0, 0, 0).await.unwrap().assignment.unwrap();
    let (waiting, revoked) =
        tokio::join!(db1.client.agent_poll(assignment.version, 0, 60), async {
            operator.revoke("db1").await
        });
    revoked.unwrap();
    assert_eq!(waiting.unwrap_err().exit_code(), 77);
    let error = db1.client.agent_poll(0, 0, 0).await.unwrap_err();
    assert!(error.to_string().contains("revoked"), "{error}");
    let after = site.target().target_poll(before.version, 0).await.unwrap().assignment.unwrap();
    assert!(!after.servers[0].active && after.servers[0].volumes.len() == 1);
    assert_eq!(operator.server_status("db1").await.unwrap().servers[0].state.code(), "stopped");
}

/// What a browser gets: no certificate, any host name.
async fn browse(site: &Site, request: &str) -> String {
    let authority = site.setup.token.parse::<Token>().unwrap().authority();
    let config = secondsite_control::pki::client_config_pinned(&authority).unwrap();
    let stream = TcpStream::connect(&site.address).await.unwrap();
    let name = rustls::pki_types::ServerName::try_from(CONTROL_DNS_NAME).unwrap();
    let connector = tokio_rustls::TlsConnector::from(config);
    let mut stream = connector.connect(name, stream).await.unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    let mut chunk = [0; 4096];
    while let Ok(count @ 1..) = stream.read(&mut chunk).await {
        answer.extend_from_slice(&chunk[..count]);
    }
    String::from_utf8(answer).unwrap()
}

#[tokio::test]
async fn a_browser_gets_a_page_and_nothing_else() {
    let site = Site::new().await;
    let get = |path: &str| format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    let page = browse(&site, &get("/")).await;
    assert!(page.starts_with("HTTP/1.1 200"), "{page}");
    assert!(page.to_lowercase().contains("content-security-policy: default-src 'none'"), "{page}");
    assert!(page.contains("secondsite status"));
    let refused = browse(&site, &get("/api/v1/status")).await;
    assert!(
        refused.starts_with("HTTP/1.1 401") && refused.contains("\"exit_code\":77"),
        "{refused}"
    );
    assert!(browse(&site, &get("/nothing")).await.starts_with("HTTP/1.1 404"));
    let post = |length: usize, body: &str| {
        format!(
            "POST /enrol HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n{body}"
        )
    };
    assert!(browse(&site, &post(3, "{]}")).await.starts_with("HTTP/1.1 400"));
    let large = "x".repeat((1 << 20) + 1);
    assert!(browse(&site, &post(large.len(), &large)).await.starts_with("HTTP/1.1 413"));
}
