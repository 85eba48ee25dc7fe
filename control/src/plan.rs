//! What `protect` would do: a pure function of inventory, protected volumes and request.
//!
//! Only devices of the agent's own inventory are ever chosen, and never two of which one lies on
//! the other. A request is planned whole or refused whole.

use crate::api::{InventoryDevice, PlannedVolume, ProtectRequest, TrackerChoice};
use crate::keep;
use crate::problem::{Refused, Result, exit};
use std::collections::HashMap;

/// Smallest and largest unit of tracking.
const BLOCK_BYTES_MIN: u32 = 4 << 10;
const BLOCK_BYTES_MAX: u32 = 1 << 20;
/// Volumes above this get the larger default unit.
const SMALL_VOLUME_BYTES_MAX: u64 = 4 << 40;
const LARGE_VOLUME_BLOCK_BYTES: u32 = 16 << 10;
/// Goals that make sense.
const GOAL_SECONDS_MAX: u64 = 7 * 24 * 3600;
/// Devices that one names at once.
const VOLUMES_MAX: usize = 1024;
/// Devices between a partition and what it lies on at last.
const DEPTH_MAX: usize = 16;

/// A volume that is protected already.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Taken {
    pub(crate) name: String,
    pub(crate) path: String,
    /// The reserve of its filter: a path.
    pub(crate) reserve: Option<String>,
}

/// One device that is to be protected.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Chosen {
    pub(crate) device: InventoryDevice,
    pub(crate) planned: PlannedVolume,
    /// (offset, length), bytes.
    pub(crate) excluded: Vec<(u64, u64)>,
}

/// The whole plan.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Plan {
    pub(crate) chosen: Vec<Chosen>,
    pub(crate) left_out: Vec<String>,
    /// The node of the device that becomes the reserve of all of them.
    pub(crate) reserve: Option<String>,
}

/// Plans, or says what is in the way.
pub(crate) fn plan(
    server: &str,
    inventory: &[InventoryDevice],
    taken: &[Taken],
    request: &ProtectRequest,
) -> Result<Plan> {
    check(request)?;
    let devices = Devices::new(inventory);
    let reserve = match &request.reserve {
        Some(wished) => Some(devices.reserve(server, wished, taken)?),
        None => None,
    };
    let reserves = taken.iter().filter_map(|taken| taken.reserve.as_deref());
    let mut reserves: Vec<&InventoryDevice> = reserves
        .filter_map(|path| inventory.iter().find(|device| device.path == path))
        .chain(reserve)
        .collect();
    reserves.dedup();
    let (chosen, left_out) = match &request.volumes[..] {
        [word] if word == "all" => devices.all(taken, &reserves)?,
        named => (devices.named(server, named, taken)?, Vec::new()),
    };
    for device in &chosen {
        if let Some(reserve) = reserves.iter().find(|r| devices.overlap(&device.name, &r.name)) {
            return Err(is_reserve(server, device, reserve));
        }
    }
    if chosen.is_empty() {
        return Err(Refused::conflict(
            exit::UNAVAILABLE,
            format!("{server} has nothing to protect: {}", left_out.join("; ")),
        ));
    }
    let chosen = chosen.into_iter().map(|device| choose(server, device, request));
    let reserve = reserve.map(|device| device.path.clone());
    Ok(Plan { chosen: chosen.collect::<Result<_>>()?, left_out, reserve })
}

fn check(request: &ProtectRequest) -> Result<()> {
    if let Err(error) = keep::parse(&request.keep) {
        return Err(Refused::usage(format!("keep {error}")).hint("--keep 24h,15d"));
    }
    if request.volumes.is_empty() || request.volumes.len() > VOLUMES_MAX {
        return Err(Refused::usage("no volume is named").hint("--volumes all"));
    }
    if !(1..=GOAL_SECONDS_MAX).contains(&request.goal_seconds) {
        return Err(Refused::usage("the goal must be from 1 s to 7 d").hint("--rpo 30s"));
    }
    let fits = |bytes: u32| {
        bytes.is_power_of_two() && (BLOCK_BYTES_MIN..=BLOCK_BYTES_MAX).contains(&bytes)
    };
    match request.block_bytes {
        Some(bytes) if !fits(bytes) => Err(Refused::usage(format!(
            "a block size of {bytes} bytes: it must be a power of two from 4 KiB to 1 MiB"
        ))
        .hint("--block-size 4KiB")),
        _ => Ok(()),
    }
}

/// An inventory and what lies on what in it.
struct Devices<'a> {
    inventory: &'a [InventoryDevice],
    by_name: HashMap<&'a str, &'a InventoryDevice>,
}

impl<'a> Devices<'a> {
    fn new(inventory: &'a [InventoryDevice]) -> Self {
        let by_name = inventory.iter().map(|device| (device.name.as_str(), device)).collect();
        Self { inventory, by_name }
    }

    /// The names of what a device lies on, nearest first.
    fn below(&self, name: &str) -> Vec<&'a str> {
        let mut below = Vec::new();
        let mut at = self.by_name.get(name);
        while let Some(device) = at.filter(|device| !device.parent.is_empty()) {
            if below.len() == DEPTH_MAX {
                break;
            }
            below.push(device.parent.as_str());
            at = self.by_name.get(device.parent.as_str());
        }
        below
    }

    /// Whether a write to one may be a write to the other.
    fn overlap(&self, one: &str, other: &str) -> bool {
        one == other || self.below(one).contains(&other) || self.below(other).contains(&one)
    }

    /// Whole devices first, then what lies on those that cannot be taken whole. Loop devices, and
    /// what lies on them, only by name.
    fn all(
        &self,
        taken: &[Taken],
        reserves: &[&InventoryDevice],
    ) -> Result<(Vec<&'a InventoryDevice>, Vec<String>)> {
        let is_loop = |name: &str| self.by_name.get(name).is_some_and(|d| d.kind == "loop");
        let mut candidates: Vec<(usize, &InventoryDevice)> = self
            .inventory
            .iter()
            .map(|device| (self.below(&device.name).len(), device))
            .filter(|(_, device)| {
                !is_loop(&device.name) && !self.below(&device.name).into_iter().any(is_loop)
            })
            .collect();
        candidates.sort_by_key(|(depth, device)| (*depth, &device.name));
        let mut chosen: Vec<&InventoryDevice> = Vec::new();
        let mut left_out = Vec::new();
        for (_, device) in candidates {
            let name = &device.name;
            if let Some(with) = taken.iter().find(|taken| self.overlap(name, &taken.name)) {
                // What lies on a protected device is protected with it and needs no word.
                if !self.below(name).contains(&with.name.as_str()) {
                    left_out.push(format!("{name}: {} is protected already", with.name));
                }
            } else if chosen.iter().any(|other| self.overlap(name, &other.name)) {
            } else if let Some(reserve) = reserves.iter().find(|r| self.overlap(name, &r.name)) {
                left_out.push(format!("{name}: {} is the reserve of the filter", reserve.name));
            } else if device.trackers.is_empty() || device.size_bytes == 0 {
                left_out.push(format!("{name}: {}", why_refused(device)));
            } else {
                chosen.push(device);
            }
        }
        if chosen.is_empty() && left_out.is_empty() {
            return Err(Refused::conflict(exit::UNAVAILABLE, "the server has no disk to protect")
                .hint("name loop devices by their path: --volumes /dev/loop3"));
        }
        Ok((chosen, left_out))
    }

    fn named(
        &self,
        server: &str,
        names: &[String],
        taken: &[Taken],
    ) -> Result<Vec<&'a InventoryDevice>> {
        let mut chosen: Vec<&InventoryDevice> = Vec::new();
        for name in names {
            let device = self
                .inventory
                .iter()
                .find(|device| device.path == *name || device.name == *name)
                .ok_or_else(|| self.no_such(server, name))?;
            if let Some(with) = taken.iter().find(|taken| self.overlap(&device.name, &taken.name)) {
                return Err(overlapping(server, device, with));
            }
            if chosen.contains(&device) {
                continue;
            }
            if let Some(other) = chosen.iter().find(|o| self.overlap(&device.name, &o.name)) {
                return Err(Refused::usage(format!(
                    "{} and {} overlap: one lies on the other",
                    device.path, other.path
                ))
                .hint("name one of them"));
            }
            chosen.push(device);
        }
        Ok(chosen)
    }

    /// The device that filters write to besides: nothing that is protected, or used.
    fn reserve(&self, server: &str, wished: &str, taken: &[Taken]) -> Result<&'a InventoryDevice> {
        let found = self.inventory.iter().find(|d| d.path == wished || d.name == wished);
        let device = found.ok_or_else(|| self.no_such(server, wished))?;
        let refused = |message: String| {
            Refused::conflict(exit::USAGE, message).hint("--reserve DEVICE, or leave it out")
        };
        if let Some(other) = taken.iter().filter_map(|taken| taken.reserve.as_ref()).next()
            && *other != device.path
        {
            return Err(refused(format!("{server} has a reserve already: {other}"))
                .hint(format!("--reserve {other}")));
        }
        if let Some(with) = taken.iter().find(|taken| self.overlap(&device.name, &taken.name)) {
            return Err(refused(format!(
                "{} of {server} cannot be the reserve: {} is protected, and one lies on the other",
                device.path, with.path
            )));
        }
        if !device.used_by.is_empty() || device.size_bytes == 0 {
            let why = match device.used_by.as_str() {
                "" => "it has no size".into(),
                used_by => format!("it is in use: {used_by}"),
            };
            return Err(refused(format!(
                "{} of {server} cannot be the reserve: {why}",
                device.path
            )));
        }
        Ok(device)
    }

    fn no_such(&self, server: &str, name: &str) -> Refused {
        let mut paths: Vec<&str> = self.inventory.iter().map(|d| d.path.as_str()).collect();
        paths.sort_unstable();
        Refused::usage(format!("{server} has offered no device {name:?}"))
            .hint(format!("it has offered: {}", paths.join(", ")))
    }
}

fn overlapping(server: &str, device: &InventoryDevice, taken: &Taken) -> Refused {
    let path = &device.path;
    let message = if device.name == taken.name {
        format!("{path} of {server} is protected already")
    } else {
        format!("{path} of {server} overlaps {}, which is protected already", taken.path)
    };
    Refused::conflict(exit::USAGE, message).hint(format!("secondsite status {server}"))
}

fn is_reserve(server: &str, device: &InventoryDevice, reserve: &InventoryDevice) -> Refused {
    let (path, of) = (&device.path, &reserve.path);
    let message = if path == of {
        format!("{path} of {server} cannot be protected: it is the reserve of the filter")
    } else {
        format!("{path} of {server} and {of}, the reserve of the filter, lie one on the other")
    };
    Refused::conflict(exit::USAGE, message).hint("name another device")
}

fn why_refused(device: &InventoryDevice) -> String {
    match (device.size_bytes, device.refused.as_str()) {
        (0, "") => "it has no size".to_owned(),
        (_, "") => "no tracker can follow it".to_owned(),
        (_, reason) => reason.to_owned(),
    }
}

fn choose(server: &str, device: &InventoryDevice, request: &ProtectRequest) -> Result<Chosen> {
    let unavailable = |message: String| Refused::conflict(exit::UNAVAILABLE, message);
    let path = &device.path;
    if device.trackers.is_empty() || device.size_bytes == 0 {
        let why = why_refused(device);
        return Err(unavailable(format!("{path} of {server} cannot be protected: {why}")));
    }
    let has = |tracker: &str| device.trackers.iter().any(|offered| offered == tracker);
    let tracker = match request.tracker {
        TrackerChoice::Auto => device.trackers[0].clone(),
        TrackerChoice::Ublk if has("ublk") => "ublk".to_owned(),
        TrackerChoice::Ebpf if has("ebpf") => "ebpf".to_owned(),
        TrackerChoice::Compare if has("compare") => "compare".to_owned(),
        wished => {
            let wished = match wished {
                TrackerChoice::Ublk => "ublk",
                TrackerChoice::Ebpf => "ebpf",
                TrackerChoice::Auto | TrackerChoice::Compare => "compare",
            };
            let why = why_refused(device);
            return Err(unavailable(format!("{path} of {server} cannot have {wished}: {why}"))
                .hint("--tracker auto"));
        }
    };
    if request.reserve.is_some() && tracker != "ublk" {
        let message = format!("--reserve is for a filter, and {path} of {server} has {tracker}");
        return Err(Refused::conflict(exit::USAGE, message).hint("--tracker ublk"));
    }
    let swap: &[_] = if request.include_swap { &[] } else { &device.swap };
    let block_bytes = request.block_bytes.unwrap_or(match device.size_bytes {
        ..=SMALL_VOLUME_BYTES_MAX => BLOCK_BYTES_MIN,
        _ => LARGE_VOLUME_BLOCK_BYTES,
    });
    let planned = PlannedVolume {
        name: device.name.clone(),
        path: path.clone(),
        size_bytes: device.size_bytes,
        tracker,
        block_bytes,
        skipped_swap: swap.iter().map(|(name, _, bytes)| (name.clone(), *bytes)).collect(),
    };
    let excluded = swap.iter().map(|(_, offset, bytes)| (*offset, *bytes)).collect();
    Ok(Chosen { device: device.clone(), planned, excluded })
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
