//! `secondsite points`: recovery points of a server, oldest first; from control, else from the target
//! of this host.

use super::failure::{Exit, Failure};
use super::operator::Operator;
use super::recovery::Local;
use super::{Context, output};
use secondsite_control::api::{Point, Points};

pub(super) fn run(context: &Context, server: &str) -> Result<(), Failure> {
    let points = Operator::open(context).and_then(|operator| fetch(&operator, server));
    let points = match points {
        // With control away the target of this host knows as much.
        Err(failure) if failure.exit == Exit::Unavailable => {
            let local = Local::open(context).map_err(|_| failure)?;
            output::talk("Control does not answer: this is what the target of this host has");
            local.ask(|target| target.points(server))?
        }
        points => points?,
    };
    if context.json {
        output::document(&points);
    } else if points.points.is_empty() {
        output::talk(&format!("{server} has no recovery point yet"));
    } else {
        output::data(&render(&points.points));
    }
    Ok(())
}

/// All points of a server.
pub(super) fn fetch(operator: &Operator, server: &str) -> Result<Points, Failure> {
    operator.ask(|control| control.points(server))
}

fn render(points: &[Point]) -> String {
    let rows = points.iter().map(|point| {
        let epochs: Vec<String> =
            point.epochs.iter().map(|(volume, epoch)| format!("{volume} {epoch}")).collect();
        let mut note = match (&point.name, point.kept) {
            (Some(name), _) => format!("kept as {name}"),
            (None, true) => "kept".into(),
            (None, false) => String::new(),
        };
        if !point.reason.is_empty() {
            note += if note.is_empty() { "" } else { "; " };
            note += &point.reason;
        }
        if !point.lacking.is_empty() {
            note += if note.is_empty() { "" } else { "; " };
            note += &format!("without {}", point.lacking.join(", "));
        }
        let consistency = match point.consistency.as_str() {
            "crash" => "crash, exact".to_string(),
            "application" => "application, exact".to_string(),
            other => other.to_string(),
        };
        let generation = point.generation.to_string();
        vec![point.time.clone(), point.id.clone(), generation, epochs.join(", "), consistency, note]
    });
    output::table(&["TIME", "POINT", "GENERATION", "EPOCHS", "CONSISTENCY", "NOTE"], rows.collect())
}

#[cfg(test)]
mod tests {
    use super::render;
    use secondsite_control::api::Point;

    #[test]
    fn a_row_a_point() {
        let point = Point {
            id: "ab".into(),
            time: "2026-11-21T10:41:07.214Z".into(),
            generation: 1,
            epochs: [("sda".to_string(), 7), ("vg0/pg".to_string(), 9)].into(),
            consistency: "fuzzy".into(),
            lacking: vec!["sdb".into()],
            reason: "block 3 of sda could not be read".into(),
            kept: false,
            name: None,
        };
        let text = render(&[point]);
        let last = text.lines().last().unwrap();
        assert_eq!(
            last,
            "2026-11-21T10:41:07.214Z  ab     1           sda 7, vg0/pg 9  fuzzy        \
             block 3 of sda could not be read; without sdb"
        );
    }
}
