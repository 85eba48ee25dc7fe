//! The handshake: fixed newstyle, options in, replies out. No I/O.
//!
//! With TLS required nothing but STARTTLS and ABORT is answered before it; whatever was agreed on
//! in clear text is forgotten. The caller reads exact lengths, so that no byte sent before TLS can
//! be taken for one sent within.

use super::protocol::{ALLOCATION_ID, Nonsense, Terms, number};
use super::{Device, NAME_BYTES_MAX, PAYLOAD_BYTES_MAX};
use std::sync::Arc;

/// Bytes of an option before its data.
pub const OPTION_HEADER_BYTES: usize = 16;
/// Most data of an option that is read; a longer one is refused.
pub const OPTION_BYTES_MAX: u32 = 32 << 10;

const MAGIC: u64 = 0x4e42_444d_4147_4943;
const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
const REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;

const FIXED_NEWSTYLE: u16 = 1;
const NO_ZEROES: u16 = 1 << 1;

const EXPORT_NAME: u32 = 1;
const ABORT: u32 = 2;
const LIST: u32 = 3;
const STARTTLS: u32 = 5;
const INFO: u32 = 6;
const GO: u32 = 7;
const STRUCTURED_REPLY: u32 = 8;
const LIST_META_CONTEXT: u32 = 9;
const SET_META_CONTEXT: u32 = 10;

const ACK: u32 = 1;
const SERVER: u32 = 2;
const REP_INFO: u32 = 3;
const META_CONTEXT: u32 = 4;
const ERR_UNSUP: u32 = (1 << 31) + 1;
const ERR_POLICY: u32 = (1 << 31) + 2;
const ERR_INVALID: u32 = (1 << 31) + 3;
const ERR_TLS_REQD: u32 = (1 << 31) + 5;
const ERR_UNKNOWN: u32 = (1 << 31) + 6;
const ERR_TOO_BIG: u32 = (1 << 31) + 9;

const INFO_EXPORT: u16 = 0;
const INFO_NAME: u16 = 1;
const INFO_BLOCK_SIZE: u16 = 3;

/// Smallest, preferred and largest size of a request.
const BLOCK_SIZES: [u32; 3] = [1, 4096, PAYLOAD_BYTES_MAX];
const ALLOCATION: &str = "base:allocation";

/// The exports, as a client may ask for them.
pub trait Exports {
    /// Their names, in order.
    fn names(&self) -> Vec<String>;
    /// One by its name, with its own name; the empty one is the default.
    fn find(&self, name: &str) -> Option<(String, Arc<dyn Device>)>;
}

/// What a client has chosen.
pub struct Chosen {
    pub name: String,
    pub device: Arc<dyn Device>,
    pub terms: Terms,
}

/// What comes after an option.
pub enum Next {
    /// Another one.
    Option,
    /// TLS, after the reply is sent; then another one.
    StartTls,
    /// The requests.
    Transmit(Chosen),
    /// Nothing.
    End,
}

/// Where a client's handshake has got to.
#[derive(Debug, Default)]
pub struct Negotiation {
    tls_required: bool,
    secure: bool,
    no_zeroes: bool,
    structured: bool,
    /// The export for which base:allocation was selected.
    allocation_of: Option<String>,
}

impl Negotiation {
    /// Before the first byte.
    pub fn new(tls_required: bool) -> Self {
        Self { tls_required, ..Self::default() }
    }

    /// What the server says first.
    pub fn greeting() -> Vec<u8> {
        let mut out = MAGIC.to_be_bytes().to_vec();
        out.extend(OPTION_MAGIC.to_be_bytes());
        out.extend((FIXED_NEWSTYLE | NO_ZEROES).to_be_bytes());
        out
    }

    /// What the client says to that.
    pub fn client_flags(&mut self, flags: [u8; 4]) -> Result<(), Nonsense> {
        let flags = u32::from_be_bytes(flags);
        if flags & !u32::from(FIXED_NEWSTYLE | NO_ZEROES) != 0 {
            return Err(Nonsense("unknown flags"));
        }
        self.no_zeroes = flags & u32::from(NO_ZEROES) != 0;
        Ok(())
    }

    /// Number of an option and length of its data.
    pub fn header(header: &[u8; OPTION_HEADER_BYTES]) -> Result<(u32, u32), Nonsense> {
        if number::<8>(header, 0) != OPTION_MAGIC {
            return Err(Nonsense("no option"));
        }
        Ok((number::<4>(header, 8) as u32, number::<4>(header, 12) as u32))
    }

    /// An option whose data is longer than [`OPTION_BYTES_MAX`], and was skipped.
    pub fn too_long(&self, option: u32, out: &mut Vec<u8>) -> Next {
        if option == EXPORT_NAME {
            return Next::End;
        }
        refuse(option, ERR_TOO_BIG, "that is too long", out)
    }

    /// TLS is there: what was said before does not count.
    pub fn secured(&mut self) {
        self.secure = true;
        self.structured = false;
        self.allocation_of = None;
    }

    /// An option with its data; the reply goes to `out`.
    pub fn option(
        &mut self,
        option: u32,
        data: &[u8],
        all: &dyn Exports,
        out: &mut Vec<u8>,
    ) -> Next {
        if self.tls_required && !self.secure && !matches!(option, STARTTLS | ABORT) {
            // EXPORT_NAME has no reply that could say so.
            return if option == EXPORT_NAME {
                Next::End
            } else {
                refuse(option, ERR_TLS_REQD, "this server speaks TLS only", out)
            };
        }
        match option {
            EXPORT_NAME => self.export_name(data, all, out),
            ABORT => {
                reply(option, ACK, &[], out);
                Next::End
            }
            LIST | STARTTLS | STRUCTURED_REPLY if !data.is_empty() => {
                refuse(option, ERR_INVALID, "this option has no data", out)
            }
            LIST => {
                for name in all.names() {
                    reply(option, SERVER, &[&length(&name), name.as_bytes()], out);
                }
                acknowledge(option, out)
            }
            STARTTLS if self.secure => refuse(option, ERR_INVALID, "TLS is there already", out),
            STARTTLS if !self.tls_required => {
                refuse(option, ERR_POLICY, "this server has no certificate", out)
            }
            STARTTLS => {
                reply(option, ACK, &[], out);
                Next::StartTls
            }
            STRUCTURED_REPLY => {
                self.structured = true;
                acknowledge(option, out)
            }
            INFO | GO => self.info(option, data, all, out),
            LIST_META_CONTEXT | SET_META_CONTEXT => self.meta_context(option, data, all, out),
            _ => refuse(option, ERR_UNSUP, "this server does not know that option", out),
        }
    }

    fn export_name(&self, data: &[u8], all: &dyn Exports, out: &mut Vec<u8>) -> Next {
        let Some((name, device)) = str::from_utf8(data).ok().and_then(|name| all.find(name)) else {
            return Next::End;
        };
        let terms = self.terms(&name, &*device);
        out.extend(terms.bytes.to_be_bytes());
        out.extend(transmission_flags(&terms).to_be_bytes());
        if !self.no_zeroes {
            out.extend([0; 124]);
        }
        Next::Transmit(Chosen { name, device, terms })
    }

    fn info(&self, option: u32, data: &[u8], all: &dyn Exports, out: &mut Vec<u8>) -> Next {
        let mut rest = data;
        let asked = (|| {
            let name = text(&mut rest)?;
            let count = take::<2>(&mut rest)? as usize;
            let asked: Vec<u16> =
                (0..count).map_while(|_| take::<2>(&mut rest)).map(|info| info as u16).collect();
            (asked.len() == count && rest.is_empty()).then_some((name, asked))
        })();
        let Some((name, asked)) = asked else {
            return refuse(option, ERR_INVALID, "that cannot be read", out);
        };
        let Some((name, device)) = all.find(name) else {
            return refuse(option, ERR_UNKNOWN, "there is no such export", out);
        };
        let terms = self.terms(&name, &*device);
        let flags = transmission_flags(&terms).to_be_bytes();
        let info = |info: u16| info.to_be_bytes();
        let export = [&info(INFO_EXPORT)[..], &terms.bytes.to_be_bytes(), &flags];
        reply(option, REP_INFO, &export, out);
        if asked.contains(&INFO_NAME) {
            reply(option, REP_INFO, &[&info(INFO_NAME), name.as_bytes()], out);
        }
        if asked.contains(&INFO_BLOCK_SIZE) {
            let sizes = BLOCK_SIZES.map(u32::to_be_bytes);
            let parts = [&info(INFO_BLOCK_SIZE)[..], &sizes[0], &sizes[1], &sizes[2]];
            reply(option, REP_INFO, &parts, out);
        }
        reply(option, ACK, &[], out);
        if option == GO { Next::Transmit(Chosen { name, device, terms }) } else { Next::Option }
    }

    fn meta_context(
        &mut self,
        option: u32,
        data: &[u8],
        all: &dyn Exports,
        out: &mut Vec<u8>,
    ) -> Next {
        let set = option == SET_META_CONTEXT;
        if set {
            self.allocation_of = None;
        }
        if !self.structured {
            return refuse(option, ERR_INVALID, "structured replies come first", out);
        }
        let mut rest = data;
        let asked = (|| {
            let name = text(&mut rest)?;
            let count = take::<4>(&mut rest)? as usize;
            // Each query takes bytes of `rest`: a count that lies ends at once.
            let queries: Vec<&str> = (0..count).map_while(|_| text(&mut rest)).collect();
            (queries.len() == count && rest.is_empty()).then_some((name, queries))
        })();
        let Some((name, queries)) = asked else {
            return refuse(option, ERR_INVALID, "that cannot be read", out);
        };
        let Some((name, _)) = all.find(name) else {
            return refuse(option, ERR_UNKNOWN, "there is no such export", out);
        };
        let wanted = queries.contains(&ALLOCATION)
            || !set && (queries.is_empty() || queries.contains(&"base:"));
        if wanted {
            let id = if set { ALLOCATION_ID } else { 0 };
            let parts = [&id.to_be_bytes()[..], ALLOCATION.as_bytes()];
            reply(option, META_CONTEXT, &parts, out);
        }
        if set && wanted {
            self.allocation_of = Some(name);
        }
        acknowledge(option, out)
    }

    fn terms(&self, name: &str, device: &dyn Device) -> Terms {
        Terms {
            bytes: device.bytes(),
            read_only: device.read_only(),
            structured: self.structured,
            allocation: self.allocation_of.as_deref() == Some(name),
        }
    }
}

/// Everything that this server does. Many connections are one device: a flush is for all of them.
fn transmission_flags(terms: &Terms) -> u16 {
    const HAS_FLAGS: u16 = 1;
    const READ_ONLY: u16 = 1 << 1;
    const FLUSH_AND_FUA: u16 = 1 << 2 | 1 << 3;
    const TRIM_AND_ZEROES: u16 = 1 << 5 | 1 << 6;
    const DF: u16 = 1 << 7;
    const MULTI_CONN: u16 = 1 << 8;
    const CACHE: u16 = 1 << 10;
    const FAST_ZERO: u16 = 1 << 11;
    let writes = FLUSH_AND_FUA | TRIM_AND_ZEROES | FAST_ZERO;
    HAS_FLAGS
        | MULTI_CONN
        | CACHE
        | if terms.read_only { READ_ONLY } else { writes }
        | if terms.structured { DF } else { 0 }
}

fn acknowledge(option: u32, out: &mut Vec<u8>) -> Next {
    reply(option, ACK, &[], out);
    Next::Option
}

fn refuse(option: u32, error: u32, why: &str, out: &mut Vec<u8>) -> Next {
    reply(option, error, &[why.as_bytes()], out);
    Next::Option
}

fn reply(option: u32, kind: u32, parts: &[&[u8]], out: &mut Vec<u8>) {
    let bytes: usize = parts.iter().map(|part| part.len()).sum();
    out.extend(REPLY_MAGIC.to_be_bytes());
    out.extend(option.to_be_bytes());
    out.extend(kind.to_be_bytes());
    out.extend((bytes as u32).to_be_bytes());
    parts.iter().for_each(|part| out.extend(*part));
}

fn length(name: &str) -> [u8; 4] {
    (name.len() as u32).to_be_bytes()
}

/// The number of `N` bytes at the beginning, taken off.
fn take<const N: usize>(rest: &mut &[u8]) -> Option<u64> {
    let (first, after) = rest.split_at_checked(N)?;
    *rest = after;
    Some(number::<N>(first, 0))
}

/// The string with its length before it, taken off.
fn text<'a>(rest: &mut &'a [u8]) -> Option<&'a str> {
    let bytes = take::<4>(rest)? as usize;
    let (first, after) = rest.split_at_checked(bytes)?;
    *rest = after;
    if bytes > NAME_BYTES_MAX { None } else { str::from_utf8(first).ok() }
}
