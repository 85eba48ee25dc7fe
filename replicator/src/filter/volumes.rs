//! The list of filtered volumes: a text file, one line a volume, written atomically.
//!
//! It is kept twice: where it outlives a reboot, and in the tmpfs, from where the next server reads
//! it even if the other copy lies on a volume that waits for that server.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use xxhash_rust::xxh3::xxh3_64;

/// First line of a list.
const HEADER: &str = "secondsite filter volumes 1";
/// Volumes of one server at most.
pub(super) const VOLUMES_MAX: usize = 256;

/// What is to become of a volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wish {
    Serve,
    /// The next server takes it out, if nobody uses it.
    Remove,
}

/// A filtered volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Entry {
    pub id: String,
    pub backing: PathBuf,
    pub name: String,
    pub block_bytes: u32,
    pub reserve: Option<PathBuf>,
    pub wish: Wish,
}

impl Entry {
    /// From the words that describe one: ID BACKING NAME BLOCK_BYTES RESERVE|-.
    pub fn parse(words: &[&str]) -> Result<Self, String> {
        let [id, backing, name, block_bytes, reserve] = words else {
            return Err("five words are needed: ID BACKING NAME BLOCK_BYTES RESERVE|-".into());
        };
        let plain = |word: &str| {
            (1..=64).contains(&word.len())
                && !word.starts_with('.')
                && word.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
        };
        for word in [id, name] {
            if !plain(word) {
                return Err(format!("{word:?}: an id or name has 1 to 64 of A-Z a-z 0-9 . _ -"));
            }
        }
        let path = |word: &str| match word {
            word if word.starts_with('/') && !word.contains("/../") => Ok(PathBuf::from(word)),
            word => Err(format!("{word:?} is not an absolute path")),
        };
        let block: u32 = block_bytes.parse().unwrap_or(0);
        if !block.is_power_of_two() || !(4096..=1 << 20).contains(&block) {
            return Err(format!("block size {block_bytes}: a power of two from 4096 to 1048576"));
        }
        Ok(Self {
            id: (*id).into(),
            backing: path(backing)?,
            name: (*name).into(),
            block_bytes: block,
            reserve: if *reserve == "-" { None } else { Some(path(reserve)?) },
            wish: Wish::Serve,
        })
    }

    /// The words that [`Self::parse`] takes.
    pub fn words(&self) -> String {
        let reserve = self.reserve.as_deref().unwrap_or(Path::new("-"));
        format!(
            "{} {} {} {} {}",
            self.id,
            self.backing.display(),
            self.name,
            self.block_bytes,
            reserve.display()
        )
    }
}

/// Reads a list; one that is not there is empty.
pub(super) fn read(path: &Path) -> Result<Vec<Entry>, String> {
    let text = match fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(format!("read {}: {error}", path.display())),
    };
    decode(&text).map_err(|why| format!("{}: {why}", path.display()))
}

fn decode(text: &str) -> Result<Vec<Entry>, String> {
    let damaged = || "the list is damaged".to_string();
    let (body, last) = text.trim_end_matches('\n').rsplit_once('\n').ok_or_else(damaged)?;
    let mut lines = body.lines();
    match lines.next() {
        Some(HEADER) => {}
        Some(other) if other.starts_with("secondsite filter volumes ") => {
            return Err("written by a newer version".into());
        }
        _ => return Err(damaged()),
    }
    if last != format!("sum {:016x}", xxh3_64(body.as_bytes())) {
        return Err(damaged());
    }
    lines
        .map(|line| {
            let words: Vec<_> = line.split(' ').collect();
            let (wish, rest) = words.split_first().ok_or_else(damaged)?;
            let wish = match *wish {
                "serve" => Wish::Serve,
                "remove" => Wish::Remove,
                _ => return Err(damaged()),
            };
            Ok(Entry { wish, ..Entry::parse(rest)? })
        })
        .collect()
}

fn encode(entries: &[Entry]) -> String {
    let mut body = HEADER.to_string();
    for entry in entries {
        let wish = if entry.wish == Wish::Serve { "serve" } else { "remove" };
        body += &format!("\n{wish} {}", entry.words());
    }
    format!("{body}\nsum {:016x}\n", xxh3_64(body.as_bytes()))
}

/// Writes a list so that at any instant the old or the new one is there, whole.
pub(super) fn write(path: &Path, entries: &[Entry]) -> io::Result<()> {
    write_file(path, encode(entries).as_bytes())
}

/// The same for any small file.
pub(super) fn write_file(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let folder = path.parent().unwrap_or(Path::new("/"));
    let new = path.with_extension("new");
    let mut file =
        OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    drop(file);
    fs::rename(&new, path)?;
    File::open(folder)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::{Entry, Wish, decode, encode};

    fn sample() -> Vec<Entry> {
        let one = Entry::parse(&["v1", "/dev/sda", "pg", "4096", "-"]).unwrap();
        let two = Entry::parse(&["v2", "/dev/vg0/x", "x.1", "65536", "/dev/sdb1"]).unwrap();
        vec![one, Entry { wish: Wish::Remove, ..two }]
    }

    #[test]
    fn what_is_written_is_read() {
        assert_eq!(decode(&encode(&sample())).unwrap(), sample());
        assert_eq!(decode(&encode(&[])).unwrap(), []);
    }

    #[test]
    fn any_changed_byte_is_noticed() {
        let text = encode(&sample());
        for at in 0..text.len() - 1 {
            let mut bytes = text.clone().into_bytes();
            bytes[at] ^= 1;
            let Ok(changed) = String::from_utf8(bytes) else { continue };
            assert!(decode(&changed).is_err(), "byte {at}");
            assert!(decode(&text[..at]).is_err(), "cut at {at}");
        }
    }

    #[test]
    fn what_cannot_be_is_refused() {
        for words in [
            ["v 1", "/dev/sda", "n", "4096", "-"],
            ["v1", "sda", "n", "4096", "-"],
            ["v1", "/dev/sda", "a/b", "4096", "-"],
            ["v1", "/dev/sda", "..", "4096", "-"],
            ["v1", "/dev/sda", "n", "4097", "-"],
            ["v1", "/dev/sda", "n", "2048", "-"],
            ["v1", "/dev/sda", "n", "4096", "b"],
        ] {
            assert!(Entry::parse(&words).is_err(), "{words:?}");
        }
    }
}
