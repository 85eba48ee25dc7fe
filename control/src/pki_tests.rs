//! Files, signatures and handshakes of certificates, with clocks that tests set.

use super::*;
use crate::ca::{Authority, CERTIFICATE_LIFE_MAX};
use rustls::pki_types::ServerName;
use rustls::{ClientConnection, ServerConnection};
use std::time::Duration;

const ID: &str = "0123456789abcdef0123456789abcdef";
const START: i64 = 1_800_000_000;

#[derive(Debug)]
struct At(i64);

impl Clock for At {
    fn now(&self) -> Timestamp {
        Timestamp::from_second(self.0).unwrap()
    }
}

struct Site {
    dir: tempfile::TempDir,
    authority: Authority,
}

impl Site {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let authority = Authority::create(dir.path(), &At(START)).unwrap();
        Self { dir, authority }
    }

    fn identity(&self, name: &str, role: Role) -> Identity {
        let (key, request) = new_request().unwrap();
        let issued = self.authority.sign(&request, &role, &[], At(START).now()).unwrap();
        let ca = self.authority.certificate_pem();
        install(self.dir.path(), name, &key, &issued.certificate_pem, ca).unwrap();
        Identity::load(self.dir.path(), name).unwrap()
    }
}

/// A handshake in memory: who the server believes the client is, or either side's error.
fn handshake(
    client: Arc<rustls::ClientConfig>,
    server: Arc<rustls::ServerConfig>,
    name: &'static str,
) -> Result<Option<Role>, String> {
    let name = ServerName::try_from(name).unwrap();
    let mut client = ClientConnection::new(client, name).unwrap();
    let mut server = ServerConnection::new(server).unwrap();
    while client.is_handshaking() || server.is_handshaking() {
        let mut bytes = Vec::new();
        client.write_tls(&mut bytes).unwrap();
        server.read_tls(&mut &bytes[..]).unwrap();
        server.process_new_packets().map_err(|error| format!("server: {error}"))?;
        bytes.clear();
        server.write_tls(&mut bytes).unwrap();
        client.read_tls(&mut &bytes[..]).unwrap();
        client.process_new_packets().map_err(|error| format!("client: {error}"))?;
    }
    assert_eq!(client.protocol_version(), Some(rustls::ProtocolVersion::TLSv1_3));
    Ok(server.peer_certificates().map(|chain| peer(chain).unwrap().0))
}

fn at(seconds: i64) -> Arc<dyn Clock> {
    Arc::new(At(START + seconds))
}

#[test]
fn both_sides_know_each_other() {
    let site = Site::new();
    let agent = site.identity("agent", Role::Agent(ID.to_owned()));
    let control = site.identity("control", Role::Control);
    let target = site.identity("target", Role::Target(ID.to_owned()));
    let client = || agent.client_config_at(at(60)).unwrap();
    let server = control.server_config_at(false, at(60)).unwrap();
    assert_eq!(handshake(client(), server, CONTROL_DNS_NAME), Ok(Some(agent.role.clone())));
    let server = target.server_config_at(true, at(60)).unwrap();
    assert_eq!(handshake(client(), server.clone(), TARGET_DNS_NAME), Ok(Some(agent.role.clone())));
    // A target is not control, whatever a client takes it for.
    handshake(client(), server, CONTROL_DNS_NAME).unwrap_err();
    // An agent's certificate serves nobody.
    let server = agent.server_config_at(false, at(60)).unwrap();
    handshake(client(), server, TARGET_DNS_NAME).unwrap_err();
}

#[test]
fn a_foreign_authority_is_refused_on_both_sides() {
    let (site, other) = (Site::new(), Site::new());
    let control = site.identity("control", Role::Control);
    let foreign = other.identity("agent", Role::Agent(ID.to_owned()));
    let own = site.identity("agent", Role::Agent(ID.to_owned()));
    let server = control.server_config_at(false, at(60)).unwrap();
    let error =
        handshake(foreign.client_config_at(at(60)).unwrap(), server.clone(), CONTROL_DNS_NAME);
    assert!(error.as_ref().unwrap_err().contains("client: invalid peer certificate"), "{error:?}");
    // One that believes this control, but shows a certificate of the other authority.
    let mixed = tls::client_config(Trust::Authority(&own.authority), Some(foreign.own()), at(60));
    let error = handshake(mixed.unwrap(), server, CONTROL_DNS_NAME);
    assert!(error.as_ref().unwrap_err().contains("server: invalid peer certificate"), "{error:?}");
}

#[test]
fn an_expired_certificate_is_refused() {
    let site = Site::new();
    let agent = site.identity("agent", Role::Agent(ID.to_owned()));
    let control = site.identity("control", Role::Control);
    let life = CERTIFICATE_LIFE_MAX.as_secs() as i64;
    assert!(agent.not_after().as_second() - agent.not_before().as_second() <= life);
    let attempt = |client_at, server_at| {
        let client = agent.client_config_at(at(client_at)).unwrap();
        handshake(client, control.server_config_at(false, at(server_at)).unwrap(), CONTROL_DNS_NAME)
    };
    assert!(attempt(life - 7200, life - 7200).is_ok());
    let error = attempt(0, life).unwrap_err();
    assert!(error.starts_with("server:") && error.contains("certificate expired"), "{error}");
    let error = attempt(life, 0).unwrap_err();
    assert!(error.starts_with("client:") && error.contains("certificate expired"), "{error}");
}

#[test]
fn a_pin_believes_its_own_authority_only() {
    let (site, other) = (Site::new(), Site::new());
    let control = site.identity("control", Role::Control);
    let server = control.server_config_at(false, at(60)).unwrap();
    let pinned = |site: &Site| {
        tls::client_config(Trust::Pinned(site.authority.fingerprint()), None, at(60)).unwrap()
    };
    assert_eq!(handshake(pinned(&site), server.clone(), CONTROL_DNS_NAME), Ok(None));
    let error = handshake(pinned(&other), server, CONTROL_DNS_NAME).unwrap_err();
    assert!(error.contains("that the token carries"), "{error}");
    // Sending the true authority along does not help a certificate that it did not sign.
    let mut own = other.identity("control", Role::Control);
    own.authority = control.authority.clone();
    let forged = tls::server_config(&own.authority, own.own(), false, at(60)).unwrap();
    handshake(pinned(&site), forged, CONTROL_DNS_NAME).unwrap_err();
}

#[test]
fn without_a_certificate_only_where_it_is_optional() {
    let site = Site::new();
    let control = site.identity("control", Role::Control);
    let pin = Trust::Pinned(site.authority.fingerprint());
    let client = tls::client_config(pin, None, at(60)).unwrap();
    let server = control.server_config_at(true, at(60)).unwrap();
    handshake(client, server, CONTROL_DNS_NAME).unwrap_err();
}

#[test]
fn a_tampered_signature_fails() {
    let site = Site::new();
    let agent = site.identity("agent", Role::Agent(ID.to_owned()));
    let mut signature = agent.sign(b"manifest").unwrap();
    assert!(verify_signature(&agent.public_key(), b"manifest", &signature));
    assert!(!verify_signature(&agent.public_key(), b"manifesu", &signature));
    signature[40] ^= 1;
    assert!(!verify_signature(&agent.public_key(), b"manifest", &signature));
}

#[test]
fn names_in_a_request_are_ignored() {
    let site = Site::new();
    let key = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap();
    let mut params = rcgen::CertificateParams::new(vec!["evil.example".to_owned()]).unwrap();
    let uri = Role::Control.to_string().try_into().unwrap();
    params.subject_alt_names.push(rcgen::SanType::URI(uri));
    let request = params.serialize_request(&key).unwrap().pem().unwrap();
    let role = Role::Agent(ID.to_owned());
    let issued = site.authority.sign(&request, &role, &[], At(START).now()).unwrap();
    assert_eq!(issued.info.role, role);
    let der = CertificateDer::from_pem_slice(issued.certificate_pem.as_bytes()).unwrap();
    assert!(!der.windows(4).any(|bytes| bytes == b"evil"));
}

#[test]
fn a_key_that_others_can_read_is_refused() {
    let site = Site::new();
    site.identity("agent", Role::Agent(ID.to_owned()));
    for key in ["agent.key", "ca.key"] {
        let mode = fs::metadata(site.dir.path().join(key)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{key}");
    }
    let key = site.dir.path().join("agent.key");
    fs::set_permissions(&key, fs::Permissions::from_mode(0o640)).unwrap();
    let error = Identity::load(site.dir.path(), "agent").unwrap_err().to_string();
    assert!(error.contains("chmod 600"), "{error}");
}

#[test]
fn an_install_cut_short_leaves_a_pair() {
    let site = Site::new();
    let old = site.identity("agent", Role::Agent(ID.to_owned()));
    let (key, request) = new_request().unwrap();
    let issued = site.authority.sign(&request, &old.role, &[], At(START).now()).unwrap();
    let path = |name: &str| site.dir.path().join(name);
    // Killed after the certificate was staged: the old pair.
    files::stage(&path("agent.pem"), issued.certificate_pem.as_bytes(), 0o644).unwrap();
    let found = Identity::load(site.dir.path(), "agent").unwrap();
    assert_eq!(found.public_key(), old.public_key());
    // Killed after the key was replaced: the new pair.
    files::write(&path("agent.key"), key.as_bytes(), files::SECRET_MODE).unwrap();
    let found = Identity::load(site.dir.path(), "agent").unwrap();
    assert_eq!(found.public_key(), issued.info.public_key);
}

#[test]
fn a_life_is_bounded() {
    let site = Site::new();
    assert!(Authority::load(site.dir.path(), CERTIFICATE_LIFE_MAX * 2).is_err());
    assert!(Authority::load(site.dir.path(), Duration::ZERO).is_err());
}
