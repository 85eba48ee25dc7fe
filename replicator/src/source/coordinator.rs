//! The coordinator: one a server. Says when rounds begin and what becomes of orders.
//!
//! All tracked volumes that follow form one round; each compare-only volume has rounds of its own,
//! unless a cut was ordered: then all of them form one. Works in steps and knows no thread.

use crate::source::budget::FreezeBudget;
use crate::source::buffers::Memory;
use crate::source::orders::{CUT_LIMIT, EXIT_TRY_LATER, EXIT_UNAVAILABLE, Open, Orders};
use crate::source::round::{Point, Round, Step, Tools};
use crate::source::seams::{Cutter, Env, Freeze};
use crate::source::volume::{Face, VerifyState, Volume, lock};
use secondsite_control::api::{OrderKind, OrderResult, VerifyResult, VolumePhase};
use secondsite_format::ids::VolumeId;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// Bounds of the time between two cuts; within them it is a third of the goal.
const INTERVAL_MIN: Duration = Duration::from_secs(1);
const INTERVAL_MAX: Duration = Duration::from_secs(60);
/// A compare-only volume rests this many times as long as its last round took.
const REST_FACTOR: u32 = 10;
/// The longest that a step is put off.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// A round, and the orders that it answers.
struct Running {
    round: Round,
    orders: Vec<u64>,
    /// The compare-only volume whose own round it is.
    alone: Option<VolumeId>,
}

/// What is protected, set by the assignment.
#[derive(Default)]
pub struct Protected {
    /// All volumes, as people see them, also those that cannot run.
    pub faces: Vec<Arc<Face>>,
    /// Those that are tracked and readable.
    pub volumes: Vec<Arc<Volume>>,
    /// The goal.
    pub goal: Duration,
}

/// The coordinator.
pub struct Coordinator {
    env: Arc<dyn Env>,
    memory: Arc<Memory>,
    freezer: Box<dyn Freeze>,
    cutter: Box<dyn Cutter>,
    protected: Arc<Mutex<Protected>>,
    orders: Arc<Mutex<Orders>>,
    changed: Arc<dyn Fn() + Send + Sync>,
    budget: FreezeBudget,
    running: Vec<Running>,
    /// When the next round begins: of the tracked volumes (none), of a compare-only one.
    due: BTreeMap<Option<VolumeId>, Duration>,
}

impl Coordinator {
    /// Starts with no round.
    pub fn new(
        env: Arc<dyn Env>,
        memory: Arc<Memory>,
        freezer: Box<dyn Freeze>,
        cutter: Box<dyn Cutter>,
        protected: Arc<Mutex<Protected>>,
        orders: Arc<Mutex<Orders>>,
        changed: Arc<dyn Fn() + Send + Sync>,
    ) -> Self {
        Self {
            env,
            memory,
            freezer,
            cutter,
            protected,
            orders,
            changed,
            budget: FreezeBudget::default(),
            running: Vec::new(),
            due: BTreeMap::new(),
        }
    }

    /// Does what can be done now; returns how long there is nothing more to do.
    pub fn step(&mut self) -> Duration {
        let begun = self.env.now();
        let (faces, volumes, goal) = {
            let protected = lock(&self.protected);
            (protected.faces.clone(), protected.volumes.clone(), protected.goal)
        };
        let interval = (goal / 3).clamp(INTERVAL_MIN, INTERVAL_MAX);
        let mut wait = self.advance(&faces, &volumes, interval);
        self.answer(&faces, &volumes);
        self.schedule(&volumes, interval);
        if self.running.iter().any(|running| running.round.started >= begun) {
            wait = Duration::ZERO;
        }
        wait.min(LOOK_EVERY)
    }

    /// Moves every round on.
    fn advance(
        &mut self,
        faces: &[Arc<Face>],
        volumes: &[Arc<Volume>],
        interval: Duration,
    ) -> Duration {
        let protected: Vec<VolumeId> = faces.iter().map(|face| face.id).collect();
        let mut wait = LOOK_EVERY;
        for mut running in std::mem::take(&mut self.running) {
            for id in self.removed(&running.round, volumes) {
                running.round.remove(id);
            }
            let ordered = !running.orders.is_empty();
            let mut tools = Tools {
                env: self.env.as_ref(),
                memory: &self.memory,
                freezer: self.freezer.as_mut(),
                cutter: self.cutter.as_mut(),
                budget: &mut self.budget,
                protected: &protected,
                freeze_patience: if ordered { CUT_LIMIT } else { interval },
            };
            match running.round.step(&mut tools) {
                Step::Wait(time) => {
                    wait = wait.min(time);
                    self.running.push(running);
                }
                Step::Ended(point) => {
                    let took = self.env.now() - running.round.started;
                    let rest = if running.alone.is_some() {
                        interval.max(took * REST_FACTOR) + took
                    } else {
                        interval
                    };
                    // A round that came to nothing is tried again soon, but not at once.
                    let rest = if point.is_some() { rest } else { INTERVAL_MIN + took };
                    self.due.insert(running.alone, running.round.started + rest);
                    self.ended(&running, point, volumes);
                    wait = Duration::ZERO;
                }
            }
        }
        wait
    }

    fn removed(&self, round: &Round, volumes: &[Arc<Volume>]) -> Vec<VolumeId> {
        // By the volume itself, not its id: one that was opened anew is another member.
        let here = |member: &&Arc<Volume>| volumes.iter().any(|other| Arc::ptr_eq(other, member));
        round.members().iter().filter(|member| !here(member)).map(|member| member.id()).collect()
    }

    /// What a round's point means for the orders that it was begun for.
    fn ended(&mut self, running: &Running, point: Option<Point>, volumes: &[Arc<Volume>]) {
        let Some(point) = point else { return };
        let compare_only = volumes.iter().any(|volume| volume.compare_only);
        let mut orders = lock(&self.orders);
        for number in &running.orders {
            if point.lacks_member {
                // A compare in between, or a lost session: it is waited for.
                continue;
            }
            if point.exact || compare_only {
                let result = OrderResult::Cut {
                    point: point.cut_id.to_string(),
                    exact: point.exact && !compare_only,
                };
                orders.done(*number, result);
            } else if let Some(open) = orders.open.iter_mut().find(|open| open.number == *number) {
                open.fuzzy = Some(format!("{} ({})", point.cut_id, point.why));
            }
        }
        drop(orders);
        (self.changed)();
    }

    /// Begins rounds that are due.
    fn schedule(&mut self, volumes: &[Arc<Volume>], interval: Duration) {
        let now = self.env.now();
        let free = |volume: &&Arc<Volume>, running: &[Running]| {
            volume.control().ready.is_some()
                && !running.iter().any(|running| running.round.has(volume.id()))
        };
        let ordered = lock(&self.orders).open.iter().any(|open| open.what == OrderKind::Cut);
        let verifying = |volume: &Volume| {
            matches!(volume.control().verify, VerifyState::Ordered | VerifyState::Running(..))
        };
        if !self.running.iter().any(|running| running.alone.is_none()) && !ordered {
            let hurry = volumes.iter().any(|volume| volume.control().verify_waits);
            let due = self.due.get(&None).copied().unwrap_or(now);
            let due =
                if hurry { due.min(due.saturating_sub(interval) + INTERVAL_MIN) } else { due };
            let members: Vec<_> = volumes
                .iter()
                .filter(|volume| !volume.compare_only && free(volume, &self.running))
                .cloned()
                .collect();
            if now >= due && !members.is_empty() {
                let round = Round::new(members, self.env.as_ref());
                self.running.push(Running { round, orders: Vec::new(), alone: None });
            }
        }
        for volume in volumes.iter().filter(|volume| volume.compare_only && !ordered) {
            let due = self.due.get(&Some(volume.id())).copied().unwrap_or(now);
            if now >= due && free(&volume, &self.running) && !verifying(volume) {
                let round = Round::new(vec![volume.clone()], self.env.as_ref());
                let alone = Some(volume.id());
                self.running.push(Running { round, orders: Vec::new(), alone });
            }
        }
    }

    /// Works on open orders.
    fn answer(&mut self, faces: &[Arc<Face>], volumes: &[Arc<Volume>]) {
        let now = self.env.now();
        let open: Vec<Open> = lock(&self.orders).open.clone();
        let mut cuts = Vec::new();
        for mut order in open {
            let (since, mut limit) = *order.times.get_or_insert((now, now + CUT_LIMIT));
            match order.what {
                OrderKind::Verify => self.answer_verify(&mut order, since, faces, volumes),
                OrderKind::Cut => {
                    let comparing = faces.iter().any(|face| {
                        let status = face.status();
                        status.phase == VolumePhase::Comparing
                            || status.tracker == "compare" && status.progress.is_some()
                    });
                    if comparing {
                        limit = now + CUT_LIMIT;
                    }
                    if !self.answer_cut(&order, faces, now >= limit) {
                        cuts.push(order.number);
                    }
                }
            }
            let mut orders = lock(&self.orders);
            if let Some(open) = orders.open.iter_mut().find(|open| open.number == order.number) {
                open.times = Some((since, limit));
                open.begun = order.begun;
            }
        }
        self.ordered_round(cuts, faces, volumes);
    }

    /// True if the order has been answered.
    fn answer_cut(&self, order: &Open, faces: &[Arc<Face>], over: bool) -> bool {
        let running = self.running.iter().find(|running| running.orders.contains(&order.number));
        let (percent, note) = match (running, blocked(faces)) {
            (Some(running), _) => {
                let (percent, note) = running.round.note();
                (percent, note.to_string())
            }
            (None, Some(why)) => (0, why),
            (None, None) => (1, "waiting for the cut before".into()),
        };
        let mut orders = lock(&self.orders);
        if over {
            let why = match &order.fuzzy {
                Some(point) => format!("no exact point within 4 min; the newest is fuzzy: {point}"),
                None => format!("no point within 4 min: {note}"),
            };
            orders.failed(order.number, EXIT_TRY_LATER, why);
        }
        let changed = over || orders.progress(order.number, percent, &note);
        drop(orders);
        if changed {
            (self.changed)();
        }
        over
    }

    /// Begins the round that answers cut orders: with all volumes, when nothing else is running.
    fn ordered_round(&mut self, cuts: Vec<u64>, faces: &[Arc<Face>], volumes: &[Arc<Volume>]) {
        let served = |number: &u64| self.running.iter().any(|r| r.orders.contains(number));
        let cuts: Vec<u64> = cuts.into_iter().filter(|number| !served(number)).collect();
        if cuts.is_empty() || !self.running.is_empty() || blocked(faces).is_some() {
            return;
        }
        let members: Vec<_> =
            volumes.iter().filter(|volume| volume.control().ready.is_some()).cloned().collect();
        let following =
            volumes.iter().filter(|v| v.face.status().phase == VolumePhase::Following).count();
        if !members.is_empty() && members.len() == following {
            let round = Round::new(members, self.env.as_ref());
            self.running.push(Running { round, orders: cuts, alone: None });
        }
    }

    fn answer_verify(
        &self,
        order: &mut Open,
        since: Duration,
        faces: &[Arc<Face>],
        volumes: &[Arc<Volume>],
    ) {
        let running = lock(&self.orders)
            .open
            .iter()
            .any(|open| open.what == OrderKind::Verify && open.number < order.number);
        if running {
            return;
        }
        if let Some(face) = faces.iter().find(|face| face.status().phase == VolumePhase::Stopped) {
            let reason = format!("{} is stopped: {}", face.name, face.status().reason);
            lock(&self.orders).failed(order.number, EXIT_UNAVAILABLE, reason);
            volumes.iter().for_each(|volume| volume.control().verify = VerifyState::Idle);
            return (self.changed)();
        }
        // A verify may take long, but somebody waits for it.
        let gone = |volume: &&Arc<Volume>| {
            let away = volume.control().away_since;
            away.is_some_and(|away| self.env.now() > since.max(away) + CUT_LIMIT)
        };
        if let Some(volume) = volumes.iter().find(gone) {
            let status = volume.face.status();
            let reason = format!(
                "{} has had no session with the target for 4 min: {}",
                volume.face.name, status.reason
            );
            lock(&self.orders).failed(order.number, EXIT_TRY_LATER, reason);
            volumes.iter().for_each(|volume| volume.control().verify = VerifyState::Idle);
            return (self.changed)();
        }
        if volumes.is_empty() || volumes.len() < faces.len() {
            return;
        }
        if !order.begun {
            order.begun = true;
            for volume in volumes {
                volume.control().verify = VerifyState::Ordered;
                volume.bell.ring();
            }
            return;
        }
        let (mut done, mut total, mut rows) = (0, 0, Vec::new());
        for volume in volumes {
            let bytes = volume.shape.volume_bytes;
            total += bytes;
            match volume.control().verify.clone() {
                VerifyState::Idle | VerifyState::Ordered => {}
                VerifyState::Running(at, of) => done += bytes * at / of.max(1) * 95 / 100,
                VerifyState::Done(compared_bytes, differing_bytes, differing) => {
                    done += bytes;
                    rows.push(VerifyResult {
                        name: volume.face.name.clone(),
                        compared_bytes,
                        differing_bytes,
                        differing,
                    });
                }
            }
        }
        let mut orders = lock(&self.orders);
        let changed = if rows.len() == volumes.len() {
            volumes.iter().for_each(|volume| volume.control().verify = VerifyState::Idle);
            orders.done(order.number, OrderResult::Verify { volumes: rows });
            true
        } else {
            let percent = (u128::from(done) * 100 / u128::from(total.max(1))) as u8;
            let note = blocked(faces).unwrap_or_else(|| "comparing with the newest point".into());
            orders.progress(order.number, percent, &note)
        };
        drop(orders);
        if changed {
            (self.changed)();
        }
    }
}

/// What a cut of all volumes waits for.
fn blocked(faces: &[Arc<Face>]) -> Option<String> {
    if faces.is_empty() {
        return Some("no volume is protected".into());
    }
    let mut stopped = 0;
    for face in faces {
        let status = face.status();
        let percent = status.progress.map_or(0, |(done, total)| done * 100 / total.max(1));
        match status.phase {
            VolumePhase::Connecting => {
                return Some(format!("{} has no session with the target", face.name));
            }
            VolumePhase::FirstCopy => {
                return Some(format!("first copy of {}: {percent} %", face.name));
            }
            VolumePhase::Comparing => {
                return Some(format!("{} is compared: {percent} %", face.name));
            }
            VolumePhase::Stopped => stopped += 1,
            VolumePhase::Following => {}
        }
    }
    (stopped == faces.len()).then(|| "every volume is stopped".into())
}
