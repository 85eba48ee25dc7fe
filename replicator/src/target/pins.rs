//! Points of a server that stay beyond their time, and their names: `points.json` in the server's
//! folder, replaced as a whole.

use super::disk::Disk;
use secondsite_format::ids::CutId;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io;

/// Its name in the server's folder.
pub const FILE: &str = "points.json";
/// Newest format known.
const FORMAT: u32 = 1;
/// Largest file believed, bytes.
const FILE_BYTES_MAX: u64 = 4 << 20;
/// Most points of a server that stay beyond their time.
pub const PINS_MAX: usize = 1000;
/// Longest name, bytes.
pub const NAME_BYTES_MAX: usize = 64;

/// By point: its name, if it has one.
pub type Pins = BTreeMap<CutId, Option<String>>;

#[derive(Serialize, Deserialize)]
struct Document {
    format: u32,
    points: Vec<Row>,
}

#[derive(Serialize, Deserialize)]
struct Row {
    point: CutId,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    name: Option<String>,
}

/// Reads them; none if there is no file. One that cannot be read is an error: what it keeps must
/// not go.
pub fn load(disk: &dyn Disk) -> io::Result<Pins> {
    disk.sync_names("")?;
    let Some(bytes) = disk.read(FILE, FILE_BYTES_MAX)? else { return Ok(Pins::new()) };
    let wrong = |what: String| io::Error::new(io::ErrorKind::InvalidData, what);
    let document: Document =
        serde_json::from_slice(&bytes).map_err(|error| wrong(format!("{FILE}: {error}")))?;
    if document.format > FORMAT {
        return Err(wrong(format!("{FILE} was written by a newer Secondsite")));
    }
    Ok(document.points.into_iter().map(|row| (row.point, row.name)).collect())
}

/// Makes them durable.
pub fn store(disk: &dyn Disk, pins: &Pins) -> io::Result<()> {
    let points = pins.iter().map(|(point, name)| Row { point: *point, name: name.clone() });
    let document = Document { format: FORMAT, points: points.collect() };
    let mut text = serde_json::to_vec_pretty(&document).expect("plain data has a JSON form");
    text.push(b'\n');
    disk.replace(FILE, &text)
}

/// Whether a name can be one: it must not be taken for an id, and stand in a URI as it is.
pub fn is_name(name: &str) -> bool {
    let fits = |c: u8| c.is_ascii_alphanumeric() || b"-_.".contains(&c);
    (1..=NAME_BYTES_MAX).contains(&name.len())
        && name.bytes().all(fits)
        && name.parse::<CutId>().is_err()
}
