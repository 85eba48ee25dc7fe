//! Speaking to the filter that runs on this machine: one line a message, over a local socket.
//!
//! Everything waits, with a limit. Between two servers the socket stays: who connects then is
//! answered by the next one. An answer is one line, or several up to `end`.

use std::io::{self, ErrorKind};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Longest message, bytes.
pub const MESSAGE_BYTES_MAX: usize = 4096;
/// Connections that wait to be taken.
const BACKLOG: i32 = 16;
/// Between two looks at whether the next server is there.
const POLL: Duration = Duration::from_millis(20);

/// What can go wrong between the two.
#[derive(Debug, thiserror::Error)]
pub enum FilterError {
    /// Nobody listens, or nobody answers in time.
    #[error("the filter does not answer at {path}: {cause}")]
    Silent {
        /// The socket.
        path: PathBuf,
        /// Why.
        cause: String,
    },
    /// It was asked for something that it does not do.
    #[error("the filter refuses {asked:?}: {why}")]
    Refused {
        /// The line.
        asked: String,
        /// Its words.
        why: String,
    },
    /// An answer that is none.
    #[error("the filter answers {answer:?} to {asked:?}")]
    Nonsense {
        /// The line.
        asked: String,
        /// What came.
        answer: String,
    },
}

/// Who answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hello {
    /// Version of its program.
    pub version: String,
    /// Its process; another one after each restart.
    pub pid: u32,
}

/// A volume, as the filter shows it.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Listed {
    /// Its id.
    pub id: String,
    /// What it writes to.
    pub backing: PathBuf,
    /// Its stable name: `/dev/secondsite/NAME`.
    pub name: String,
    /// Unit of tracking.
    pub block_bytes: u32,
    /// Where preserved blocks go when memory is full.
    pub reserve: Option<PathBuf>,
    /// `none`; `spill`: only for those; `log`: its marks survive a power cut as well; `failed`.
    pub reserve_state: String,
    /// Its device, if it is there.
    pub device: Option<PathBuf>,
    /// `served`, or what is wrong.
    pub state: String,
}

impl Listed {
    /// Whether what it has preserved and marked survives a power cut.
    pub fn survives(&self) -> String {
        let reserve = self.reserve.as_deref().unwrap_or(Path::new("-")).display().to_string();
        match self.reserve_state.as_str() {
            "log" => format!("reserve {reserve}: marks survive a power cut"),
            "spill" => format!(
                "reserve {reserve} for preserved blocks; it is written to before its filter is \
                 there: after a reboot all is compared"
            ),
            "failed" => {
                "the reserve has failed; memory only: after a power cut all is compared".into()
            }
            _ => "memory only: after a power cut all is compared".into(),
        }
    }
}

/// The socket of a filter whose tmpfs is this folder.
pub fn socket_in(dir: &Path) -> PathBuf {
    dir.join("socket")
}

/// A connection to the filter that runs. One made before a restart fails; connect again.
pub struct Client {
    socket: OwnedFd,
    path: PathBuf,
}

impl Client {
    /// Connects; `limit` is for this and for each message from then on.
    pub fn connect(dir: &Path, limit: Duration) -> Result<Self, FilterError> {
        let path = socket_in(dir);
        let silent =
            |error: io::Error| FilterError::Silent { path: path.clone(), cause: error.to_string() };
        let socket = seqpacket().map_err(silent)?;
        let time = libc::timeval {
            tv_sec: limit.as_secs().cast_signed(),
            tv_usec: i64::from(limit.subsec_micros()),
        };
        for option in [libc::SO_RCVTIMEO, libc::SO_SNDTIMEO] {
            // SAFETY: the option is a timeval, which lives until the call returns.
            check(unsafe {
                libc::setsockopt(
                    socket.as_raw_fd(),
                    libc::SOL_SOCKET,
                    option,
                    (&raw const time).cast(),
                    size_of::<libc::timeval>() as u32,
                )
            })
            .map_err(silent)?;
        }
        let (address, length) = address(&path).map_err(silent)?;
        // SAFETY: the address is of this length and lives until the call returns.
        check(unsafe { libc::connect(socket.as_raw_fd(), (&raw const address).cast(), length) })
            .map_err(silent)?;
        Ok(Self { socket, path })
    }

    /// Says a line; the line that comes back.
    pub fn ask(&self, line: &str) -> Result<String, FilterError> {
        send(&self.socket, line).map_err(|error| self.silent(&error))?;
        self.next()
    }

    fn next(&self) -> Result<String, FilterError> {
        let mut buffer = [0; MESSAGE_BYTES_MAX];
        match receive(&self.socket, &mut buffer) {
            Ok(Some(text)) => Ok(text.to_string()),
            Ok(None) => Err(self.silent(&io::Error::other("it ended"))),
            Err(error) => Err(self.silent(&error)),
        }
    }

    fn silent(&self, error: &io::Error) -> FilterError {
        let cause = match error.kind() {
            ErrorKind::WouldBlock => "no answer in time".into(),
            _ => error.to_string(),
        };
        FilterError::Silent { path: self.path.clone(), cause }
    }

    /// Who is there.
    pub fn hello(&self) -> Result<Hello, FilterError> {
        let answer = self.ask("hello")?;
        let words: Vec<_> = answer.split(' ').collect();
        match (words.as_slice(), words.last().and_then(|pid| pid.parse().ok())) {
            (["hello", version, _], Some(pid)) => Ok(Hello { version: (*version).into(), pid }),
            _ => Err(FilterError::Nonsense { asked: "hello".into(), answer }),
        }
    }

    /// All volumes.
    pub fn list(&self) -> Result<Vec<Listed>, FilterError> {
        let mut volumes = Vec::new();
        let mut answer = self.ask("list")?;
        while answer != "end" {
            volumes.push(listed(&answer).ok_or_else(|| FilterError::Nonsense {
                asked: "list".into(),
                answer: answer.clone(),
            })?);
            answer = self.next()?;
        }
        Ok(volumes)
    }

    fn expect(&self, asked: &str, good: &str) -> Result<(), FilterError> {
        let answer = self.ask(asked)?;
        match answer.strip_prefix("failed ") {
            _ if answer == good => Ok(()),
            Some(why) => Err(FilterError::Refused { asked: asked.into(), why: why.into() }),
            None => Err(FilterError::Nonsense { asked: asked.into(), answer }),
        }
    }

    /// Cuts these volumes at one instant; the number of the flip.
    pub fn cut(&self, ids: &[&str]) -> Result<u64, FilterError> {
        let asked = format!("cut {}", ids.join(" "));
        let answer = self.ask(&asked)?;
        match answer.split_once(' ').map(|(word, rest)| (word, rest, rest.parse())) {
            Some(("flipped", _, Ok(flip))) => Ok(flip),
            Some(("failed", why, _)) => Err(FilterError::Refused { asked, why: why.into() }),
            _ => Err(FilterError::Nonsense { asked, answer }),
        }
    }
}

/// Adds a volume, and waits until the next server says what became of it.
pub fn add(
    dir: &Path,
    limit: Duration,
    id: &str,
    backing: &Path,
    name: &str,
    block_bytes: u32,
    reserve: Option<&Path>,
) -> Result<Listed, FilterError> {
    let reserve = reserve.unwrap_or(Path::new("-"));
    let line = format!("add {id} {} {name} {block_bytes} {}", backing.display(), reserve.display());
    change(dir, limit, &line, |volumes| volumes.iter().find(|volume| volume.id == id).cloned())
}

/// Takes a volume out, and waits until the next server has done it.
pub fn remove(dir: &Path, limit: Duration, id: &str) -> Result<(), FilterError> {
    let line = format!("remove {id}");
    change(dir, limit, &line, |volumes| {
        Some(volumes.iter().find(|volume| volume.id == id).cloned())
    })
    .and_then(|left| match left {
        None => Ok(()),
        Some(volume) => Err(FilterError::Refused { asked: line, why: volume.state }),
    })
}

/// Says a line that makes the server end, and looks at what the next one has.
fn change<T>(
    dir: &Path,
    limit: Duration,
    line: &str,
    look: impl Fn(&[Listed]) -> Option<T>,
) -> Result<T, FilterError> {
    let end = Instant::now() + limit;
    let client = Client::connect(dir, limit)?;
    let before = client.hello()?.pid;
    client.expect(line, "changed")?;
    drop(client);
    loop {
        let left = end.saturating_duration_since(Instant::now()).max(POLL);
        let seen = Client::connect(dir, left).and_then(|client| {
            let pid = client.hello()?.pid;
            if pid == before { Ok(None) } else { Ok(Some(client.list()?)) }
        });
        match seen {
            Ok(Some(volumes)) => {
                return look(&volumes).ok_or_else(|| FilterError::Nonsense {
                    asked: line.into(),
                    answer: "the volume is not listed".into(),
                });
            }
            Err(error) if Instant::now() >= end => return Err(error),
            _ => std::thread::sleep(POLL),
        }
    }
}

/// From the words of a line of the list.
fn listed(line: &str) -> Option<Listed> {
    let mut words = line.splitn(9, ' ');
    if words.next()? != "volume" {
        return None;
    }
    let mut word = || words.next();
    let path = |word: &str| (word != "-").then(|| PathBuf::from(word));
    Some(Listed {
        id: word()?.into(),
        backing: word()?.into(),
        name: word()?.into(),
        block_bytes: word()?.parse().ok()?,
        reserve: path(word()?),
        reserve_state: word()?.into(),
        device: path(word()?),
        state: word()?.into(),
    })
}

/// The socket that a keeper makes and its servers take connections from.
pub(super) fn listen(path: &Path) -> io::Result<OwnedFd> {
    let socket = seqpacket()?;
    let (address, length) = address(path)?;
    // SAFETY: the address is of this length and lives until the call returns.
    check(unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length) })?;
    // SAFETY: no pointers.
    check(unsafe { libc::listen(socket.as_raw_fd(), BACKLOG) })?;
    Ok(socket)
}

fn seqpacket() -> io::Result<OwnedFd> {
    let kind = libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC;
    // SAFETY: no pointers; the answer is a descriptor of ours, or an error.
    let fd = check(unsafe { libc::socket(libc::AF_UNIX, kind, 0) })?;
    // SAFETY: it was just made and belongs to nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn address(path: &Path) -> io::Result<(libc::sockaddr_un, u32)> {
    // SAFETY: all zeros are a valid address.
    let mut address: libc::sockaddr_un = unsafe { std::mem::zeroed() };
    address.sun_family = libc::AF_UNIX as libc::sa_family_t;
    let bytes = path.as_os_str().as_bytes();
    if bytes.len() >= address.sun_path.len() {
        return Err(io::Error::new(ErrorKind::InvalidInput, "the path is too long for a socket"));
    }
    for (to, from) in address.sun_path.iter_mut().zip(bytes) {
        *to = from.cast_signed();
    }
    Ok((address, size_of::<libc::sockaddr_un>() as u32))
}

/// Sends one message.
pub(super) fn send(socket: &OwnedFd, line: &str) -> io::Result<()> {
    // SAFETY: the bytes live until the call returns.
    let sent = unsafe {
        libc::send(socket.as_raw_fd(), line.as_ptr().cast(), line.len(), libc::MSG_NOSIGNAL)
    };
    if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Receives one message; none: the other side has ended.
pub(super) fn receive<'a>(socket: &OwnedFd, buffer: &'a mut [u8]) -> io::Result<Option<&'a str>> {
    // SAFETY: the buffer is of this length and lives until the call returns.
    let count = unsafe {
        libc::recv(socket.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len(), libc::MSG_TRUNC)
    };
    match usize::try_from(count) {
        Err(_) => Err(io::Error::last_os_error()),
        Ok(0) => Ok(None),
        Ok(count) if count > buffer.len() => Err(ErrorKind::InvalidData.into()),
        Ok(count) => match std::str::from_utf8(&buffer[..count]) {
            Ok(text) => Ok(Some(text.trim_end_matches('\n'))),
            Err(_) => Err(ErrorKind::InvalidData.into()),
        },
    }
}

fn check(answer: i32) -> io::Result<i32> {
    if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(answer) }
}

#[cfg(test)]
mod tests {
    use super::listed;

    #[test]
    fn a_line_of_the_list() {
        let volume = listed("volume v1 /dev/sda pg 4096 - none /dev/ublkb0 served").unwrap();
        assert_eq!((volume.id.as_str(), volume.name.as_str()), ("v1", "pg"));
        assert_eq!(volume.device.unwrap(), std::path::Path::new("/dev/ublkb0"));
        let volume =
            listed("volume v1 /dev/sda pg 4096 /dev/sdb log - hold /dev/sda: in use").unwrap();
        assert_eq!((volume.device, volume.state.as_str()), (None, "hold /dev/sda: in use"));
        for line in ["end", "volume v1 /dev/sda pg", "volume v1 /dev/sda pg x - none - served"] {
            assert_eq!(listed(line), None, "{line}");
        }
    }
}
