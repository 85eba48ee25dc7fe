//! A target in memory, as simple as one can be: what a volume is after each committed epoch. Loses
//! connections, and what was on them, at seeded moments.

use crate::world::{BLOCK, World};
use secondsite::source::seams::{Dial, Link, LinkError};
use secondsite_format::extent::{Content, ExtentKind};
use secondsite_format::frame::{Frame, FrameKind};
use secondsite_format::ids::{CutId, Epoch, Generation};
use secondsite_format::manifest::{Consistency, EpochDigest, Manifest, SignedManifest};
use secondsite_format::message::{CopyState, Hello, Message, PROTOCOL, Reply, Request, Welcome};
use std::sync::{Arc, Mutex, MutexGuard};

pub struct Staged {
    cut_id: CutId,
    frames: Vec<(u32, Content)>,
}

pub struct TargetState {
    /// The newest committed state, or what the first copy has brought.
    pub image: Vec<u8>,
    pub copy: CopyState,
    pub durable: (Epoch, CutId),
    chain: [u8; 32],
    staged: Option<Staged>,
    pub manifests: Vec<Manifest>,
    /// Percent of messages at which the connection breaks.
    pub breaks: u64,
    /// Percent of reconnects at which what was staged is lost.
    pub forgets: u64,
    session: u64,
    pub data_frames: u64,
    /// Somebody tampered with the image.
    pub damaged: bool,
}

/// The target of one volume.
pub struct FakeTarget {
    pub world: Arc<World>,
    pub index: usize,
    state: Mutex<TargetState>,
}

impl FakeTarget {
    pub fn new(world: &Arc<World>, index: usize) -> Arc<Self> {
        let bytes = world.state().disks[index].data.len();
        Arc::new(Self {
            world: world.clone(),
            index,
            state: Mutex::new(TargetState {
                image: vec![0; bytes],
                copy: CopyState::Empty,
                durable: (Epoch(0), CutId::NONE),
                chain: [0; 32],
                staged: None,
                manifests: Vec::new(),
                breaks: 0,
                forgets: 0,
                session: 0,
                data_frames: 0,
                damaged: false,
            }),
        })
    }

    pub fn state(&self) -> MutexGuard<'_, TargetState> {
        self.state.lock().unwrap()
    }

    fn breaks(&self) -> bool {
        let percent = self.state().breaks;
        self.world.state().rng.chance(percent)
    }
}

impl TargetState {
    fn take(&mut self, frame: &Frame) {
        let bytes = self.image.len() as u64;
        let content = Content::decode(&frame.body, bytes).expect("a frame decodes");
        let header = frame.header;
        assert_eq!(header.offset, content.extents()[0].offset);
        if header.kind == FrameKind::SyncData {
            assert!(matches!(self.copy, CopyState::Copying { .. }));
            return apply(&mut self.image, &content);
        }
        self.data_frames += 1;
        assert_eq!(header.epoch, self.durable.0.next(), "the epoch follows");
        assert_eq!(self.copy, CopyState::Copied);
        let staged =
            self.staged.get_or_insert_with(|| Staged { cut_id: header.cut_id, frames: Vec::new() });
        assert_eq!(staged.cut_id, header.cut_id, "one cut is staged");
        assert_eq!(staged.frames.len(), header.seq as usize, "no gap in seq");
        assert!(header.pass > 0);
        staged.frames.push((header.pass, content));
    }

    fn staged(&self) -> Option<(CutId, u32)> {
        self.staged.as_ref().map(|staged| (staged.cut_id, staged.frames.len() as u32))
    }

    fn commit(&mut self, frame: &Frame, proof: &[u8]) -> Reply {
        let signed = SignedManifest::decode(&frame.body).expect("a manifest decodes");
        let manifest = &signed.manifest;
        let reply = |state: &Self| Reply::Committed {
            generation: Generation(1),
            epoch: state.durable.0,
            cut_id: state.durable.1,
            chain: state.chain,
        };
        if (manifest.epoch, manifest.cut_id) == self.durable {
            return reply(self);
        }
        assert_eq!(manifest.epoch, self.durable.0.next());
        assert_eq!(manifest.previous, self.chain);
        let none = Staged { cut_id: manifest.cut_id, frames: Vec::new() };
        let mut staged = self.staged.take().unwrap_or(none);
        assert_eq!(staged.cut_id, manifest.cut_id);
        let mut digest = EpochDigest::default();
        staged.frames.iter().for_each(|(_, content)| digest.add(&content.digest()));
        assert_eq!((digest.frames(), digest.finish()), (manifest.frames, manifest.content));
        staged.frames.sort_by_key(|(pass, _)| *pass);
        staged.frames.iter().for_each(|(_, content)| apply(&mut self.image, content));
        if manifest.consistency == Consistency::Crash && !self.damaged {
            let differs =
                self.image.chunks(BLOCK).zip(proof.chunks(BLOCK)).position(|(a, b)| a != b);
            assert_eq!(differs, None, "an exact point is the volume at its cut");
        }
        self.durable = (manifest.epoch, manifest.cut_id);
        self.chain = signed.chain_digest();
        self.manifests.push(signed.manifest);
        reply(self)
    }

    fn answer(&mut self, request: Request) -> Reply {
        match request {
            Request::Ping => Reply::Alive,
            Request::Barrier => Reply::Staged(self.staged()),
            Request::GiveUp { cut_id } => {
                self.staged.take_if(|staged| staged.cut_id == cut_id);
                Reply::Staged(self.staged())
            }
            Request::CopyBegin { sync } => match self.copy {
                CopyState::Copying { sync: known, cursor } if known == sync => {
                    Reply::CopiedTo(cursor)
                }
                _ => {
                    self.copy = CopyState::Copying { sync, cursor: 0 };
                    Reply::CopiedTo(0)
                }
            },
            Request::CopyFlush { upto } => {
                if let CopyState::Copying { cursor, .. } = &mut self.copy {
                    *cursor = upto;
                }
                Reply::CopiedTo(upto)
            }
            Request::CopyDone { .. } => {
                self.copy = CopyState::Copied;
                Reply::CopiedTo(self.image.len() as u64)
            }
            Request::Digests { offset, bytes, piece_bytes } => {
                let part = &self.image[offset as usize..(offset + bytes) as usize];
                let digest = |piece: &[u8]| {
                    if piece.iter().all(|byte| *byte == 0) {
                        [0; 32]
                    } else {
                        *blake3::hash(piece).as_bytes()
                    }
                };
                Reply::Digests(part.chunks(piece_bytes as usize).map(digest).collect())
            }
        }
    }
}

fn apply(image: &mut [u8], content: &Content) {
    for (extent, bytes) in content.parts() {
        let range = extent.offset as usize..extent.end() as usize;
        match extent.kind {
            ExtentKind::Data => image[range].copy_from_slice(bytes),
            ExtentKind::Zero | ExtentKind::Discard => image[range].fill(0),
        }
    }
}

/// Dials it.
pub struct FakeDial(pub Arc<FakeTarget>);

impl Dial for FakeDial {
    fn dial(&mut self, hello: &Hello) -> Result<(Box<dyn Link>, Welcome), LinkError> {
        let target = &self.0;
        if target.breaks() {
            return Err(LinkError::Lost("refused".into()));
        }
        let forgets = target.state().forgets;
        let forget = target.world.state().rng.chance(forgets);
        let mut state = target.state();
        assert_eq!(hello.volume_bytes, state.image.len() as u64);
        if forget {
            state.staged = None;
        }
        state.session += 1;
        let welcome = Welcome {
            protocol: PROTOCOL,
            generation: Generation(1),
            copy: state.copy,
            durable: state.durable,
            chain: state.chain,
            staged: state.staged(),
            reads_zero: true,
        };
        let link = FakeLink {
            target: target.clone(),
            session: state.session,
            flying: Vec::new(),
            dead: false,
        };
        Ok((Box::new(link), welcome))
    }
}

struct FakeLink {
    target: Arc<FakeTarget>,
    session: u64,
    /// Sent and not arrived.
    flying: Vec<Frame>,
    dead: bool,
}

impl FakeLink {
    fn arrive(&mut self, count: usize) {
        let mut state = self.target.state();
        assert_eq!(state.session, self.session);
        self.flying.drain(..count).for_each(|frame| state.take(&frame));
    }

    fn broken(&mut self) -> LinkError {
        self.dead = true;
        let count = self.target.world.state().rng.below(self.flying.len() as u64 + 1);
        self.arrive(count as usize);
        LinkError::Lost("broken".into())
    }
}

impl Link for FakeLink {
    fn send(&mut self, frame: &Frame) -> Result<(), LinkError> {
        assert!(!self.dead, "nothing is sent on a broken connection");
        self.target.world.moment();
        self.flying.push(frame.clone());
        if self.target.breaks() { Err(self.broken()) } else { Ok(()) }
    }

    fn ask(&mut self, frame: &Frame) -> Result<Reply, LinkError> {
        self.target.world.moment();
        if self.target.breaks() {
            return Err(self.broken());
        }
        self.arrive(self.flying.len());
        let reply = if frame.header.kind == FrameKind::Commit {
            let proof = self.target.world.state().disks[self.target.index].proof.clone();
            self.target.state().commit(frame, &proof)
        } else {
            let request = Request::from_frame(frame).expect("a request decodes");
            self.target.state().answer(request)
        };
        // It arrived, but the answer does not.
        if self.target.breaks() { Err(self.broken()) } else { Ok(reply) }
    }
}
