//! Which volumes a filter can be put under. Pure: judges what others have read.

use crate::dm::{Number, Target};
use std::path::PathBuf;

/// Why a volume is left as it is, and what to do instead.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Not a device of device-mapper.
    #[error("it is no device-mapper volume, so nothing can be put under it while it is in use")]
    NotDeviceMapper,
    /// It has no table.
    #[error("it has no table")]
    Empty,
    /// A target that writes state of its own.
    #[error("its table has a {kind} target, whose state ({state}) cannot be kept from two places")]
    SharedState {
        /// The target.
        kind: String,
        /// What it keeps.
        state: &'static str,
    },
    /// A target that the list does not name.
    #[error(
        "its table has a {kind} target, of which it is not known whether it may be there twice"
    )]
    UnknownTarget {
        /// The target.
        kind: String,
    },
    /// A key that was wiped.
    #[error("its table does not hold its key any more")]
    NoKey,
    /// A key that cannot be found again.
    #[error("its key is in a keyring that is not ours (LUKS2 puts it there)")]
    KeyInKeyring,
    /// No writes, so nothing to follow.
    #[error("it is read-only")]
    ReadOnly,
    /// Its own programs lie there.
    #[error("the root file system is on it")]
    Root,
    /// The filter may need memory to write memory out.
    #[error("the swap area {0} is on it")]
    Swap(PathBuf),
    /// Spliced before, by whatever name.
    #[error("it already leads through {0}")]
    AlreadyThrough(String),
    /// Somebody works on it.
    #[error("somebody else has suspended it, or loaded a table")]
    BeingChanged,
    /// LVM works on its group.
    #[error("LVM is changing its volume group {0}")]
    GroupLocked(String),
    /// Its table is not the one that was prepared.
    #[error("its table was replaced")]
    Replaced,
    /// Nothing was prepared under this name.
    #[error("no filter is prepared for it under this name")]
    NotPrepared,
    /// It is smaller than before.
    #[error("it has shrunk from {from} to {to} sectors")]
    Shrunk {
        /// Size that the filter serves, sectors.
        from: u64,
        /// Size now, sectors.
        to: u64,
    },
    /// The filter's device is not the volume's size.
    #[error("{through} has {found} sectors, and the volume {wanted}")]
    Size {
        /// The filter's device.
        through: PathBuf,
        /// Its size.
        found: u64,
        /// The size that it must have.
        wanted: u64,
    },
    /// The filter's device takes only larger blocks.
    #[error("{through} takes blocks of {found} bytes, and the volume is used with {wanted}")]
    BlockSize {
        /// The filter's device.
        through: PathBuf,
        /// Its block size.
        found: u32,
        /// That of the volume.
        wanted: u32,
    },
    /// It would lead to itself.
    #[error("{0} lies on the volume itself")]
    Circle(PathBuf),
    /// The name for the device below cannot be one.
    #[error("{0:?} is no name: 1 to 64 of A-Z a-z 0-9 . _ -")]
    Name(String),
    /// The device below is not one of ours.
    #[error("a device {0} exists that is not ours")]
    Foreign(String),
}

impl Refusal {
    /// What to do instead.
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::NotDeviceMapper => {
                "follow it by eBPF, or mount the filter's device in its place at the next downtime"
            }
            Self::SharedState { .. } | Self::UnknownTarget { .. } | Self::ReadOnly => {
                "follow it by eBPF, or protect the volume below it"
            }
            Self::Empty => "activate it first",
            Self::NoKey | Self::KeyInKeyring => {
                "protect the volume below it: what is replicated then is encrypted"
            }
            Self::Root | Self::Swap(_) => "follow it by eBPF",
            Self::AlreadyThrough(_) => "take that filter out first",
            Self::BeingChanged => {
                "try again when that is done; dmsetup info shows it, dmsetup clear drops what is loaded"
            }
            Self::GroupLocked(_) => "try again when that is done",
            Self::Replaced => "prepare it again with its new table; it must be compared",
            Self::NotPrepared => "put the filter in first",
            Self::Shrunk { .. } => "take the filter out, and put it in again",
            Self::Size { .. } | Self::BlockSize { .. } => {
                "start the filter with the size and the limits of the device below"
            }
            Self::Circle(_) => "let the filter serve the device below",
            Self::Name(_) => "choose another name",
            Self::Foreign(_) => "rename or remove that device",
        }
    }
}

/// Whether every target may be there twice, over the same disks.
pub fn may_be_doubled(targets: &[Target]) -> Result<(), Refusal> {
    if targets.is_empty() {
        return Err(Refusal::Empty);
    }
    targets.iter().try_for_each(|target| match target.kind.as_str() {
        // Where a sector lies is all that they know.
        "linear" | "striped" | "unstriped" | "error" | "zero" | "delay" => Ok(()),
        "crypt" => crypt(target.params.as_str()),
        kind => Err(match state_of(kind) {
            Some(state) => Refusal::SharedState { kind: kind.into(), state },
            None => Refusal::UnknownTarget { kind: kind.into() },
        }),
    })
}

fn state_of(kind: &str) -> Option<&'static str> {
    Some(match kind {
        "snapshot" | "snapshot-origin" | "snapshot-merge" => "which chunks were copied",
        "thin" | "thin-pool" => "which blocks are allocated",
        "cache" | "writecache" | "bcache" | "ebs" => "what it caches",
        "era" | "clone" | "log-writes" => "what was written",
        "raid" | "raid1" | "mirror" => "which legs are in step",
        "multipath" | "switch" => "which paths work",
        "integrity" | "verity" => "its checksums and their journal",
        "zoned" => "its zones",
        "vdo" => "its index",
        _ => return None,
    })
}

/// `CIPHER KEY …`: a key of its own in hex, or `:SIZE:TYPE:NAME` in a keyring.
fn crypt(params: &str) -> Result<(), Refusal> {
    let mut words = params.split(' ');
    let (cipher, key) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    match key {
        "" | "-" if !cipher.contains("null") => Err(Refusal::NoKey),
        _ => Ok(()),
    }
}

/// Whether `id` can be part of a device's name.
pub fn is_name(id: &str) -> bool {
    let fits = |letter: char| letter.is_ascii_alphanumeric() || "._-".contains(letter);
    (1..=64).contains(&id.len()) && id.chars().all(fits)
}

/// A new size may only be larger.
pub fn may_follow(from: u64, to: u64) -> Result<(), Refusal> {
    if to < from { Err(Refusal::Shrunk { from, to }) } else { Ok(()) }
}

/// What [`Refusal::Size`], [`Refusal::BlockSize`] and [`Refusal::Circle`] are about.
#[derive(Debug, Clone)]
pub struct Shape {
    /// Its number.
    pub number: Number,
    /// Its node.
    pub node: PathBuf,
    /// Its size.
    pub sectors: u64,
    /// Its logical block size.
    pub block_bytes: u32,
    /// Every device that it lies on, itself included.
    pub lies_on: Vec<Number>,
}

/// Whether `volume` can lead through `through` without anybody above noticing.
pub fn may_lead(volume: &Shape, through: &Shape) -> Result<(), Refusal> {
    if through.lies_on.contains(&volume.number) {
        return Err(Refusal::Circle(through.node.clone()));
    }
    if through.sectors != volume.sectors {
        return Err(Refusal::Size {
            through: through.node.clone(),
            found: through.sectors,
            wanted: volume.sectors,
        });
    }
    // A file system in use has chosen its block size by the volume's.
    if through.block_bytes > volume.block_bytes {
        return Err(Refusal::BlockSize {
            through: through.node.clone(),
            found: through.block_bytes,
            wanted: volume.block_bytes,
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{Number, Refusal, Shape, is_name, may_be_doubled, may_follow, may_lead};
    use crate::dm::{Params, Target};

    fn one(kind: &str, params: &str) -> Vec<Target> {
        let params = Params::new(params.into());
        vec![Target { start_sectors: 0, sectors: 8, kind: kind.into(), params }]
    }

    #[test]
    fn only_targets_without_state_are_doubled() {
        for (kind, params) in [
            ("linear", "8:16 0"),
            ("striped", "2 32 8:16 0 8:32 0"),
            ("zero", ""),
            ("error", ""),
            ("crypt", "aes-xts-plain64 00ff 0 8:16 0"),
            ("crypt", "cipher_null-ecb - 0 8:16 0"),
        ] {
            assert_eq!(may_be_doubled(&one(kind, params)), Ok(()), "{kind} {params}");
        }
        for kind in [
            "snapshot",
            "snapshot-origin",
            "snapshot-merge",
            "thin",
            "thin-pool",
            "cache",
            "era",
            "raid",
            "mirror",
            "multipath",
            "writecache",
            "integrity",
            "zoned",
            "vdo",
            "clone",
        ] {
            let refused = may_be_doubled(&one(kind, ""));
            assert!(
                matches!(&refused, Err(Refusal::SharedState { kind: found, .. }) if found == kind)
            );
            // Also behind one that is well.
            let both = [one("linear", "8:16 0"), one(kind, "")].concat();
            assert_eq!(may_be_doubled(&both), refused);
        }
        assert!(matches!(may_be_doubled(&one("new", "")), Err(Refusal::UnknownTarget { .. })));
        assert_eq!(
            may_be_doubled(&one("crypt", "aes-xts-plain64 - 0 8:16 0")),
            Err(Refusal::NoKey)
        );
        assert_eq!(may_be_doubled(&[]), Err(Refusal::Empty));
    }

    #[test]
    fn a_device_in_between_has_the_same_shape() {
        let number = |minor| Number { major: 253, minor };
        let shape = |minor, sectors, block_bytes| Shape {
            number: number(minor),
            node: format!("/dev/dm-{minor}").into(),
            sectors,
            block_bytes,
            lies_on: vec![number(minor)],
        };
        let volume = shape(0, 64, 512);
        assert_eq!(may_lead(&volume, &shape(1, 64, 512)), Ok(()));
        assert_eq!(may_lead(&shape(0, 64, 4096), &shape(1, 64, 512)), Ok(()));
        assert!(matches!(may_lead(&volume, &shape(1, 65, 512)), Err(Refusal::Size { .. })));
        assert!(matches!(may_lead(&volume, &shape(1, 63, 512)), Err(Refusal::Size { .. })));
        assert!(matches!(may_lead(&volume, &shape(1, 64, 4096)), Err(Refusal::BlockSize { .. })));
        let mut above = shape(1, 64, 512);
        above.lies_on.push(number(0));
        assert!(matches!(may_lead(&volume, &above), Err(Refusal::Circle(_))));
        assert!(matches!(may_lead(&volume, &volume), Err(Refusal::Circle(_))));
    }

    #[test]
    fn names_and_sizes() {
        assert!(is_name("vg0.pg-1_a") && !is_name("") && !is_name("a/b") && !is_name("a b"));
        assert!(!is_name(&"x".repeat(65)));
        assert_eq!(may_follow(8, 8), Ok(()));
        assert_eq!(may_follow(8, 7), Err(Refusal::Shrunk { from: 8, to: 7 }));
    }
}
