//! What ends a step early, and what becomes of the session, the epoch and the volume then.

use crate::source::seams::{DiskError, LinkError};
use crate::source::shipper::{REFUSED_EVERY, Session, Shipper, StepError, Work};
use crate::source::volume::VerifyState;
use secondsite_control::api::VolumePhase;
use secondsite_control::codes::Reason;
use secondsite_format::message::RefusalCode;
use std::time::Duration;

impl Shipper {
    pub(super) fn failed(&mut self, error: StepError) -> Duration {
        let now = self.commons.env.now();
        match error {
            StepError::Stopping => {
                self.hang_up(now);
                return Duration::MAX;
            }
            StepError::GiveUp(why) => {
                let cut_id = self.volume.control().cut;
                self.give_up(&why);
                let dropped = cut_id.map_or(Ok(()), |cut_id| self.drop_staged(cut_id));
                // What was given up may have been so because of the disk.
                let dropped = dropped.and_then(|()| Ok(self.volume.bench().disk.check()?));
                return match dropped {
                    Ok(()) => {
                        self.followed();
                        Duration::ZERO
                    }
                    Err(error) => self.failed(error),
                };
            }
            StepError::Disk(error) => {
                self.hang_up(now);
                if matches!(error, DiskError::Shrunk { .. }) {
                    // Before anything else: what comes back with the size was written by nobody.
                    self.volume.marks().set_compare_due(true);
                }
                if self.volume.control().cut.is_some() {
                    self.give_up("the volume is opened anew");
                }
                self.grown = matches!(error, DiskError::Grown { .. });
                if self.grown {
                    tracing::info!(volume = %self.volume.face.name, %error, "opened anew");
                    self.away(error.code(), error.to_string(), now);
                } else {
                    self.stopped(error.code(), error.to_string(), now);
                }
                self.lost_disk = true;
            }
            StepError::Link(LinkError::Refused(refusal)) => {
                self.hang_up(now);
                let spoilt = matches!(
                    refusal.code,
                    RefusalCode::Unproven | RefusalCode::OutOfOrder | RefusalCode::Malformed
                );
                if spoilt && self.volume.control().cut.is_some() {
                    // The same frames would be refused again.
                    self.give_up("the target refused the epoch");
                }
                if refusal.code.retry() {
                    let why = format!("the target refuses for now: {}", refusal.message);
                    self.away(refused(refusal.code), why, now);
                } else {
                    self.stopped(refused(refusal.code), refusal.message, now);
                }
            }
            StepError::Link(error) => {
                self.hang_up(now);
                self.away(
                    Reason::NoSession,
                    format!("no session with the target ({error}); it is tried again by itself"),
                    now,
                );
            }
        }
        self.dial_at.saturating_sub(now)
    }

    fn hang_up(&mut self, now: Duration) {
        if let Some(Session { work: Work::Compare(compare), .. }) = self.session.take() {
            self.compare = Some(compare);
        }
        let mut control = self.volume.control();
        control.ready = None;
        control.away_since.get_or_insert(now);
        control.verify_waits = false;
        if control.verify != VerifyState::Idle && self.verify.take().is_some() {
            // Looks at another session's state prove nothing together.
            control.verify = VerifyState::Ordered;
        }
    }

    fn away(&mut self, code: Reason, reason: String, now: Duration) {
        self.volume.face.phase(VolumePhase::Connecting, code, reason);
        self.dial_at = now + self.backoff.next(&self.commons.env.random());
        self.volume.coordinator.ring();
    }

    fn stopped(&mut self, code: Reason, reason: String, now: Duration) {
        self.volume.face.phase(VolumePhase::Stopped, code, reason);
        self.dial_at = now + REFUSED_EVERY;
        self.volume.coordinator.ring();
    }
}

/// What a refusal of the target means for the volume.
fn refused(code: RefusalCode) -> Reason {
    match code {
        RefusalCode::Protocol => Reason::VersionMismatch,
        RefusalCode::NotAllowed => Reason::NotAssigned,
        RefusalCode::OtherMachine => Reason::OtherMachine,
        RefusalCode::Mismatch => Reason::VolumeMismatch,
        RefusalCode::OutOfOrder | RefusalCode::Malformed | RefusalCode::Unproven => {
            Reason::EpochRefused
        }
        RefusalCode::NoSpace => Reason::TargetFull,
        RefusalCode::Storage => Reason::TargetStorage,
        RefusalCode::Replaced => Reason::SessionReplaced,
        RefusalCode::Stopping => Reason::TargetRestarting,
    }
}
