//! Certificates, names, configuration, and what the host prints.

use secondsite::config::{AgentConfig, ControlConfig, MEMORY_BYTES_MIN, TargetConfig, WORKERS_MAX};
use secondsite::inventory::{self, Facts};
use secondsite_control::pki::{self, Fingerprint, Role};
use secondsite_control::token::Token;
use secondsite_format::ids::VolumeId;
use secondsite_tracker::device::parse_mount_line;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::Duration;

/// A certificate in DER.
pub fn certificate(bytes: &[u8]) {
    if let Ok(info) = pki::peer_info(&[bytes.into()]) {
        let role: Role = info.role.to_string().parse().expect("a role is read as it is written");
        assert_eq!(role, info.role);
        match &info.role {
            Role::Agent(id) | Role::Target(id) => assert!(pki::is_id(id)),
            Role::Operator(name) => assert!(pki::is_name(name)),
            Role::Control => {}
        }
    }
}

/// A role, a token, a fingerprint or an id, as text.
pub fn name(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    if let Ok(role) = text.parse::<Role>() {
        assert_eq!(role.to_string(), text, "two names of one role");
    }
    if let Ok(token) = text.parse::<Token>() {
        assert_eq!(token.to_string(), text.to_ascii_lowercase());
    }
    if let Ok(print) = text.parse::<Fingerprint>() {
        assert_eq!(print.to_string().to_ascii_lowercase(), text.to_ascii_lowercase());
    }
    if let Ok(id) = text.parse::<VolumeId>() {
        assert_eq!(id.to_string(), text.to_ascii_lowercase(), "two names of one id");
    }
}

/// A configuration file, of every role.
pub fn config(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let file = Path::new("role.toml");
    if let Ok(config) = ControlConfig::parse(file, text) {
        assert!(!config.certificate_life.is_zero());
        assert!(config.certificate_life <= Duration::from_secs(30 * 86400));
    }
    if let Ok(config) = TargetConfig::parse(file, text) {
        assert!(config.memory_bytes >= MEMORY_BYTES_MIN);
    }
    if let Ok(config) = AgentConfig::parse(file, text) {
        assert!(config.memory_bytes >= MEMORY_BYTES_MIN);
        assert!((1..=WORKERS_MAX).contains(&config.workers));
    }
}

/// A host of which nothing is known besides what `lsblk` printed.
struct Unknown;

impl Facts for Unknown {
    fn volume(&self, _: &Path) -> Result<(), String> {
        Ok(())
    }
    fn ebpf(&self) -> Result<(), String> {
        Ok(())
    }
    fn filter(&self) -> Result<(), String> {
        Ok(())
    }
    fn filter_of(&self, _: &Path) -> Option<String> {
        None
    }
    fn start_bytes(&self, _: &str) -> Option<u64> {
        Some(1 << 20)
    }
    fn swap(&self, _: &Path) -> bool {
        false
    }
    fn backing(&self, _: &str) -> Option<String> {
        None
    }
}

/// What `lsblk --json` printed.
pub fn inventory(bytes: &[u8]) {
    if let Ok(devices) = inventory::read(bytes, &Unknown) {
        assert!(devices.iter().all(|device| device.size_bytes > 0));
        assert!(devices.len() <= bytes.len());
    }
}

/// `/proc/self/mountinfo`.
pub fn mountinfo(bytes: &[u8]) {
    for line in bytes.split(|byte| *byte == b'\n') {
        if let Some(mount) = parse_mount_line(line) {
            assert!(mount.path.as_os_str().as_bytes().len() <= line.len());
            assert!(mount.source.as_os_str().as_bytes().len() <= line.len());
        }
    }
}
