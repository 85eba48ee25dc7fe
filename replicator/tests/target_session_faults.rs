//! Attacks a session over a socket: garbage, truncation, oversize, repeats, forgery, a stranger, a
//! second session, a cut line in the middle of an epoch. The connection is refused or dropped, the
//! volume unharmed; after it, the same epoch goes through.

mod target_support;

use secondsite::target::session::{Peer, SessionHandle, serve};
use secondsite::target::site::{Site, SiteConfig};
use secondsite::target::store::Folders;
use secondsite::wire::{Connection, WireError};
use secondsite_control::api::{TargetAssignment, TargetServer, TargetVolume};
use secondsite_format::frame::{Frame, FrameHeader, FrameKind, HEADER_BYTES};
use secondsite_format::ids::{CutId, Epoch, Generation, ServerId, VolumeId};
use secondsite_format::message::{
    CopyState, Hello, Message, PROTOCOL, Refusal, RefusalCode, Reply, Request, Welcome,
};
use std::io::Write;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;
use target_support::{
    BLOCK, KEY, Put, SERVER, SYNC, Script, VOLUME, VOLUME_BYTES, chain_of, commit_frame,
    sync_frame, verify,
};

const MACHINE: [u8; 32] = [0x5a; 32];

fn assignment(version: u64, active: bool) -> TargetAssignment {
    let volume = TargetVolume {
        id: VOLUME.to_string(),
        name: "sda".into(),
        size_bytes: VOLUME_BYTES,
        block_bytes: BLOCK as u32,
    };
    let server = TargetServer {
        id: SERVER.to_string(),
        name: "db1".into(),
        machine: "5a".repeat(32),
        keep: None,
        active,
        volumes: vec![volume],
    };
    TargetAssignment { version, servers: vec![server] }
}

fn site(store: &Path) -> Arc<Site> {
    let config = SiteConfig {
        store: Box::new(Folders(store.to_owned())),
        devices: vec![],
        reserve_bytes: 0,
        memory_bytes: 4 << 20,
        verify,
        clock: Arc::default(),
    };
    let site = Arc::new(Site::new(config, assignment(1, true), Box::new(|| {})));
    site.work_now();
    site
}

fn hello() -> Hello {
    Hello {
        protocol: PROTOCOL,
        server: SERVER,
        machine: MACHINE,
        volume: VOLUME,
        volume_bytes: VOLUME_BYTES,
        block_bytes: BLOCK as u32,
        generation: Generation(1),
        acknowledged: (Epoch(0), CutId::NONE),
    }
}

struct Client {
    connection: Connection<UnixStream>,
    thread: Option<JoinHandle<()>>,
}

impl Client {
    fn connect(site: &Arc<Site>) -> Self {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let handle = SessionHandle::new(Box::new(theirs.try_clone().unwrap()));
        let site = site.clone();
        let peer = Peer { server: SERVER, key: KEY };
        let thread = std::thread::spawn(move || serve(&site, theirs, &handle, &peer));
        Self { connection: Connection::new(ours), thread: Some(thread) }
    }

    fn welcomed(site: &Arc<Site>) -> (Self, Welcome) {
        let mut client = Self::connect(site);
        client.connection.send_message(&hello()).unwrap();
        let welcome = client.connection.receive_message("welcome").unwrap();
        (client, welcome)
    }

    fn ask(&mut self, request: &Request) -> Reply {
        self.connection.send_message(request).unwrap();
        self.reply()
    }

    fn reply(&mut self) -> Reply {
        self.connection.receive_message("reply").unwrap()
    }

    fn send(&mut self, frame: &Frame) {
        self.connection.send(frame).unwrap();
    }

    /// The refusal that ends this connection.
    fn refused(&mut self) -> Refusal {
        match self.connection.receive() {
            Err(WireError::Refused(refusal)) => refusal,
            other => panic!("a refusal was due, not {other:?}"),
        }
    }

    fn raw(&self) -> &UnixStream {
        self.connection.stream()
    }

    fn copy(&mut self) {
        let request = Request::CopyBegin { sync: SYNC };
        assert_eq!(self.ask(&request), Reply::CopiedTo(0));
        self.send(&sync_frame(&[Put::Fill(0, 1), Put::Fill(5, 5)]));
        let request = Request::CopyDone { sync: SYNC };
        assert_eq!(self.ask(&request), Reply::CopiedTo(VOLUME_BYTES));
    }

    fn epoch(&mut self, script: &Script, previous: [u8; 32]) -> [u8; 32] {
        script.data().iter().for_each(|frame| self.send(frame));
        let commit = script.commit(previous);
        self.send(&commit);
        let chain = chain_of(&commit);
        let committed = Reply::Committed {
            generation: Generation(1),
            epoch: Epoch(script.epoch),
            cut_id: script.cut_id,
            chain,
        };
        assert_eq!(self.reply(), committed);
        chain
    }

    /// Closes and waits until the session has left the volume.
    fn close(mut self) {
        self.raw().shutdown(Shutdown::Both).unwrap();
        self.thread.take().unwrap().join().expect("a session never panics");
    }
}

fn one_block(epoch: u64) -> Script {
    Script::new(epoch, vec![(1, vec![Put::Fill(epoch, 0x70 + epoch as u8)])])
}

/// A site whose volume has its first copy and epoch 1.
fn protected() -> (tempfile::TempDir, Arc<Site>, [u8; 32]) {
    let store = tempfile::tempdir().unwrap();
    let site = site(store.path());
    let (mut client, welcome) = Client::welcomed(&site);
    assert_eq!((welcome.copy, welcome.reads_zero), (CopyState::Empty, true));
    client.copy();
    let chain = client.epoch(&one_block(1), [0; 32]);
    client.close();
    (store, site, chain)
}

/// The volume is as after epoch 1, and epoch 2 goes through.
fn unharmed(site: &Arc<Site>, chain: [u8; 32]) {
    let (mut client, welcome) = Client::welcomed(site);
    assert_eq!(welcome.durable, (Epoch(1), one_block(1).cut_id));
    assert_eq!(welcome.chain, chain);
    client.epoch(&one_block(2), chain);
    client.close();
}

#[test]
fn epochs_are_promoted_and_the_replica_equals_the_volume() {
    let (store, site, chain) = protected();
    unharmed(&site, chain);
    site.work_now();
    let report = site.report();
    let row = &report.volumes[0];
    assert_eq!((row.epoch, row.promoted_epoch, row.copied), (Some(2), Some(2), true));
    assert_eq!((row.journal_bytes, row.connected), (0, false));
    assert_eq!((&row.error, &row.refused), (&None, &None));
    assert!(row.replica.starts_with(store.path().to_str().unwrap()), "{}", row.replica);
    let mut model = vec![0; VOLUME_BYTES as usize];
    target_support::apply(&mut model, &target_support::content(&[Put::Fill(0, 1)]));
    target_support::apply(&mut model, &target_support::content(&[Put::Fill(5, 5)]));
    one_block(1).apply(&mut model);
    one_block(2).apply(&mut model);
    assert!(std::fs::read(&row.replica).unwrap() == model);
    let point = &report.points[0];
    assert_eq!((report.points.len(), point.consistency.as_str()), (1, "crash"));
    assert_eq!(point.epochs[&VOLUME.to_string()], 2);
}

#[test]
fn digests_see_journal_over_replica_and_zeros_for_nothing() {
    let (_store, site, _) = protected();
    let (mut client, _) = Client::welcomed(&site);
    let request = Request::Digests { offset: 0, bytes: VOLUME_BYTES, piece_bytes: BLOCK };
    let Reply::Digests(journaled) = client.ask(&request) else { panic!("digests were due") };
    site.work_now(); // promotes
    let Reply::Digests(promoted) = client.ask(&request) else { panic!("digests were due") };
    assert_eq!(journaled, promoted);
    let block = target_support::content(&[Put::Fill(1, 0x71)]);
    assert_eq!(journaled[1], *blake3::hash(block.payload()).as_bytes());
    assert_eq!(journaled[2], [0; 32]);
    client.send(&Frame::new(FrameHeader::message(FrameKind::Hello), vec![]));
    assert_eq!(client.refused().code, RefusalCode::Malformed);
    let (mut client, _) = Client::welcomed(&site);
    let beyond = Request::Digests { offset: BLOCK, bytes: VOLUME_BYTES, piece_bytes: BLOCK };
    client.connection.send_message(&beyond).unwrap();
    assert_eq!(client.refused().code, RefusalCode::Malformed);
}

#[test]
fn garbage_truncation_and_oversize_end_the_connection_only() {
    let (_store, site, chain) = protected();
    let frame = one_block(2).data().remove(0);
    let mut flipped = frame.body.clone();
    flipped[40] ^= 1;
    let mut oversize = *frame.header_bytes();
    oversize[8..12].copy_from_slice(&u32::MAX.to_le_bytes());
    let with_body = [frame.header_bytes().as_slice(), &flipped].concat();
    for bytes in [&[0xff; 200][..], &oversize, &with_body] {
        let (mut client, _) = Client::welcomed(&site);
        client.raw().write_all(bytes).unwrap();
        assert_eq!(client.refused().code, RefusalCode::Malformed);
        client.close();
        assert!(site.report().volumes[0].refused.is_some());
    }
    // Cut short: within the header, within the body, and before any hello.
    for count in [10, HEADER_BYTES + 50] {
        let (client, _) = Client::welcomed(&site);
        client.raw().write_all(&with_body[..count]).unwrap();
        client.close();
    }
    let client = Client::connect(&site);
    client.raw().write_all(&[0; 3]).unwrap();
    client.close();
    let mut client = Client::connect(&site);
    client.send(&frame);
    assert_eq!(client.refused().code, RefusalCode::Malformed);
    unharmed(&site, chain);
}

#[test]
fn only_the_next_frame_or_an_identical_repeat_is_taken() {
    let (_store, site, chain) = protected();
    let script = Script::new(2, vec![(1, vec![Put::Fill(2, 0x72)]), (1, vec![Put::Fill(3, 0x73)])]);
    let frames = script.data();
    // A gap, a wrong epoch, a wrong generation, an offset that is not the extent's.
    let mut wrong = vec![frames[1].clone()];
    for change in 0..3 {
        let mut header = frames[0].header;
        match change {
            0 => header.epoch = Epoch(3),
            1 => header.generation = Generation(2),
            _ => header.offset = 0,
        }
        wrong.push(Frame::new(header, frames[0].body.clone()));
    }
    for frame in &wrong {
        let (mut client, _) = Client::welcomed(&site);
        client.send(frame);
        let code = client.refused().code;
        assert!(matches!(code, RefusalCode::OutOfOrder | RefusalCode::Malformed), "{code:?}");
        client.close();
    }
    let (mut client, _) = Client::welcomed(&site);
    client.send(&frames[0]);
    client.send(&frames[0]); // the same again: ignored
    assert_eq!(client.ask(&Request::Barrier), Reply::Staged(Some((script.cut_id, 1))));
    let mut other = script.clone();
    other.frames[0].1 = vec![Put::Fill(2, 0x99)];
    client.send(&other.data()[0]); // its number again with other bytes
    assert_eq!(client.refused().code, RefusalCode::OutOfOrder);
    client.close();
    // The line was cut: the staged part is still there, and only the rest travels.
    let (mut client, welcome) = Client::welcomed(&site);
    assert_eq!(welcome.staged, Some((script.cut_id, 1)));
    client.send(&frames[1]);
    let commit = script.commit(chain);
    client.send(&commit);
    let reply = client.reply();
    client.send(&commit); // the answer was lost: the same answer
    assert_eq!(client.reply(), reply);
    client.close();
}

#[test]
fn another_cut_takes_the_place_of_the_staged_part() {
    let (_store, site, chain) = protected();
    let (mut client, _) = Client::welcomed(&site);
    let mut abandoned = one_block(2);
    abandoned.cut_id = CutId([0xab; 16]);
    client.send(&abandoned.data()[0]);
    client.epoch(&one_block(2), chain);
    abandoned.epoch = 3;
    client.send(&abandoned.data()[0]);
    let request = Request::GiveUp { cut_id: abandoned.cut_id };
    assert_eq!(client.ask(&request), Reply::Staged(None));
    client.close();
}

#[test]
fn a_manifest_that_is_not_proven_commits_nothing() {
    let (_store, site, chain) = protected();
    let script = one_block(2);
    let good = script.manifest(chain);
    let mut other_key = KEY;
    other_key[5] ^= 1;
    let mut forged = script.commit(chain);
    let byte = forged.body.len() - 20;
    forged.body[byte] ^= 1;
    let forged = Frame::new(forged.header, forged.body);
    let changed = |change: fn(&mut secondsite_format::manifest::Manifest)| {
        let mut manifest = good.clone();
        change(&mut manifest);
        commit_frame(manifest, &KEY)
    };
    let wrong = [
        ("another key", commit_frame(good.clone(), &other_key)),
        ("a changed byte", forged),
        ("chain", script.commit([1; 32])),
        ("frame count", changed(|manifest| manifest.frames = 2)),
        ("content", changed(|manifest| manifest.content = [1; 32])),
        ("server", changed(|manifest| manifest.server = ServerId([1; 16]))),
        ("size", changed(|manifest| manifest.volume_bytes += 512)),
        (
            "volume",
            changed(|manifest| {
                manifest.volume = VolumeId([1; 16]);
                manifest.members.push(VolumeId([1; 16]));
                manifest.members.sort();
            }),
        ),
    ];
    for (what, commit) in wrong {
        let (mut client, _) = Client::welcomed(&site);
        client.send(&script.data()[0]);
        client.send(&commit);
        let code = client.refused().code;
        assert!(matches!(code, RefusalCode::Unproven | RefusalCode::Malformed), "{what}: {code:?}");
        client.close();
    }
    unharmed(&site, chain);
}

#[test]
fn strangers_are_refused_with_their_reason() {
    let (_store, site, chain) = protected();
    type Spoil = fn(&mut Hello);
    let cases: [(Spoil, RefusalCode); 7] = [
        (|hello| hello.machine = [1; 32], RefusalCode::OtherMachine),
        (|hello| hello.server = ServerId([1; 16]), RefusalCode::NotAllowed),
        (|hello| hello.volume = VolumeId([1; 16]), RefusalCode::NotAllowed),
        (|hello| hello.protocol += 1, RefusalCode::Protocol),
        (|hello| hello.volume_bytes -= 4096, RefusalCode::Mismatch),
        (|hello| hello.block_bytes *= 2, RefusalCode::Mismatch),
        (|hello| hello.machine[31] ^= 1, RefusalCode::OtherMachine),
    ];
    for (change, code) in cases {
        let mut client = Client::connect(&site);
        let mut hello = hello();
        change(&mut hello);
        client.connection.send_message(&hello).unwrap();
        assert_eq!(client.refused().code, code);
        client.close();
    }
    let alarm = site.report().volumes[0].refused.clone().unwrap();
    assert!(alarm.contains("another machine") && alarm.contains("db1"), "{alarm}");
    unharmed(&site, chain);
    assert_eq!(site.report().volumes[0].refused, None);
}

/// A greeting of another protocol may have any form behind its number.
#[test]
fn a_newer_peer_is_told_both_versions() {
    let (_store, site, chain) = protected();
    let hello = hello().to_frame();
    let told = |frame: &[u8]| {
        let mut client = Client::connect(&site);
        std::io::Write::write_all(&mut client.connection.stream(), frame).unwrap();
        let refusal = client.refused();
        client.close();
        assert_eq!(refusal.code, RefusalCode::Protocol, "{refusal}");
        refusal.message
    };
    let mut body = hello.body.clone();
    body[0] = 2;
    body.extend([7; 40]);
    let longer = Frame::new(hello.header, body);
    let bytes = [longer.header_bytes().as_slice(), &longer.body].concat();
    let message = told(&bytes);
    assert!(message.contains("protocol 2") && message.contains("this target 1"), "{message}");
    let mut bytes = [hello.header_bytes().as_slice(), &hello.body].concat();
    bytes[4] = 2;
    let message = told(&bytes);
    assert!(message.contains("frame version 2") && message.contains("up to 1"), "{message}");
    unharmed(&site, chain);
}

#[test]
fn a_new_session_ends_the_older_one_first() {
    let (_store, site, chain) = protected();
    let (mut older, _) = Client::welcomed(&site);
    older.send(&one_block(2).data()[0]);
    assert_eq!(older.ask(&Request::Ping), Reply::Alive);
    let (mut newer, welcome) = Client::welcomed(&site);
    assert_eq!(older.refused().code, RefusalCode::Replaced);
    assert_eq!(welcome.staged, Some((one_block(2).cut_id, 1)));
    newer.epoch(&one_block(2), chain);
    newer.close();
    older.close();
}

#[test]
fn a_new_assignment_ends_sessions_that_it_does_not_allow() {
    let (_store, site, chain) = protected();
    let (mut client, _) = Client::welcomed(&site);
    site.assign(assignment(2, false));
    assert_eq!(client.refused().code, RefusalCode::NotAllowed);
    client.close();
    let mut client = Client::connect(&site);
    client.connection.send_message(&hello()).unwrap();
    assert_eq!(client.refused().code, RefusalCode::NotAllowed);
    client.close();
    assert_eq!(site.report().volumes[0].epoch, Some(1), "replica and points stay");
    site.assign(assignment(3, true));
    unharmed(&site, chain);
}

#[test]
fn a_first_copy_resumes_at_the_durable_cursor_or_starts_over() {
    let store = tempfile::tempdir().unwrap();
    let first = site(store.path());
    let (mut client, _) = Client::welcomed(&first);
    client.send(&sync_frame(&[Put::Fill(0, 1)]));
    assert_eq!(client.refused().code, RefusalCode::OutOfOrder, "it was not begun");
    client.close();
    let (mut client, _) = Client::welcomed(&first);
    client.ask(&Request::CopyBegin { sync: SYNC });
    client.send(&sync_frame(&[Put::Fill(0, 1), Put::Fill(1, 2)]));
    assert_eq!(client.ask(&Request::CopyFlush { upto: 2 * BLOCK }), Reply::CopiedTo(2 * BLOCK));
    client.send(&sync_frame(&[Put::Fill(9, 9)])); // beyond the cursor: void after the cut
    assert_eq!(client.ask(&Request::Ping), Reply::Alive);
    client.close();
    drop(first);
    let second = site(store.path());
    let (mut client, _) = Client::welcomed(&second);
    client.send(&sync_frame(&[Put::Fill(9, 9)]));
    assert_eq!(client.refused().code, RefusalCode::OutOfOrder, "this session did not resume it");
    client.close();
    let (mut client, welcome) = Client::welcomed(&second);
    let copy = CopyState::Copying { sync: SYNC, cursor: 2 * BLOCK };
    assert_eq!((welcome.copy, welcome.reads_zero), (copy, true));
    assert_eq!(client.ask(&Request::CopyBegin { sync: SYNC }), Reply::CopiedTo(2 * BLOCK));
    let replica = second.report().volumes[0].replica.clone();
    let mut model = vec![0; VOLUME_BYTES as usize];
    target_support::apply(
        &mut model,
        &target_support::content(&[Put::Fill(0, 1), Put::Fill(1, 2)]),
    );
    assert!(std::fs::read(&replica).unwrap() == model, "it reads as zero beyond the cursor");
    client.close();
    let (mut client, _) = Client::welcomed(&second);
    let other = secondsite_format::ids::SyncId([8; 16]);
    assert_eq!(client.ask(&Request::CopyBegin { sync: other }), Reply::CopiedTo(0));
    assert!(std::fs::read(&replica).unwrap().iter().all(|byte| *byte == 0));
    assert_eq!(client.ask(&Request::CopyDone { sync: other }), Reply::CopiedTo(VOLUME_BYTES));
    client.connection.send_message(&Request::CopyBegin { sync: SYNC }).unwrap();
    assert_eq!(client.refused().code, RefusalCode::OutOfOrder, "never over a complete copy");
    client.close();
}

#[test]
fn a_restarted_target_knows_everything_that_it_acknowledged() {
    let (store, first, chain) = protected();
    let (mut client, _) = Client::welcomed(&first);
    let script = one_block(2).fuzzy(); // stays in the journal
    let chain = client.epoch(&script, chain);
    client.close();
    first.work_now();
    drop(first);
    let second = site(store.path());
    let row = second.report().volumes.remove(0);
    assert_eq!((row.epoch, row.promoted_epoch), (Some(2), Some(1)));
    let points = second.report().points;
    let kinds: Vec<&str> = points.iter().map(|point| point.consistency.as_str()).collect();
    assert_eq!(kinds, ["crash", "fuzzy"]);
    assert!(!points[1].reason.is_empty());
    let (mut client, welcome) = Client::welcomed(&second);
    assert_eq!((welcome.durable, welcome.chain), ((Epoch(2), script.cut_id), chain));
    client.epoch(&one_block(3), chain);
    client.close();
    second.work_now();
    assert_eq!(second.report().volumes[0].promoted_epoch, Some(3));
}
