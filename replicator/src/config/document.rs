//! One TOML file: its keys are checked with their places before their values are read.

use super::Paths;
use serde::de::DeserializeOwned;
use std::path::{Path, PathBuf};
use toml::Spanned;
use toml::de::{DeTable, DeValue};

/// The tables that a drop-in may have.
const ROLES: &[&str] = &["control", "target", "agent"];
/// Least likeness (Jaro-Winkler) at which a known key is worth suggesting.
const LIKENESS_MIN: f64 = 0.7;

/// A configuration that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("read {}: {cause}", file.display())]
    Read {
        /// The file.
        file: PathBuf,
        /// Why.
        cause: String,
        /// There is no such file.
        absent: bool,
    },
    /// A key that means nothing.
    #[error("{}:{line}: unknown key `{key}`{}", file.display(), suggestion(nearest.as_deref()))]
    UnknownKey {
        /// The file.
        file: PathBuf,
        /// Line, from 1.
        line: usize,
        /// The key.
        key: String,
        /// The known key that is most like it.
        nearest: Option<String>,
    },
    /// Not TOML, or a value of the wrong kind.
    #[error("{}:{line}: {cause}", file.display())]
    Malformed {
        /// The file.
        file: PathBuf,
        /// Line, from 1.
        line: usize,
        /// What is wrong.
        cause: String,
    },
    /// A value out of its bounds, or none where one is needed.
    #[error("{}: `{key}` {cause}", file.display())]
    Value {
        /// The role's own file.
        file: PathBuf,
        /// The key.
        key: &'static str,
        /// What it should be.
        cause: String,
    },
}

fn suggestion(nearest: Option<&str>) -> String {
    nearest.map(|key| format!(" (did you mean `{key}`?)")).unwrap_or_default()
}

impl ConfigError {
    pub(super) fn missing(file: &Path, key: &'static str) -> Self {
        Self::Value { file: file.to_path_buf(), key, cause: "is missing".into() }
    }

    pub(super) fn value(file: &Path, key: &'static str, bounds: &str) -> Self {
        Self::Value { file: file.to_path_buf(), key, cause: format!("is out of bounds: {bounds}") }
    }
}

/// The keys of a role.
pub(super) trait Schema: DeserializeOwned {
    const ROLE: &'static str;
    const KEYS: &'static [&'static str];
    /// Keys that hold tables or arrays of tables, and the keys in these.
    const TABLES: &'static [(&'static str, &'static [&'static str])];
}

/// What the role's own file says, then every drop-in. Also the name of the own file.
pub(super) fn gather<S: Schema>(paths: &Paths) -> Result<(PathBuf, Vec<S>), ConfigError> {
    let main = paths.file(S::ROLE);
    let mut parts = vec![own(&main, &read(&main)?)?];
    for file in drop_ins(&paths.config.join("conf.d"))? {
        let text = read(&file)?;
        for (key, value) in parse(&file, &text)?.into_inner() {
            if !ROLES.contains(&key.get_ref().as_ref()) {
                return Err(unknown(&file, &text, &key, ROLES));
            }
            // The tables of other roles are checked by those.
            if key.get_ref() == S::ROLE {
                let line = line(&text, value.span().start);
                let DeValue::Table(table) = value.into_inner() else {
                    let cause = format!("`{}` must be a table: [{0}]", S::ROLE);
                    return Err(ConfigError::Malformed { file, line, cause });
                };
                parts.push(convert::<S>(&file, &text, table)?);
            }
        }
    }
    Ok((main, parts))
}

/// What a role's own file says.
pub(super) fn own<S: Schema>(file: &Path, text: &str) -> Result<S, ConfigError> {
    convert(file, text, parse(file, text)?.into_inner())
}

fn convert<S: Schema>(file: &Path, text: &str, table: DeTable<'_>) -> Result<S, ConfigError> {
    for (key, value) in &table {
        if !S::KEYS.contains(&key.get_ref().as_ref()) {
            return Err(unknown(file, text, key, S::KEYS));
        }
        let Some((_, keys)) = S::TABLES.iter().find(|(name, _)| key.get_ref() == name) else {
            continue;
        };
        let inner = match value.get_ref() {
            DeValue::Table(table) => vec![table],
            DeValue::Array(rows) => {
                rows.iter().filter_map(|row| row.get_ref().as_table()).collect()
            }
            _ => Vec::new(),
        };
        for key in inner.into_iter().flat_map(DeTable::keys) {
            if !keys.contains(&key.get_ref().as_ref()) {
                return Err(unknown(file, text, key, keys));
            }
        }
    }
    let spanned = Spanned::new(0..text.len(), table);
    S::deserialize(toml::Deserializer::from(spanned)).map_err(|error| malformed(file, text, &error))
}

fn unknown(
    file: &Path,
    text: &str,
    key: &Spanned<toml::de::DeString<'_>>,
    known: &[&str],
) -> ConfigError {
    let name = key.get_ref();
    let likeness = |other: &&str| strsim::jaro_winkler(name, other);
    let best = known.iter().max_by(|a, b| likeness(a).total_cmp(&likeness(b)));
    ConfigError::UnknownKey {
        file: file.to_path_buf(),
        line: line(text, key.span().start),
        key: name.to_string(),
        nearest: best.filter(|key| likeness(key) >= LIKENESS_MIN).map(ToString::to_string),
    }
}

fn parse<'a>(file: &Path, text: &'a str) -> Result<Spanned<DeTable<'a>>, ConfigError> {
    DeTable::parse(text).map_err(|error| malformed(file, text, &error))
}

fn malformed(file: &Path, text: &str, error: &toml::de::Error) -> ConfigError {
    ConfigError::Malformed {
        file: file.to_path_buf(),
        line: line(text, error.span().map_or(0, |span| span.start)),
        cause: error.message().replace('\n', " "),
    }
}

fn line(text: &str, offset: usize) -> usize {
    1 + text.bytes().take(offset).filter(|byte| *byte == b'\n').count()
}

fn read(file: &Path) -> Result<String, ConfigError> {
    std::fs::read_to_string(file).map_err(|error| ConfigError::Read {
        file: file.to_path_buf(),
        absent: error.kind() == std::io::ErrorKind::NotFound,
        cause: error.to_string(),
    })
}

fn drop_ins(dir: &Path) -> Result<Vec<PathBuf>, ConfigError> {
    let failed = |error: &std::io::Error| ConfigError::Read {
        file: dir.to_path_buf(),
        absent: false,
        cause: error.to_string(),
    };
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(failed(&error)),
    };
    let mut files = Vec::new();
    for entry in entries {
        let path = entry.map_err(|error| failed(&error))?.path();
        if path.extension().is_some_and(|extension| extension == "toml") {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}
