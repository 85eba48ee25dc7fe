//! A tmpfs of our own, with everything in it that the filter needs to run and to start again.
//!
//! The program, its loader and its libraries are copied there and executed from there, so that none
//! of them lies on a file system that waits for a filtered device. Of each file only what is loaded
//! is copied: no debug information.

use super::{Places, volumes};
use crate::cli::args::FilterArgs;
use crate::cli::failure::{Exit, Failure};
use nix::mount::{MsFlags, mount};
use std::collections::BTreeSet;
use std::ffi::{CString, OsStr};
use std::fs::{self, DirBuilder};
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// What the tmpfs may hold: two versions of the program during an upgrade, and what is shared of
/// each volume: 96 MiB a TiB at 4 KiB blocks, and up to 32 MiB of preserved ones.
const SIZE: &str = "mode=0700,size=50%";
/// A program larger than this is none.
const PROGRAM_BYTES_MAX: u64 = 1 << 30;
/// Folders of programs: `bin.PID`.
const PROGRAM: &str = "bin.";
/// What init reads: a process whose name begins so is not killed before the last unmount.
const ARGV0: &str = "@secondsite-filter";

/// Mounts the tmpfs, if it is not there, and brings the list into it.
pub(super) fn prepare(places: &Places) -> Result<(), Failure> {
    let dir = &places.dir;
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .map_err(|error| Failure::io("create", dir, &error))?;
    if !is_mounted(dir) {
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
        mount(Some("secondsite-filter"), dir, Some("tmpfs"), flags, Some(SIZE))
            .map_err(|error| Failure::io("mount a tmpfs on", dir, &error.into()))?;
    }
    // The one that is there is newer: it changes first.
    let here = places.list_here();
    if !here.exists() {
        let wrong = |why: String| {
            Failure::new(Exit::Config, format!("filter: {why}"))
                .hint(format!("ls -l {}", places.list.display()))
        };
        let list = volumes::read(&places.list).map_err(wrong)?;
        volumes::write(&here, &list).map_err(|error| Failure::io("write", &here, &error))?;
    }
    Ok(())
}

fn is_mounted(dir: &Path) -> bool {
    let Ok(dir) = dir.canonicalize() else { return false };
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    table.lines().any(|line| {
        line.split(' ').nth(4) == dir.to_str() && line.contains(" - tmpfs secondsite-filter ")
    })
}

/// Copies the program and becomes it. Comes back only with what went wrong.
pub(super) fn enter(places: &Places, args: &FilterArgs) -> Failure {
    let folder = places.dir.join(format!("{PROGRAM}{}", std::process::id()));
    match copy_program(&folder) {
        Ok((loader, program)) => {
            let error = execute(&loader, &folder, &program, places, args);
            Failure::io("execute", &loader, &error)
        }
        Err(error) => Failure::io("copy the program to", &folder, &error),
    }
}

/// The loader and the program, as they lie in `folder` then.
fn copy_program(folder: &Path) -> io::Result<(PathBuf, PathBuf)> {
    let _ = fs::remove_dir_all(folder);
    DirBuilder::new().mode(0o700).create(folder)?;
    let exe = std::env::current_exe()?;
    let mut files = mapped()?;
    files.insert(exe.clone());
    let mut loader = None;
    for file in &files {
        let name = file.file_name().ok_or_else(|| io::Error::other("a mapped file has no name"))?;
        let to = folder.join(name);
        fs::write(&to, loaded_part(file)?)?;
        fs::set_permissions(&to, fs::Permissions::from_mode(0o700))?;
        if name.as_bytes().starts_with(b"ld-") || name.as_bytes().starts_with(b"ld.so") {
            loader = Some(to);
        }
    }
    let loader = loader.ok_or_else(|| io::Error::other("the loader is not mapped"))?;
    Ok((loader, folder.join(exe.file_name().unwrap_or(OsStr::new("secondsite")))))
}

/// The files that this process executes: program, loader, libraries.
fn mapped() -> io::Result<BTreeSet<PathBuf>> {
    let maps = fs::read_to_string("/proc/self/maps")?;
    let executed = maps.lines().filter_map(|line| {
        let mut words = line.split_ascii_whitespace();
        let rights = words.nth(1)?;
        let path = words.nth(3)?;
        (rights.contains('x') && path.starts_with('/')).then(|| PathBuf::from(path))
    });
    Ok(executed.collect())
}

/// An ELF file up to the end of what its program headers load, without its table of sections.
fn loaded_part(path: &Path) -> io::Result<Vec<u8>> {
    let wrong = || io::Error::other(format!("{} is no 64-bit ELF file", path.display()));
    let mut file = fs::File::open(path)?;
    let mut head = vec![0; 4096];
    let count = file.read(&mut head)?;
    head.truncate(count);
    let number = |at: usize, bytes: usize| -> io::Result<u64> {
        let field = head.get(at..at + bytes).ok_or_else(wrong)?;
        Ok(field.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte)))
    };
    // Class 64 bit, least significant byte first.
    if head.get(..6) != Some(b"\x7fELF\x02\x01") {
        return Err(wrong());
    }
    let (at, size, count) = (number(32, 8)?, number(54, 2)?, number(56, 2)?);
    let mut end = at + size * count;
    for index in 0..count {
        let header = (at + index * size) as usize;
        end = end.max(number(header + 8, 8)?.saturating_add(number(header + 32, 8)?));
    }
    if end > PROGRAM_BYTES_MAX {
        return Err(wrong());
    }
    let mut bytes = Vec::with_capacity(end as usize);
    bytes.extend_from_slice(&head);
    file.take(end.saturating_sub(head.len() as u64)).read_to_end(&mut bytes)?;
    bytes.truncate(end as usize);
    // e_shoff, e_shnum, e_shstrndx: the sections stay behind.
    bytes[40..48].fill(0);
    bytes[60..64].fill(0);
    Ok(bytes)
}

fn execute(
    loader: &Path,
    folder: &Path,
    program: &Path,
    places: &Places,
    args: &FilterArgs,
) -> io::Error {
    let mut words: Vec<Vec<u8>> = vec![ARGV0.into(), "--library-path".into()];
    words.push(folder.as_os_str().as_bytes().into());
    words.push(program.as_os_str().as_bytes().into());
    words.extend(["filter", "--in-place", "--dir"].map(Into::into));
    words.push(places.dir.as_os_str().as_bytes().into());
    words.push("--list".into());
    words.push(places.list.as_os_str().as_bytes().into());
    if args.no_reissue {
        words.push("--no-reissue".into());
    }
    if let Some(queues) = args.queues {
        words.push(format!("--queues={queues}").into());
    }
    let words: Result<Vec<CString>, _> = words.into_iter().map(CString::new).collect();
    let (Ok(words), Ok(path)) = (words, CString::new(loader.as_os_str().as_bytes())) else {
        return io::Error::other("a path with a zero byte");
    };
    let Err(error) = nix::unistd::execv(&path, &words);
    error.into()
}

/// Removes the programs of earlier starts; whoever still runs them keeps what it has mapped.
pub(super) fn remove_other_programs(places: &Places) {
    let own = format!("{PROGRAM}{}", std::process::id());
    for entry in fs::read_dir(&places.dir).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with(PROGRAM) && name != own {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}
