//! Little-endian reading and writing with every length checked first.

use crate::FormatError;

/// Reads fields in order; running out is an error that names `what`.
pub(crate) struct Reader<'a> {
    what: &'static str,
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    pub(crate) fn new(what: &'static str, bytes: &'a [u8]) -> Self {
        Self { what, rest: bytes }
    }

    pub(crate) fn take(&mut self, count: usize) -> Result<&'a [u8], FormatError> {
        let (head, rest) = self.rest.split_at_checked(count).ok_or(FormatError::Truncated {
            what: self.what,
            have: self.rest.len() as u64,
            need: count as u64,
        })?;
        self.rest = rest;
        Ok(head)
    }

    pub(crate) fn array<const N: usize>(&mut self) -> Result<[u8; N], FormatError> {
        Ok(self.take(N)?.try_into().expect("take returned N bytes"))
    }

    pub(crate) fn u16(&mut self) -> Result<u16, FormatError> {
        self.array().map(u16::from_le_bytes)
    }

    pub(crate) fn u32(&mut self) -> Result<u32, FormatError> {
        self.array().map(u32::from_le_bytes)
    }

    pub(crate) fn u64(&mut self) -> Result<u64, FormatError> {
        self.array().map(u64::from_le_bytes)
    }

    /// A version: only `known` is read. A higher one was written by a newer Secondsite, a lower
    /// one by nobody.
    pub(crate) fn version(&mut self, what: &'static str, known: u16) -> Result<(), FormatError> {
        match self.u16()? {
            found if found > known => Err(FormatError::Newer { what, found, known }),
            found if found < known => Err(FormatError::Inconsistent { what, why: "its version" }),
            _ => Ok(()),
        }
    }

    /// A count that must not exceed `limit`.
    pub(crate) fn count(&mut self, what: &'static str, limit: usize) -> Result<usize, FormatError> {
        let found = self.u32()?;
        if found as usize > limit {
            return Err(FormatError::TooLarge { what, found: found.into(), limit: limit as u64 });
        }
        Ok(found as usize)
    }

    pub(crate) fn rest(self) -> &'a [u8] {
        self.rest
    }

    /// Nothing may be left over.
    pub(crate) fn end(self) -> Result<(), FormatError> {
        if self.rest.is_empty() {
            Ok(())
        } else {
            Err(FormatError::Inconsistent { what: self.what, why: "bytes after its end" })
        }
    }
}
