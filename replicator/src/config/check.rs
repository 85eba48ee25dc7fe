//! All files of a configuration at once: everything that is wrong, and every value that counts with
//! the file it comes from.

use super::document::{ROLES, Schema, gather_all, roles_of_drop_ins};
use super::{AgentConfig, AgentPart, ConfigError, ControlConfig, ControlPart, Paths, Place};
use super::{TargetConfig, TargetPart};
use crate::cli::units::{bytes, goal};
use std::net::SocketAddr;
use std::path::PathBuf;

/// What a check found.
#[derive(Debug)]
pub struct Checked {
    /// The roles that have a file of their own.
    pub roles: Vec<&'static str>,
    /// All that is wrong, each once.
    pub problems: Vec<ConfigError>,
    /// Every value of the roles that are sound.
    pub values: Vec<Effective>,
}

/// A value that counts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Effective {
    /// The role.
    pub role: &'static str,
    /// The key.
    pub key: &'static str,
    /// The value; empty if there is none.
    pub value: String,
    /// Where it is set; none: it is the default. For a list, where its last part is set.
    pub place: Option<Place>,
}

/// A role's configuration as values to show, in the order of its keys.
trait Values: Sized {
    type Part: Schema;
    fn load(paths: &Paths) -> Result<Self, ConfigError>;
    fn values(&self, paths: &Paths) -> Vec<String>;
}

/// Checks every file and drop-in below the configuration folder.
pub fn check(paths: &Paths) -> Checked {
    let mut checked = Checked { roles: Vec::new(), problems: Vec::new(), values: Vec::new() };
    role::<ControlConfig>(paths, &mut checked);
    role::<TargetConfig>(paths, &mut checked);
    role::<AgentConfig>(paths, &mut checked);
    match roles_of_drop_ins(paths) {
        Ok(tables) => {
            for (table, file) in tables {
                let known = ROLES.iter().find(|role| **role == table);
                if let Some(role) = known.filter(|role| !checked.roles.contains(role)) {
                    let own = paths.file(role);
                    let cause = format!("counts for nothing: there is no {}", own.display());
                    let problem = ConfigError::Value { file, line: None, key: role, cause };
                    checked.problems.push(problem);
                }
            }
        }
        Err(error) => checked.problems.push(error),
    }
    // Drop-ins are read once for every role.
    let mut once: Vec<ConfigError> = Vec::new();
    for problem in std::mem::take(&mut checked.problems) {
        if !once.contains(&problem) {
            once.push(problem);
        }
    }
    checked.problems = once;
    checked
}

fn role<C: Values>(paths: &Paths, checked: &mut Checked) {
    let role = C::Part::ROLE;
    let said = match gather_all::<C::Part>(paths) {
        Ok(said) => said,
        Err(ConfigError::Read { absent: true, .. }) => return,
        Err(error) => {
            checked.roles.push(role);
            checked.problems.push(error);
            return;
        }
    };
    checked.roles.push(role);
    if !said.problems.is_empty() {
        checked.problems.extend(said.problems);
        return;
    }
    match C::load(paths) {
        Ok(config) => {
            let values = C::Part::KEYS.iter().zip(config.values(paths));
            checked.values.extend(values.map(|(key, value)| {
                let place = said.place(key).cloned();
                Effective { role, key, value, place }
            }));
        }
        Err(error) => checked.problems.push(error),
    }
}

/// The TCP address of metrics, if there is one besides the unix socket.
fn address(metrics: Option<SocketAddr>) -> String {
    metrics.map(|address| format!("listen = {address}")).unwrap_or_default()
}

fn list(paths: &[PathBuf]) -> String {
    paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ")
}

impl Values for ControlConfig {
    type Part = ControlPart;
    fn load(paths: &Paths) -> Result<Self, ConfigError> {
        Self::load(paths)
    }
    fn values(&self, paths: &Paths) -> Vec<String> {
        let Self { listen, store, certificate_life, metrics } = self;
        vec![
            listen.to_string(),
            store
                .clone()
                .unwrap_or_else(|| paths.state.join(Self::Part::ROLE))
                .display()
                .to_string(),
            goal(certificate_life.as_secs()),
            address(*metrics),
        ]
    }
}

impl Values for TargetConfig {
    type Part = TargetPart;
    fn load(paths: &Paths) -> Result<Self, ConfigError> {
        Self::load(paths)
    }
    fn values(&self, _paths: &Paths) -> Vec<String> {
        let Self {
            store,
            listen,
            control,
            reserve_bytes,
            memory_bytes,
            scratch_bytes,
            devices,
            metrics,
        } = self;
        let devices = devices.iter().map(|device| {
            format!("{}/{} on {}", device.server, device.volume, device.path.display())
        });
        vec![
            store.display().to_string(),
            listen.to_string(),
            control.clone(),
            bytes(*reserve_bytes),
            bytes(*memory_bytes),
            bytes(*scratch_bytes),
            devices.collect::<Vec<_>>().join(", "),
            address(*metrics),
        ]
    }
}

impl Values for AgentConfig {
    type Part = AgentPart;
    fn load(paths: &Paths) -> Result<Self, ConfigError> {
        Self::load(paths)
    }
    fn values(&self, _paths: &Paths) -> Vec<String> {
        let Self { control, name, memory_bytes, workers, allow, metrics } = self;
        vec![
            control.clone(),
            name.clone(),
            bytes(*memory_bytes),
            workers.to_string(),
            list(allow),
            address(*metrics),
        ]
    }
}
