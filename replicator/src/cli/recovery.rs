//! `secondsite open`, `close`, `keep` and `export`: recovery points on the target's own host.
//!
//! They ask the target itself, over its socket, so they work with control dead.

use super::args::{CloseArgs, ExportArgs, KeepArgs, OpenArgs, PointArgs};
use super::failure::{Exit, Failure};
use super::output::Progress;
use super::{Context, operator, output, units};
use secondsite_control::api::SCHEMA_VERSION;
use secondsite_control::client::{BlockingClient, Client};
use secondsite_control::client_error::ClientError;
use secondsite_control::recovery::{CloseRequest, KeepRequest, OpenRequest, OpenedPoint, Opens};
use serde_json::json;
use std::io::{BufReader, ErrorKind, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The target of this host.
pub(super) struct Local {
    client: BlockingClient,
}

impl Local {
    /// Its socket; who may not open it, or where none answers, learns why.
    pub(super) fn open(context: &Context) -> Result<Self, Failure> {
        let socket = context.paths.api("target");
        if let Err(error) = std::os::unix::net::UnixStream::connect(&socket) {
            let denied = error.kind() == ErrorKind::PermissionDenied;
            let exit = if denied { Exit::Permission } else { Exit::Unavailable };
            let what = format!("the target of this host at {}: {error}", socket.display());
            let hint = if denied {
                "run as root".to_owned()
            } else {
                "on the target's host: systemctl status secondsite-target".to_owned()
            };
            return Err(Failure::new(exit, what).still("replication goes on").hint(hint));
        }
        let client = BlockingClient::local(&socket)
            .map_err(|error| Failure::new(Exit::Failed, error.to_string()))?;
        Ok(Self { client })
    }

    pub(super) fn ask<'a, T, F>(&'a self, call: impl FnOnce(&'a Client) -> F) -> Result<T, Failure>
    where
        F: Future<Output = Result<T, ClientError>>,
    {
        self.client.run(call).map_err(|error| operator::failure(&error))
    }
}

fn request(point: &PointArgs, volume: Option<&String>) -> Result<OpenRequest, Failure> {
    let at = point.at.as_deref().map(|text| time(text, &jiff::Zoned::now())).transpose()?;
    Ok(OpenRequest { at, point: point.point.clone(), volume: volume.cloned() })
}

/// A time as people say it, in RFC 3339: that, `2026-11-21 10:30` or `10:30` by this host's clock,
/// or `10 min ago`.
fn time(text: &str, now: &jiff::Zoned) -> Result<String, Failure> {
    let text = text.trim();
    let wrong = || {
        let what = format!("{text:?} is no time");
        Failure::new(Exit::Usage, what).hint("--at '10 min ago', or --at 2026-11-21T10:30:00Z")
    };
    if let Some(ago) = text.strip_suffix("ago") {
        let unit = |word: &str| match word {
            "second" | "seconds" | "sec" => "s".to_owned(),
            "minute" | "minutes" => "min".to_owned(),
            "hour" | "hours" => "h".to_owned(),
            "day" | "days" => "d".to_owned(),
            other => other.to_owned(),
        };
        let compact: String = ago.split_whitespace().map(unit).collect();
        let seconds = units::parse_seconds(&compact).map_err(|_| wrong())?;
        let seconds = i64::try_from(seconds).map_err(|_| wrong())?;
        let then = now.timestamp() - jiff::SignedDuration::from_secs(seconds);
        return Ok(then.to_string());
    }
    if let Ok(timestamp) = text.parse::<jiff::Timestamp>() {
        return Ok(timestamp.to_string());
    }
    let civil = match text.parse::<jiff::civil::DateTime>() {
        Ok(civil) if text.contains([' ', 'T']) => civil,
        _ => now.date().to_datetime(text.parse::<jiff::civil::Time>().map_err(|_| wrong())?),
    };
    let zoned = civil.to_zoned(now.time_zone().clone()).map_err(|_| wrong())?;
    Ok(zoned.timestamp().to_string())
}

pub(super) fn open(context: &Context, args: &OpenArgs) -> Result<(), Failure> {
    let local = Local::open(context)?;
    let Some(server) = args.server.as_ref().filter(|_| !args.list) else {
        let opens: Opens = local.ask(|target| target.opens())?;
        if context.json {
            output::document(&opens);
        } else if opens.points.is_empty() {
            output::talk("No recovery point is open");
        } else {
            output::data(&listed(&opens.points));
        }
        return Ok(());
    };
    let request = request(&args.point, args.volume.as_ref())?;
    let opened = local.ask(|target| target.open(server, &request))?;
    if context.json {
        output::document(&json!({
            "schema_version": SCHEMA_VERSION,
            "server": opened.server,
            "point": opened.point,
            "time": opened.time,
            "consistency": opened.consistency,
            "volumes": opened.volumes,
        }));
    } else {
        output::data(&listed(std::slice::from_ref(&opened)));
        let close = context.command(&format!("close {server} --point {}", opened.point));
        output::talk(&format!("What is written to it is kept apart, until: {close}"));
    }
    Ok(())
}

fn listed(points: &[OpenedPoint]) -> String {
    let rows = points.iter().flat_map(|point| {
        point.volumes.iter().map(|volume| {
            vec![
                point.server.clone(),
                point.time.clone(),
                point.consistency.clone(),
                volume.name.clone(),
                units::bytes(volume.size_bytes),
                units::bytes(volume.scratch_bytes),
                volume.uri.clone(),
            ]
        })
    });
    let header = ["SERVER", "TIME", "CONSISTENCY", "VOLUME", "SIZE", "WRITTEN", "URI"];
    output::table(&header, rows.collect())
}

pub(super) fn close(context: &Context, args: &CloseArgs) -> Result<(), Failure> {
    let local = Local::open(context)?;
    let request = CloseRequest { point: args.point.clone() };
    let reply = local.ask(|target| target.close(&args.server, &request))?;
    if context.json {
        let document = json!({ "schema_version": SCHEMA_VERSION, "closed": reply.closed });
        output::document(&document);
    } else if reply.closed.is_empty() {
        output::talk(&format!("No recovery point of {} is open", args.server));
    } else {
        let text: String = reply.closed.iter().map(|id| format!("Closed {id}\n")).collect();
        output::data(&text);
    }
    Ok(())
}

pub(super) fn keep(context: &Context, args: &KeepArgs) -> Result<(), Failure> {
    let local = Local::open(context)?;
    let request =
        KeepRequest { point: args.point.clone(), name: args.name.clone(), release: args.release };
    local.ask(|target| target.keep(&args.server, &request))?;
    if context.json {
        output::document(&json!({
            "schema_version": SCHEMA_VERSION,
            "point": args.point,
            "kept": !args.release,
            "name": args.name,
        }));
    } else if args.release {
        output::data(&format!("Point {} stays as long as its time\n", args.point));
    } else {
        output::data(&format!("Point {} stays until it is released\n", args.point));
    }
    Ok(())
}

pub(super) fn export(context: &Context, args: &ExportArgs) -> Result<(), Failure> {
    let local = Local::open(context)?;
    if args.output.exists() && !context.yes {
        let what = format!("{} is there already", args.output.display());
        return Err(Failure::new(Exit::Usage, what).hint("--yes to replace it"));
    }
    let request = request(&args.point, args.volume.as_ref())?;
    let before: Opens = local.ask(|target| target.opens())?;
    let opened = local.ask(|target| target.open(&args.server, &request))?;
    let close = || {
        let was_open = before.points.iter().any(|point| point.point == opened.point);
        let request = CloseRequest { point: Some(opened.point.clone()) };
        if !was_open {
            local.ask(|target| target.close(&args.server, &request)).map(drop)
        } else {
            Ok(())
        }
    };
    let volume = match (&opened.volumes[..], &args.volume) {
        ([only], _) => only,
        (several, Some(name)) => {
            several.iter().find(|volume| volume.name == *name).expect("the target served it")
        }
        (several, None) => {
            let names: Vec<&str> = several.iter().map(|volume| volume.name.as_str()).collect();
            close()?;
            let what = format!("{} has several volumes: {}", args.server, names.join(", "));
            return Err(Failure::new(Exit::Usage, what).hint(format!("--volume {}", names[0])));
        }
    };
    let mut progress = Progress::new(format!("export {} of {}", volume.name, args.server));
    let partial = partial(&args.output);
    let written = convert(&volume.uri, args.format.word(), &partial, &mut progress);
    progress.finish();
    let closed = close();
    let written = written.and_then(|()| {
        std::fs::rename(&partial, &args.output)
            .map_err(|error| Failure::io("naming", &args.output, &error))
    });
    if written.is_err() {
        // What is half is of no use to anybody.
        let _ = std::fs::remove_file(&partial);
    }
    written?;
    closed?;
    if context.json {
        output::document(&json!({
            "schema_version": SCHEMA_VERSION,
            "server": args.server,
            "volume": volume.name,
            "point": opened.point,
            "time": opened.time,
            "file": args.output,
            "format": args.format.word(),
        }));
    } else {
        let (file, format) = (args.output.display(), args.format.word());
        output::data(&format!("{} of {} is in {file} ({format})\n", volume.name, opened.time));
    }
    Ok(())
}

fn partial(output: &Path) -> PathBuf {
    let mut name = output.file_name().unwrap_or_default().to_owned();
    name.push(".partial");
    output.with_file_name(name)
}

/// Runs qemu-img; its output is progress, what it says on stderr is the reason if it fails.
fn convert(uri: &str, format: &str, to: &Path, progress: &mut Progress) -> Result<(), Failure> {
    let mut command = Command::new("qemu-img");
    command.args(["convert", "-p", "-f", "raw", "-O", format, uri]).arg(to);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().map_err(|error| {
        let what = format!("qemu-img: {error}");
        Failure::new(Exit::Unavailable, what).hint("apt install qemu-utils qemu-block-extra")
    })?;
    let stderr = child.stderr.take().expect("it is piped");
    let complaints = std::thread::spawn(move || {
        let mut text = String::new();
        // What it said before a byte that is no text is said.
        let _ = BufReader::new(stderr).read_to_string(&mut text);
        text
    });
    let mut said = Vec::new();
    for byte in BufReader::new(child.stdout.take().expect("it is piped")).bytes() {
        // `    (12.34/100%)` and a carriage return.
        match byte {
            Ok(b'\r' | b'\n') => said.clear(),
            Ok(byte) => said.push(byte),
            Err(_) => break,
        }
        if said.last() == Some(&b')')
            && let Some(percent) = percent(&said)
        {
            progress.at(percent, "");
        }
    }
    let status =
        child.wait().map_err(|error| Failure::io("waiting for qemu-img for", to, &error))?;
    let complaints = complaints.join().unwrap_or_default();
    if status.success() {
        return Ok(());
    }
    let what = format!("writing {}: {}", to.display(), complaints.trim());
    Err(Failure::new(Exit::Io, what).hint(format!("df -h {}", to.display())))
}

fn percent(said: &[u8]) -> Option<u8> {
    let text = std::str::from_utf8(said).ok()?.trim().strip_prefix('(')?;
    let number: f64 = text.split('/').next()?.parse().ok()?;
    // Not 100 before the file has its name.
    Some(number.clamp(0.0, 99.0) as u8)
}

#[cfg(test)]
mod tests {
    use super::{percent, time};

    #[test]
    fn times_are_read_as_people_say_them() {
        let now: jiff::Zoned = "2026-11-21T12:00:00+01:00[Europe/Berlin]".parse().unwrap();
        let read = |text: &str| time(text, &now).ok();
        let is = |text: &str, utc: &str| assert_eq!(read(text).as_deref(), Some(utc), "{text}");
        is("10 min ago", "2026-11-21T10:50:00Z");
        is("2h ago", "2026-11-21T09:00:00Z");
        is("3 days ago", "2026-11-18T11:00:00Z");
        is("10:30", "2026-11-21T09:30:00Z");
        is("2026-11-20 10:30", "2026-11-20T09:30:00Z");
        is("2026-11-20T10:30:05.25Z", "2026-11-20T10:30:05.25Z");
        for wrong in ["", "yesterday", "ago", "-3h ago", "2026-13-01", "25:00"] {
            assert_eq!(read(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn progress_of_qemu_img_is_read() {
        assert_eq!(percent(b"    (12.34/100%)"), Some(12));
        assert_eq!(percent(b"    (100.00/100%)"), Some(99));
        assert_eq!(percent(b"warning (x)"), None);
    }
}
