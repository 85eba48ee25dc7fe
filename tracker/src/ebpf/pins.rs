//! Loads, pins, finds again and removes the programs and maps of one volume.
//!
//! The header's first word is written when all is pinned and attached, and zeroed before the first
//! pin is removed: a kill in between leaves what [`open`] refuses and [`remove`] clears away. A
//! whole set stays whole while its bitmaps are replaced by larger ones ([`crate::grow`]). Pins of a
//! newer version are neither adopted nor removed.

use super::mapping::Mapping;
use super::{NewerPins, Options};
use crate::bitmap::{leaf_words, summary_words};
use crate::device::Device;
use crate::grow::{self, Sets};
use crate::header::{self, Extent, HEADER_WORDS, Header, IDENTITY_WORDS};
use crate::marks::MarksMemory;
use crate::sync::Memory;
use aya::maps::{Array, ArrayOfMaps, Map, MapData, MapError};
use aya::programs::BtfTracePoint;
use aya::programs::links::{FdLink, PinnedLink};
use aya::{Btf, EbpfLoader, include_bytes_aligned};
use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Acquire;

/// Copies of each program, as in the BPF source.
pub(super) const COPIES: usize = 2;
/// Counters of a copy, as in the BPF source.
pub(super) const COUNTERS: usize = 16;
/// Programs of a copy: name in the BPF source and tracepoint.
const TRACEPOINTS: [(&str, &str); 3] =
    [("bio", "block_bio_complete"), ("request", "block_rq_complete"), ("queue", "block_bio_queue")];
pub(super) const PROGRAMS_PER_COPY: usize = TRACEPOINTS.len();
/// Programs without a copy: they remember requests, which no proof rests on.
const SINGLE: [(&str, &str); 2] = [("issue", "block_rq_issue"), ("requeue", "block_rq_requeue")];
/// Words of a slot, as in the BPF source.
pub(super) const SLOT_WORDS: usize = 2 + COPIES;
/// Most requests that are remembered, 32 bytes each; of a queue that has more, only these.
const SLOTS_MAX: u32 = 1 << 16;
const BTF: &str = "/sys/kernel/btf/vmlinux";
const BPFFS: &str = "/sys/fs/bpf";
/// Entries of the map that remembers extents; one where it is not used.
const STASH_ENTRIES: u32 = 16384;
/// Longest text of an error from the kernel.
const CAUSE_CHARS_MAX: usize = 500;
/// Set in the identity's flags when blocks are marked at completion.
const FLAG_COMPLETION_MARKS: u64 = 1;
/// The map of the requests that were issued.
const SLOTS: &str = "slots";
/// The map of the bitmaps that count, and the places of live bitmap and summary in it.
const BITMAPS: &str = "bitmaps";
const LIVE: u32 = 0;
const SUMMARY: u32 = 1;
/// Flags of a bitmap's map: BPF_F_MMAPABLE, and BPF_F_INNER_MAP, which lets one of another size
/// take its place.
const BITMAP_FLAGS: u32 = 1 << 10 | 1 << 12;

static OBJECT: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/tracker.bpf.o"));

/// What is to be tracked, and how.
pub(super) struct Plan {
    pub block_bytes: u32,
    sectors: u64,
    identity: [u64; IDENTITY_WORDS],
    disk: (u32, u32),
    first_sector: u64,
    pub bio_based: bool,
    /// Hardware queues of the disk, and requests of each that are remembered.
    queues: u32,
    depth: u32,
    /// The driver counts no discards, and no zeroes as writes.
    pub uncounted_zeroes: bool,
    options: Options,
}

impl Plan {
    pub fn new(device: &Device, block_bytes: u32, options: Options) -> Result<Self, String> {
        let number = |major: u32, minor: u32| u64::from(major) << 32 | u64::from(minor);
        let (boot_low, boot_high) = device.boot_id.split_at(8);
        let half =
            |bytes: &[u8]| bytes.iter().rev().fold(0, |sum, byte| sum << 8 | u64::from(*byte));
        let flags = if options.completion_marks { FLAG_COMPLETION_MARKS } else { 0 };
        let bio_based = is_bio_based(device)?;
        let (queues, depth) = if bio_based { (1, 0) } else { requests(device) };
        Ok(Self {
            block_bytes,
            sectors: device.size_bytes >> 9,
            identity: [
                number(device.major, device.minor),
                number(device.disk.0, device.disk.1),
                device.diskseq,
                0, // its size may change: the header's extent has it
                half(boot_low),
                half(boot_high),
                u64::from(block_bytes) | flags << 32,
                device.disk_offset_bytes,
            ],
            disk: (device.disk.0, device.disk.1),
            first_sector: device.disk_offset_bytes >> 9,
            bio_based,
            queues,
            depth,
            uncounted_zeroes: disk_name(device).starts_with("zram"),
            options,
        })
    }

    /// Number of blocks.
    pub fn blocks(&self) -> u64 {
        Extent { sectors: self.sectors, set: 0 }.blocks(self.block_bytes)
    }
}

/// Maps of fixed size, and their words.
const FIXED_MAPS: [(&str, usize); 2] = [("header", HEADER_WORDS), ("counters", COPIES * COUNTERS)];

/// The maps of a set of bitmaps, and their words.
fn bitmap_maps(extent: Extent, block_bytes: u32) -> [(String, usize); 3] {
    let blocks = extent.blocks(block_bytes);
    let named = |name: &str, words| (format!("{name}{}", extent.set), words);
    [
        named("live", leaf_words(blocks)),
        named("summary", summary_words(blocks)),
        named("taken", leaf_words(blocks)),
    ]
}

/// Devices without hardware queues end bios, not requests.
fn is_bio_based(device: &Device) -> Result<bool, String> {
    let bio_based = !device.disk_sysfs().join("mq").exists();
    if bio_based && disk_name(device).starts_with("nvme") {
        // Its bios end as requests of the paths below, under other device numbers.
        return Err("several NVMe paths lie below it, and its writes end there: it can only be \
                    compared, or tracked as an LVM volume on top of it"
            .into());
    }
    Ok(bio_based)
}

/// Hardware queues of a disk, and the numbers that its requests have in each: those of the driver,
/// or those of the scheduler, which may be more. What is not remembered is only not made up for.
fn requests(device: &Device) -> (u32, u32) {
    let disk = device.disk_sysfs();
    let number = |file: &Path| fs::read_to_string(file).ok()?.trim().parse::<u32>().ok();
    let entries = fs::read_dir(disk.join("mq")).into_iter().flatten().flatten();
    let tags: Vec<_> =
        entries.map(|queue| number(&queue.path().join("nr_tags")).unwrap_or(0)).collect();
    let scheduled = number(&disk.join("queue/nr_requests")).unwrap_or(0);
    let queues = u32::try_from(tags.len()).unwrap_or(u32::MAX).clamp(1, SLOTS_MAX);
    let depth = tags.into_iter().fold(scheduled, u32::max).min(SLOTS_MAX / queues);
    (queues, depth)
}

fn disk_name(device: &Device) -> std::borrow::Cow<'_, str> {
    device.disk.2.file_name().unwrap_or_default().to_string_lossy()
}

/// A pinned set, opened.
pub(super) struct Pinned {
    pub memory: MarksMemory<std::sync::atomic::AtomicU64>,
    pub counters: Mapping,
    /// [`SLOT_WORDS`] a request.
    pub slots: Mapping,
    /// In the order of [`program_names`].
    pub programs: Vec<BtfTracePoint>,
}

/// All programs: name and tracepoint, copy by copy, then those without a copy.
fn program_names() -> impl Iterator<Item = (String, &'static str)> {
    let copied = (0..COPIES).flat_map(|copy| {
        TRACEPOINTS.map(|(name, tracepoint)| (format!("{name}{copy}"), tracepoint))
    });
    copied.chain(SINGLE.map(|(name, tracepoint)| (name.to_string(), tracepoint)))
}

/// Why nothing is adopted.
pub(super) enum NotAdopted {
    /// It is not whole, or belongs to another device: to be removed.
    Unfit(String),
    /// The device has fewer bytes than what is pinned is for.
    Shrunk(u64),
    /// The system refuses what growing needs; what is pinned goes on marking.
    Grow(String),
}

/// Opens a whole set that belongs to this plan, and lets it grow with the device.
pub(super) fn open(plan: &Plan, dir: &Path) -> Result<Pinned, NotAdopted> {
    let words = fixed(dir, "header").map_err(NotAdopted::Unfit)?;
    let header = Header::new(&words);
    let whole = header.is_whole() && header.is_sound();
    if !whole || header.identity() != plan.identity {
        let why = "what is pinned is not whole, or belongs to another device";
        return Err(NotAdopted::Unfit(why.into()));
    }
    let mut sets = PinnedSets { dir, block_bytes: plan.block_bytes };
    let extent = grow::grow(&mut sets, &words, plan.block_bytes, plan.sectors)?;
    if extent.sectors > plan.sectors {
        // What lay beyond is gone, and nobody knows what will lie there if it grows back.
        header.set_compare_due(true);
        return Err(NotAdopted::Shrunk(extent.sectors << 9));
    }
    let memory = sets.open(extent)?;
    opened(dir, memory).map_err(NotAdopted::Unfit)
}

fn opened(dir: &Path, memory: MarksMemory<AtomicU64>) -> Result<Pinned, String> {
    let mut programs = Vec::new();
    for (name, _) in program_names() {
        let program = BtfTracePoint::from_pin(dir.join(format!("prog_{name}")))
            .map_err(|cause| explain(&cause))?;
        let link = PinnedLink::from_pin(dir.join(format!("link_{name}")))
            .map_err(|cause| explain(&cause))?;
        let attached = FdLink::from(link).info().map_err(|cause| explain(&cause))?.program_id();
        if attached != program.info().map_err(|cause| explain(&cause))?.id() {
            return Err(format!("{name} is not the program that is attached"));
        }
        programs.push(program);
    }
    let slots = MapData::from_pin(dir.join(SLOTS)).map_err(|cause| explain(&cause))?;
    let words = slots.info().map_err(|cause| explain(&cause))?.max_entries() as usize * SLOT_WORDS;
    let slots =
        Mapping::new(slots.fd().as_fd(), words).map_err(|cause| format!("map {SLOTS}: {cause}"))?;
    Ok(Pinned { memory, counters: fixed(dir, "counters")?, slots, programs })
}

fn fixed(dir: &Path, name: &str) -> Result<Mapping, String> {
    let words = FIXED_MAPS.iter().find(|map| map.0 == name).map_or(0, |map| map.1);
    mapped(dir, name, words)
}

fn mapped(dir: &Path, name: &str, words: usize) -> Result<Mapping, String> {
    let map = MapData::from_pin(dir.join(name)).map_err(|cause| explain(&cause))?;
    let entries = map.info().map_err(|cause| explain(&cause))?.max_entries() as usize;
    if entries != words {
        return Err(format!("map {name} has {entries} entries, not {words}"));
    }
    Mapping::new(map.fd().as_fd(), words).map_err(|cause| format!("map {name}: {cause}"))
}

/// The sets of bitmaps below a pin folder.
struct PinnedSets<'a> {
    dir: &'a Path,
    block_bytes: u32,
}

impl PinnedSets<'_> {
    fn bitmaps(&self) -> Result<ArrayOfMaps<MapData, Array<MapData, u64>>, MapError> {
        Map::from_map_data(MapData::from_pin(self.dir.join(BITMAPS))?)?.try_into()
    }

    fn bitmap(&self, name: &str) -> Result<Array<MapData, u64>, MapError> {
        Map::from_map_data(MapData::from_pin(self.dir.join(name))?)?.try_into()
    }
}

impl Sets<AtomicU64> for PinnedSets<'_> {
    type Error = NotAdopted;

    fn make(&mut self, extent: Extent) -> Result<(), NotAdopted> {
        self.remove(extent.set)?;
        for (name, words) in bitmap_maps(extent, self.block_bytes) {
            let entries = u32::try_from(words).map_err(|_| {
                NotAdopted::Grow("too many blocks: a larger block is needed".into())
            })?;
            let made = Array::<MapData, u64>::create(entries, BITMAP_FLAGS)
                .map_err(|cause| NotAdopted::Grow(explain(&cause)))?;
            let pinned = made.pin(self.dir.join(name));
            pinned.map_err(|cause| NotAdopted::Grow(explain(&cause)))?;
        }
        Ok(())
    }

    fn open(&self, extent: Extent) -> Result<MarksMemory<AtomicU64>, NotAdopted> {
        let [live, summary, taken] = bitmap_maps(extent, self.block_bytes)
            .map(|(name, words)| mapped(self.dir, &name, words).map_err(NotAdopted::Unfit));
        Ok(MarksMemory {
            header: Memory::new(fixed(self.dir, "header").map_err(NotAdopted::Unfit)?),
            live: Memory::new(live?),
            summary: Memory::new(summary?),
            taken: Memory::new(taken?),
        })
    }

    /// The kernel waits, at each replacement of an inner map and before the call returns, until
    /// all programs that were running have ended (`maybe_wait_bpf_programs`): so the second call
    /// also ends those that saw the new live bitmap with the old summary.
    fn switch(&mut self, extent: Extent) -> Result<(), NotAdopted> {
        let switch = || -> Result<(), MapError> {
            let mut bitmaps = self.bitmaps()?;
            bitmaps.set(LIVE, &self.bitmap(&format!("live{}", extent.set))?, 0)?;
            bitmaps.set(SUMMARY, &self.bitmap(&format!("summary{}", extent.set))?, 0)
        };
        switch().map_err(|cause| NotAdopted::Grow(explain(&cause)))
    }

    fn remove(&mut self, set: usize) -> Result<(), NotAdopted> {
        for (name, _) in bitmap_maps(Extent { sectors: 0, set }, self.block_bytes) {
            match fs::remove_file(self.dir.join(&name)) {
                Err(cause) if cause.kind() != io::ErrorKind::NotFound => {
                    return Err(NotAdopted::Grow(format!("{name}: {cause}")));
                }
                _ => {}
            }
        }
        Ok(())
    }
}

/// Loads, pins and attaches a new set; a compare is due from its first moment.
pub(super) fn create(plan: &Plan, dir: &Path) -> Result<(), String> {
    fs::create_dir_all(dir).map_err(|cause| format!("{}: {cause}", dir.display()))?;
    let mut object = load(plan)?;
    for name in [FIXED_MAPS[0].0, FIXED_MAPS[1].0, SLOTS, BITMAPS] {
        let map = object.map(name).ok_or_else(|| format!("no map {name}"))?;
        map.pin(dir.join(name)).map_err(|cause| explain(&cause))?;
    }
    let extent = Extent { sectors: plan.sectors, set: 0 };
    let mut sets = PinnedSets { dir, block_bytes: plan.block_bytes };
    sets.make(extent).and_then(|()| sets.switch(extent)).map_err(|error| error.to_string())?;
    let words = fixed(dir, "header")?;
    let header = Header::new(&words);
    header.set_extent(extent);
    header.set_bound(extent.sectors);
    header.set_identity(plan.identity);
    header.set_compare_due(true);
    let btf = Btf::from_sys_fs().map_err(|cause| explain(&cause))?;
    for (name, tracepoint) in program_names() {
        let program = program(&mut object, &name)?;
        program.load(tracepoint, &btf).map_err(|cause| explain(&cause))?;
        program.pin(dir.join(format!("prog_{name}"))).map_err(|cause| explain(&cause))?;
        let id = program.attach().map_err(|cause| explain(&cause))?;
        let link = program.take_link(id).map_err(|cause| explain(&cause))?;
        let link = FdLink::from(link);
        link.pin(dir.join(format!("link_{name}"))).map_err(|cause| explain(&cause))?;
    }
    set_whole(dir, true).map_err(|cause| cause.to_string())
}

impl std::fmt::Display for NotAdopted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Unfit(why) | Self::Grow(why) => f.write_str(why),
            Self::Shrunk(bytes) => write!(f, "it had {bytes} bytes"),
        }
    }
}

/// What a newer Secondsite pinned here. Of its header only the first word is looked at.
pub(super) fn newer(dir: &Path) -> Option<NewerPins> {
    let map = MapData::from_pin(dir.join("header")).ok()?;
    let words = Mapping::new(map.fd().as_fd(), 1).ok()?;
    let found = header::newer(words[0].load(Acquire))?;
    Some(NewerPins { dir: dir.to_path_buf(), found, known: header::VERSION })
}

/// Removes a set, whole or not. The programs are detached when their links go.
pub(super) fn remove(dir: &Path) -> io::Result<()> {
    if !dir.exists() {
        return Ok(());
    }
    if let Some(newer) = newer(dir) {
        return Err(io::Error::other(newer));
    }
    // Fails only if there is no header, and without one nothing can be adopted.
    let _ = set_whole(dir, false);
    let mut names: Vec<PathBuf> = fs::read_dir(dir)?
        .map(|entry| entry.map(|entry| entry.path()))
        .collect::<io::Result<_>>()?;
    // By name: links go before programs; the maps are kept alive by the programs.
    names.sort();
    for name in &names {
        fs::remove_file(name)?;
    }
    fs::remove_dir(dir)
}

fn set_whole(dir: &Path, whole: bool) -> io::Result<()> {
    let map = MapData::from_pin(dir.join("header")).map_err(io::Error::other)?;
    let words = Mapping::new(map.fd().as_fd(), HEADER_WORDS)?;
    Header::new(&words).set_whole(whole);
    Ok(())
}

fn load(plan: &Plan) -> Result<aya::Ebpf, String> {
    let flag = |set: bool| u32::from(set);
    let bio_based = flag(plan.bio_based);
    let uncounted_zeroes = flag(plan.uncounted_zeroes);
    let completion_marks = flag(plan.options.completion_marks);
    let block_shift = plan.block_bytes.trailing_zeros();
    let mut loader = EbpfLoader::new();
    loader
        .override_global("cfg_major", &plan.disk.0, true)
        .override_global("cfg_minor", &plan.disk.1, true)
        .override_global("cfg_first", &plan.first_sector, true)
        .override_global("cfg_block_shift", &block_shift, true)
        .override_global("cfg_bio_based", &bio_based, true)
        .override_global("cfg_uncounted_zeroes", &uncounted_zeroes, true)
        .override_global("cfg_depth", &plan.depth, true)
        .override_global("cfg_completion_marks", &completion_marks, true)
        .map_max_entries(SLOTS, (plan.queues * plan.depth).max(1))
        .map_max_entries("stash", if plan.bio_based { STASH_ENTRIES } else { 1 });
    loader.load(OBJECT).map_err(|cause| explain(&cause))
}

fn program<'a>(object: &'a mut aya::Ebpf, name: &str) -> Result<&'a mut BtfTracePoint, String> {
    let program = object.program_mut(name).ok_or_else(|| format!("no program {name}"))?;
    program.try_into().map_err(|cause: aya::programs::ProgramError| explain(&cause))
}

/// Loads the programs for a device that does not exist, and drops them again.
pub(super) fn try_load() -> Result<(), String> {
    if !Path::new(BTF).exists() {
        return Err(format!("the kernel has no type information ({BTF}; CONFIG_DEBUG_INFO_BTF)"));
    }
    let plan = Plan {
        block_bytes: 4096,
        sectors: 8,
        identity: [0; IDENTITY_WORDS],
        disk: (0, 0),
        first_sector: 0,
        bio_based: true,
        queues: 1,
        depth: 0,
        uncounted_zeroes: false,
        options: Options { completion_marks: true },
    };
    let needs = |cause: String| {
        format!(
            "the kernel does not take the programs (5.17 or later and root are needed): {cause}"
        )
    };
    let mut object = load(&plan).map_err(needs)?;
    let btf = Btf::from_sys_fs().map_err(|cause| explain(&cause))?;
    for (name, tracepoint) in program_names() {
        let loaded = program(&mut object, &name)?.load(tracepoint, &btf);
        loaded.map_err(|cause| needs(explain(&cause)))?;
    }
    Ok(())
}

/// Mounts bpffs at its usual place if it is not there, and checks that `dir` lies on it.
pub(super) fn ensure_bpffs(dir: &Path) -> Result<(), String> {
    use nix::sys::statfs::{BPF_FS_MAGIC, statfs};
    let is_bpffs = |path: &Path| statfs(path).is_ok_and(|fs| fs.filesystem_type() == BPF_FS_MAGIC);
    let root = Path::new(BPFFS);
    // Two processes must not mount it over each other's pins.
    let folder = File::open(root).map_err(|cause| format!("{BPFFS}: {cause}"))?;
    folder.lock().map_err(|cause| format!("{BPFFS}: lock: {cause}"))?;
    if !is_bpffs(root) {
        let flags = nix::mount::MsFlags::MS_NOSUID
            | nix::mount::MsFlags::MS_NODEV
            | nix::mount::MsFlags::MS_NOEXEC;
        nix::mount::mount(Some("bpf"), root, Some("bpf"), flags, Some("mode=700"))
            .map_err(|cause| format!("{BPFFS}: {cause}"))?;
    }
    match dir.ancestors().find(|above| above.exists()) {
        Some(above) if is_bpffs(above) => Ok(()),
        _ => Err(format!("{} does not lie on a BPF file system, as {BPFFS} is", dir.display())),
    }
}

/// The error with all its causes. The verifier tells a long story: its end says why.
fn explain(cause: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(cause), |cause| cause.source());
    let text = causes.map(|cause| cause.to_string()).collect::<Vec<_>>().join(": ");
    match text.char_indices().rev().nth(CAUSE_CHARS_MAX) {
        Some((at, _)) => format!("… {}", &text[at..]),
        None => text,
    }
}
