//! Certificates that are renewed, end, or are of another deployment.

use crate::site::{Joined, Site};
use secondsite_control::api::{RenewRequest, TokenRequest};
use secondsite_control::ca::CERTIFICATE_LIFE_MAX;
use secondsite_control::client::{BlockingClient, Client};
use secondsite_control::pki::{self, Identity};
use secondsite_control::run::CONTROL;
use secondsite_control::setup::{OPERATOR, TARGET, reissue};
use std::path::Path;
use std::time::Duration;

async fn renew(site: &Site, dir: &Path, name: &str) -> Identity {
    let before = Identity::load(dir, name).unwrap();
    let (key, request_pem) = pki::new_request().unwrap();
    let reply = site.client(&before).renew(&RenewRequest { request_pem }).await.unwrap();
    pki::install(dir, name, &key, &reply.certificate_pem, &reply.authority_pem).unwrap();
    let after = Identity::load(dir, name).unwrap();
    assert_eq!(after.role, before.role);
    assert_ne!(after.public_key(), before.public_key());
    assert!(after.not_after() > before.not_after());
    after
}

#[tokio::test]
async fn agent_target_and_operator_renew_themselves() {
    let site = Site::new().await;
    let Joined { dir, reply, .. } = site.enrol(&site.setup.token, "db1").await.unwrap();
    site.clock.advance(CERTIFICATE_LIFE_MAX / 2);
    let agent = renew(&site, &dir, "agent").await;
    renew(&site, &site.config.pki_dir, OPERATOR).await;
    renew(&site, &site.config.pki_dir, TARGET).await;
    let assignment = site.client(&agent).agent_poll(0, 0, 0).await.unwrap().assignment.unwrap();
    assert_eq!(assignment.server_id, reply.id);
    let status = site.operator().status().await.unwrap();
    assert_eq!(status.servers[0].certificate_ends, agent.not_after().to_string());
}

#[tokio::test]
async fn an_end_is_told_before_and_after() {
    let site = Site::new().await;
    let db1 = site.enrol(&site.setup.token, "db1").await.unwrap();
    site.clock.advance(CERTIFICATE_LIFE_MAX / 4 * 3);
    renew(&site, &site.config.pki_dir, OPERATOR).await;
    let warnings = site.operator().status().await.unwrap().warnings;
    let warnings = warnings.into_iter().map(|warning| warning.text).collect::<Vec<_>>().join("\n");
    assert!(warnings.contains("the certificate of server db1 ends in 7 d"), "{warnings}");
    assert!(!warnings.contains("operator"), "{warnings}");
    site.clock.advance(CERTIFICATE_LIFE_MAX / 4);
    // On a connection made before its end, and on a new one.
    db1.client.agent_poll(0, 0, 0).await.unwrap_err();
    let identity = Identity::load(&db1.dir, "agent").unwrap();
    let error = site.client(&identity).agent_poll(0, 0, 0).await.unwrap_err();
    assert_eq!(error.exit_code(), 77);
    assert!(error.to_string().contains("refuses our certificate: it has ended"), "{error}");
}

#[tokio::test]
async fn a_server_that_was_away_too_long_joins_as_itself() {
    let site = Site::new().await;
    let before = site.enrol(&site.setup.token, "db1").await.unwrap();
    site.clock.advance(CERTIFICATE_LIFE_MAX / 2);
    renew(&site, &site.config.pki_dir, OPERATOR).await;
    let request = TokenRequest { role: "agent".to_owned(), ttl_seconds: 3600 };
    let token = site.operator().token(&request).await.unwrap().token;
    assert_eq!(site.enrol(&token, "db1").await.err().unwrap().exit_code(), 64);
    site.clock.advance(CERTIFICATE_LIFE_MAX / 2);
    let token = site.operator().token(&request).await.unwrap().token;
    let after = site.enrol(&token, "db1").await.unwrap();
    assert_eq!(after.reply.id, before.reply.id);
    after.client.agent_poll(0, 0, 0).await.unwrap();
}

#[tokio::test]
async fn root_on_controls_host_is_never_locked_out() {
    let site = Site::new().await;
    let before = site.identity(OPERATOR);
    let (pki_dir, db) = (site.config.pki_dir.clone(), site.config.db.clone());
    // Also while control runs.
    tokio::task::spawn_blocking(move || {
        reissue(&pki_dir, &db, OPERATOR, CERTIFICATE_LIFE_MAX).unwrap()
    })
    .await
    .unwrap();
    let after = site.identity(OPERATOR);
    assert!(after.role == before.role && after.serial() != before.serial());
    site.operator().status().await.unwrap();
}

#[tokio::test]
async fn a_certificate_of_another_deployment_is_refused() {
    let (site, other) = (Site::new().await, Site::new().await);
    let foreign = other.identity(OPERATOR);
    let error = site.client(&foreign).status().await.unwrap_err();
    assert_eq!(error.exit_code(), 77);
    assert!(error.to_string().contains("of another deployment"), "{error}");
}

#[tokio::test]
async fn control_renews_its_own_certificate_while_it_runs() {
    let life = Duration::from_secs(100);
    let site = Site::with_life(life).await;
    let first = site.identity(CONTROL);
    site.clock.advance(life / 2);
    let renewed = async {
        while site.identity(CONTROL).serial() == first.serial() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), renewed).await.unwrap();
    // A machine whose clock runs with control's sees the new one: the first would have ended.
    let now = site.clock.clone();
    site.clock.advance(life / 2);
    let operator = site.identity(OPERATOR).client_config_at(now).unwrap();
    let error = Client::new(&site.address, operator).status().await.unwrap_err();
    assert!(error.to_string().contains("refuses our certificate: it has ended"), "{error}");
}

#[tokio::test]
async fn an_unreachable_control_is_named() {
    let site = Site::new().await;
    let (address, config) =
        (site.address.clone(), site.identity(OPERATOR).client_config().unwrap());
    let call = move || {
        let client = BlockingClient::new(&address, config).unwrap();
        let first = client.run(|client| client.status()).is_ok();
        (client, first)
    };
    let (client, first) = tokio::task::spawn_blocking(call).await.unwrap();
    assert!(first);
    site.stop().await;
    let error =
        tokio::task::spawn_blocking(move || client.run(|client| client.status()).unwrap_err());
    let error = error.await.unwrap();
    assert_eq!(error.exit_code(), 69);
    assert!(error.to_string().contains(&site.address), "{error}");
}
