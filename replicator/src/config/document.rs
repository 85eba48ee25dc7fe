//! One TOML file: its keys are checked with their places before their values are read.

use super::Paths;
use serde::de::DeserializeOwned;
use std::path::{Path, PathBuf};
use toml::Spanned;
use toml::de::{DeTable, DeValue};

/// The tables that a drop-in may have.
pub(super) const ROLES: &[&str] = &["control", "target", "agent"];
/// The folder of the drop-ins.
const DROP_INS: &str = "conf.d";
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
    #[error("{}{}: `{key}` {cause}", file.display(), line.map(|line| format!(":{line}")).unwrap_or_default())]
    Value {
        /// Where it is set; the role's own file if it is not.
        file: PathBuf,
        /// Line, from 1.
        line: Option<usize>,
        /// The key.
        key: &'static str,
        /// What it should be.
        cause: String,
    },
}

fn suggestion(nearest: Option<&str>) -> String {
    nearest.map(|key| format!(" (did you mean `{key}`?)")).unwrap_or_default()
}

/// The keys of a role.
pub(super) trait Schema: DeserializeOwned {
    const ROLE: &'static str;
    const KEYS: &'static [&'static str];
    /// Keys that hold tables or arrays of tables, and the keys in these.
    const TABLES: &'static [(&'static str, &'static [&'static str])];
}

/// A value that is set, and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// Its key.
    pub key: String,
    /// The file.
    pub file: PathBuf,
    /// Line, from 1.
    pub line: usize,
}

/// All that is said of a role.
pub(super) struct Gathered<S> {
    /// The role's own file.
    pub main: PathBuf,
    /// What it says, then what every drop-in says.
    pub parts: Vec<S>,
    /// Every value that is set, in the same order.
    pub places: Vec<Place>,
    /// What is wrong; parts with errors lack the values in question.
    pub problems: Vec<ConfigError>,
}

impl<S> Gathered<S> {
    /// It, unless something is wrong.
    fn sound(mut self) -> Result<Self, ConfigError> {
        match self.problems.is_empty() {
            true => Ok(self),
            false => Err(self.problems.swap_remove(0)),
        }
    }

    /// Where a value that counts is set.
    pub fn place(&self, key: &str) -> Option<&Place> {
        self.places.iter().rfind(|place| place.key == key)
    }

    pub fn missing(&self, key: &'static str) -> ConfigError {
        let file = self.main.clone();
        ConfigError::Value { file, line: None, key, cause: "is missing".into() }
    }

    pub fn out_of_bounds(&self, key: &'static str, bounds: &str) -> ConfigError {
        let place = self.place(key);
        let file = place.map_or(&self.main, |place| &place.file).clone();
        let cause = format!("is out of bounds: {bounds}");
        ConfigError::Value { file, line: place.map(|place| place.line), key, cause }
    }
}

/// What the role's own file says, then every drop-in. The first error ends it.
pub(super) fn gather<S: Schema>(paths: &Paths) -> Result<Gathered<S>, ConfigError> {
    gather_all::<S>(paths)?.sound()
}

/// As [`gather`], but with all that is wrong. Fails only where nothing can be read.
pub(super) fn gather_all<S: Schema>(paths: &Paths) -> Result<Gathered<S>, ConfigError> {
    let main = paths.file(S::ROLE);
    let mut all = alone(&main, &read(&main)?);
    for file in drop_ins(&paths.config.join(DROP_INS))? {
        let text = read(&file)?;
        let table = match parse(&file, &text) {
            Ok(table) => table.into_inner(),
            Err(error) => {
                all.problems.push(error);
                continue;
            }
        };
        for (key, value) in table {
            if !ROLES.contains(&key.get_ref().as_ref()) {
                all.problems.push(unknown(&file, &text, &key, ROLES));
                continue;
            }
            // The tables of other roles are checked by those.
            if key.get_ref() == S::ROLE {
                let line = line(&text, value.span().start);
                if let DeValue::Table(table) = value.into_inner() {
                    convert(&file, &text, table, &mut all);
                } else {
                    let cause = format!("`{}` must be a table: [{0}]", S::ROLE);
                    all.problems.push(ConfigError::Malformed { file: file.clone(), line, cause });
                }
            }
        }
    }
    Ok(all)
}

/// What the text of a role's own file says. The first error ends it.
pub(super) fn own<S: Schema>(file: &Path, text: &str) -> Result<Gathered<S>, ConfigError> {
    alone(file, text).sound()
}

fn alone<S: Schema>(file: &Path, text: &str) -> Gathered<S> {
    let (parts, places, problems) = (Vec::new(), Vec::new(), Vec::new());
    let mut all = Gathered { main: file.to_path_buf(), parts, places, problems };
    match parse(file, text) {
        Ok(table) => convert(file, text, table.into_inner(), &mut all),
        Err(error) => all.problems.push(error),
    }
    all
}

/// The roles for which a drop-in has a table, with the file.
pub(super) fn roles_of_drop_ins(paths: &Paths) -> Result<Vec<(String, PathBuf)>, ConfigError> {
    let mut roles = Vec::new();
    for file in drop_ins(&paths.config.join(DROP_INS))? {
        let text = read(&file)?;
        let Ok(table) = parse(&file, &text) else { continue };
        for key in table.get_ref().keys() {
            roles.push((key.get_ref().to_string(), file.clone()));
        }
    }
    Ok(roles)
}

/// Takes the values of one table, each by itself, so that one that is wrong hides no other.
fn convert<S: Schema>(file: &Path, text: &str, table: DeTable<'_>, all: &mut Gathered<S>) {
    for (key, value) in table {
        let name = key.get_ref().to_string();
        if !S::KEYS.contains(&name.as_str()) {
            all.problems.push(unknown(file, text, &key, S::KEYS));
            continue;
        }
        let before = all.problems.len();
        if let Some((_, keys)) = S::TABLES.iter().find(|(table, _)| name == *table) {
            let inner = match value.get_ref() {
                DeValue::Table(table) => vec![table],
                DeValue::Array(rows) => {
                    rows.iter().filter_map(|row| row.get_ref().as_table()).collect()
                }
                _ => Vec::new(),
            };
            for key in inner.into_iter().flat_map(DeTable::keys) {
                if !keys.contains(&key.get_ref().as_ref()) {
                    all.problems.push(unknown(file, text, key, keys));
                }
            }
        }
        if all.problems.len() > before {
            continue;
        }
        let place =
            Place { key: name, file: file.to_path_buf(), line: line(text, key.span().start) };
        let mut one = DeTable::new();
        one.insert(key, value);
        let spanned = Spanned::new(0..text.len(), one);
        match S::deserialize(toml::Deserializer::from(spanned)) {
            Ok(part) => {
                all.parts.push(part);
                all.places.push(place);
            }
            Err(error) => all.problems.push(malformed(file, text, place.line, &error)),
        }
    }
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
    DeTable::parse(text).map_err(|error| malformed(file, text, 1, &error))
}

/// `fallback`: the line, where the error does not say.
fn malformed(file: &Path, text: &str, fallback: usize, error: &toml::de::Error) -> ConfigError {
    let place = error.span().filter(|span| span.start > 0 || fallback == 1);
    ConfigError::Malformed {
        file: file.to_path_buf(),
        line: place.map_or(fallback, |span| line(text, span.start)),
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
