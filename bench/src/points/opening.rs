//! Opening a point of a large, sparse volume with a long history, up to the first byte that an NBD
//! client has read; nothing of the history is in the page cache.

use super::play::{self, BLOCK_BYTES, Source, VOLUME};
use super::{Row, percentiles};
use crate::data::{Kind, Random};
use anyhow::{Context, Result, ensure};
use secondsite::nbd::Server;
use secondsite::overlay::Overlay;
use secondsite::target::point::PointDevice;
use secondsite::target::points::{VolumeEpochs, complete_points, plan};
use secondsite::target::unpacked::Unpacked;
use secondsite_control::api::KeepPolicy;
use secondsite_format::ids::{Epoch, Generation};
use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

const VOLUME_BYTES: u64 = 1 << 40;
const BLOCKS: u64 = 4;

pub fn measure(folder: &Path, points: u64, opens: u64) -> Result<Vec<Row>> {
    let (mut source, keeper) = Source::begin(folder, VOLUME_BYTES, None)?;
    let mut random = Random::seeded(1);
    let mut written: Vec<Vec<u64>> = vec![Vec::new()];
    for epoch in 1..=points {
        // Half of them where an application writes again and again.
        let mut numbers: Vec<u64> = (0..BLOCKS)
            .map(|i| random.next() % if i % 2 == 0 { 1 << 14 } else { VOLUME_BYTES / BLOCK_BYTES })
            .collect();
        numbers.sort_unstable();
        numbers.dedup();
        let contents = play::blocks(&numbers, Kind::Half, &mut random)?;
        play::receive(&keeper, &source.epoch(&contents)?)?;
        written.push(numbers);
        play::gather(&keeper, &play::epochs(epoch), false)?;
    }
    let (runs, history_bytes) =
        (keeper.volume().runs().len(), play::history_bytes(&source.volume_folder())?);
    drop(keeper);
    play::evict(&source.volume_folder())?;
    let begun = Instant::now();
    let keeper = play::open(folder, VOLUME_BYTES)?;
    let opened = begun.elapsed().as_secs_f64();

    let server = Server::new(None)?;
    let socket = folder.join("nbd.sock");
    server.listen_unix(&socket)?;
    let policy = KeepPolicy { fine_seconds: 86_400, coarse_seconds: 15 * 86_400 };
    let (mut choosing, mut first, mut all) = (Vec::new(), Vec::new(), Vec::new());
    for open in 0..opens {
        let epoch = random.next() % points + 1;
        let of = &written[(random.next() % epoch + 1) as usize];
        let offset = of[random.next() as usize % of.len()] * BLOCK_BYTES;
        let scratch = folder.join(format!("scratch-{open}"));
        std::fs::create_dir(&scratch)?;
        play::evict(&source.volume_folder())?;
        let begun = Instant::now();
        // The point is looked for, then held: both choose among all.
        for _ in 0..2 {
            let epochs = keeper.volume().facts().collect();
            let volumes = [VolumeEpochs { volume: VOLUME, generation: Generation(1), epochs }];
            let found = complete_points(&volumes);
            let plan = plan(&found, &volumes, Some(&policy), &BTreeSet::new(), 0);
            ensure!(plan.points.len() as u64 == points, "a point is missing");
        }
        choosing.push(begun.elapsed().as_secs_f64());
        let view = keeper.view_at(Epoch(epoch)).map_err(play::refused)?.context("a point")?;
        let unpacked = Unpacked::new(&scratch, 1 << 30)?;
        let base = Arc::new(PointDevice::with_unpacked(view, unpacked));
        let overlay = Overlay::open(&scratch, base, &[0; 32], 1 << 30)?;
        let name = format!("point-{open}");
        server.add(&name, Arc::new(overlay))?;
        let served = Instant::now();
        let block = read(&socket, &name, offset)?;
        first.push(served.elapsed().as_secs_f64());
        all.push(begun.elapsed().as_secs_f64());
        ensure!(block.iter().any(|byte| *byte != 0), "the point lost a block");
        server.remove(&name);
        std::fs::remove_dir_all(&scratch)?;
    }
    server.stop();
    let mut rows = vec![
        Row::new("points in the history", points as f64, ""),
        Row::new("runs", runs as f64, ""),
        Row::new("bytes of a point in the store", history_bytes as f64 / points as f64, "B"),
        Row::goal("opening the volume, cold", opened, "s", 1.0),
    ];
    rows.extend(percentiles("asking to first byte", all, Some(1.0)));
    rows.extend(percentiles("of it: choosing the point", choosing, None));
    rows.extend(percentiles("of it: served to first byte", first, Some(0.010)));
    Ok(rows)
}

/// The first block that a client reads which has just connected.
fn read(socket: &Path, export: &str, offset: u64) -> Result<[u8; BLOCK_BYTES as usize]> {
    let mut stream = UnixStream::connect(socket)?;
    let mut greeting = [0; 18];
    stream.read_exact(&mut greeting)?;
    // Fixed newstyle without zeroes, then NBD_OPT_EXPORT_NAME.
    let mut option = 3u32.to_be_bytes().to_vec();
    option.extend_from_slice(b"IHAVEOPT");
    option.extend_from_slice(&1u32.to_be_bytes());
    option.extend_from_slice(&(export.len() as u32).to_be_bytes());
    option.extend_from_slice(export.as_bytes());
    stream.write_all(&option)?;
    let mut size_and_flags = [0; 10];
    stream.read_exact(&mut size_and_flags)?;
    let mut request = 0x2560_9513u32.to_be_bytes().to_vec();
    request.extend_from_slice(&[0; 4]); // no flags, a read
    request.extend_from_slice(&1u64.to_be_bytes());
    request.extend_from_slice(&offset.to_be_bytes());
    request.extend_from_slice(&(BLOCK_BYTES as u32).to_be_bytes());
    stream.write_all(&request)?;
    let mut reply = [0; 16];
    stream.read_exact(&mut reply)?;
    ensure!(reply[..8] == *b"\x67\x44\x66\x98\0\0\0\0", "the read failed: {reply:?}");
    let mut block = [0; BLOCK_BYTES as usize];
    stream.read_exact(&mut block)?;
    Ok(block)
}
