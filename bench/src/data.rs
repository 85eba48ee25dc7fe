//! What volumes hold, made from a seed: the same bytes for every contender.

use anyhow::Result;
use clap::ValueEnum;
use std::fs::File;
use std::os::unix::fs::FileExt;

/// Kinds of content.
#[derive(Debug, Clone, Copy, ValueEnum, PartialEq, Eq)]
pub enum Kind {
    /// Nothing compresses.
    Random,
    /// lz4 makes about half of it, as of many databases and file systems.
    Half,
    /// Words.
    Text,
    /// Never written: holes all through.
    Holes,
}

/// A small generator (xorshift64).
pub struct Random(u64);

impl Random {
    /// The same seed, the same numbers.
    pub fn seeded(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// The next number.
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// Fills `bytes`.
    pub fn fill(&mut self, kind: Kind, bytes: &mut [u8]) {
        const WORDS: [&[u8; 8]; 8] = [
            b"block   ",
            b"volume  ",
            b"epoch   ",
            b"cut id  ",
            b"journal ",
            b"replica ",
            b"point\n  ",
            b"of the  ",
        ];
        for (i, word) in bytes.chunks_mut(8).enumerate() {
            let next = self.next();
            let value = match kind {
                Kind::Random => next.to_le_bytes(),
                // Runs of 64 random bytes, then 64 that are alike.
                Kind::Half if i / 8 % 2 == 0 => next.to_le_bytes(),
                Kind::Half => [0x5a; 8],
                Kind::Text => *WORDS[(next >> 32) as usize % WORDS.len()],
                Kind::Holes => [0; 8],
            };
            word.copy_from_slice(&value[..word.len()]);
        }
    }
}

/// Fills a file or device of `bytes`.
pub fn fill(file: &File, kind: Kind, bytes: u64) -> Result<()> {
    if kind == Kind::Holes {
        return Ok(());
    }
    let mut random = Random::seeded(1);
    let mut chunk = vec![0; 1 << 20];
    let mut at = 0;
    while at < bytes {
        let count = (bytes - at).min(chunk.len() as u64) as usize;
        random.fill(kind, &mut chunk[..count]);
        file.write_all_at(&chunk[..count], at)?;
        at += count as u64;
    }
    file.sync_all()?;
    Ok(())
}

/// Rewrites `blocks` blocks of 4 KiB of a device: scattered evenly, or side by side from its middle.
pub fn dirty(file: &File, bytes: u64, blocks: u64, scattered: bool, seed: u64) -> Result<()> {
    const BLOCK_BYTES: u64 = 4096;
    let mut random = Random::seeded(seed);
    let mut block = [0; BLOCK_BYTES as usize];
    let all = bytes / BLOCK_BYTES;
    let step = if scattered { (all / blocks.max(1)).max(1) } else { 1 };
    let first = if scattered { 0 } else { (all - blocks) / 2 };
    for i in 0..blocks.min(all) {
        random.fill(Kind::Half, &mut block);
        file.write_all_at(&block, (first + i * step) * BLOCK_BYTES)?;
    }
    file.sync_all()?;
    Ok(())
}
