//! Every state and every reason that status can show, each with its stable code and its explanation.
//!
//! One table: a code without an explanation does not compile. Codes are kebab-case and never change
//! their meaning; what an operating system or a peer said stands beside them as text. A code that
//! this version does not know becomes `other`, so that one side may be newer.

use serde::{Deserialize, Serialize};
use std::fmt;

/// What a code means to the one who sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Explanation {
    /// What it means, and why it happens.
    pub means: &'static str,
    /// What still works; what is at risk and what is not.
    pub safe: &'static str,
    /// What to do, best first: where or when, and the command. `{server}` and `{volume}` stand for
    /// names.
    pub remedy: &'static [Step],
}

/// One thing to type.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Step {
    /// Where, when or what for.
    pub note: &'static str,
    /// The command.
    pub command: &'static str,
}

/// An enum of codes: variant, code, and explanation.
macro_rules! codes {
    ($(#[$doc:meta])* $name:ident: $($variant:ident $code:literal {
        means: $means:literal, safe: $safe:literal,
        remedy: [$($note:literal => $command:literal),+ $(,)?] $(,)?
    })+) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(into = "&'static str", from = "String")]
        pub enum $name { $(#[doc = $means] $variant),+ }

        impl $name {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$variant),+];

            /// The stable code.
            pub const fn code(self) -> &'static str {
                match self { $(Self::$variant => $code),+ }
            }

            /// The one with this code.
            pub fn of(code: &str) -> Option<Self> {
                match code { $($code => Some(Self::$variant),)+ _ => None }
            }

            /// What it means and what to do.
            pub const fn explanation(self) -> Explanation {
                match self { $(Self::$variant => Explanation {
                    means: $means, safe: $safe, remedy: &[$(Step { note: $note, command: $command }),+],
                }),+ }
            }
        }

        impl From<$name> for &'static str {
            fn from(one: $name) -> Self {
                one.code()
            }
        }

        impl From<String> for $name {
            fn from(code: String) -> Self {
                Self::of(&code).unwrap_or(Self::Other)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
                out.write_str(self.code())
            }
        }
    };
}

codes! {
/// State of a server.
State:
Joined "joined" {
    means: "The server is known and offers its devices; nothing of it is replicated.",
    safe: "Nothing is protected: if it dies now, all of it is lost.",
    remedy: ["choose what to protect" => "secondsite protect {server} --volumes all --dry-run"],
}
Waiting "waiting" {
    means: "Something that comes by itself is missing before the server is protected; the reason says what.",
    safe: "Programs on the server run as always. Points that are there stay; what is written now is not protected before the next one.",
    remedy: ["see what it waits for" => "secondsite explain {server}"],
}
FirstCopy "first-copy" {
    means: "Everything on the volumes is copied to the second site once; writes that come meanwhile are marked and follow.",
    safe: "Programs on the server run as always. There is no recovery point of these volumes before the copy is complete; a copy that is cut short goes on where it was durable.",
    remedy: ["watch it" => "secondsite status {server} --watch"],
}
Comparing "comparing" {
    means: "Source and second site are compared by digests, because writes may have gone unseen; only what differs travels.",
    safe: "Programs on the server run as always. Points that are there stay good; there is no newer one before the compare is done.",
    remedy: ["watch it" => "secondsite status {server} --watch"],
}
Protected "protected" {
    means: "The newest exact point is inside the goal, and every protected volume is in it.",
    safe: "If the server died now, only what it wrote after the newest exact point would be lost: see the column LOSS IF IT DIED NOW.",
    remedy: ["see its points" => "secondsite points {server}"],
}
Behind "behind" {
    means: "The newest exact point is older than the goal, or there is none yet.",
    safe: "Nothing is lost while the server lives: what changed is kept in its bitmap and follows. If it died now, more than the goal would be lost.",
    remedy: ["see why" => "secondsite explain {server}"],
}
Away "away" {
    means: "Control has not heard the server's agent for more than 15 seconds.",
    safe: "Points that are there stay. Replication may still go on, since it needs no control; control cannot tell. On the server, writes are marked even while the agent is dead, until a reboot.",
    remedy: ["on {server}" => "systemctl status secondsite-agent"],
}
Stopped "stopped" {
    means: "A volume, or the whole agent, cannot go on by itself; the reason says why.",
    safe: "Programs on the server run as always. Points that are there stay; nothing newer comes before this is remedied.",
    remedy: ["see why" => "secondsite explain {server}"],
}
Unprotected "unprotected" {
    means: "Replication of the server was ended.",
    safe: "Replica and points stay as they were; what is written since then is not protected.",
    remedy: ["take it up again" => "secondsite protect {server} --volumes all"],
}
Other "other-state" {
    means: "A state that this version of the command does not know: control is newer.",
    safe: "What is replicated does not depend on this command.",
    remedy: ["install control's version here; this one's is" => "secondsite --version"],
}
}

codes! {
/// Why a server or a volume is not simply protected, or what else needs attention.
Reason:
NothingProtected "nothing-protected" {
    means: "The server has joined, and no volume of it was ever protected.",
    safe: "Nothing is protected: if the server dies now, all of it is lost.",
    remedy: ["see the plan" => "secondsite protect {server} --volumes all --dry-run",
             "begin" => "secondsite protect {server} --volumes all"],
}
ReplicationEnded "replication-ended" {
    means: "Somebody typed `secondsite unprotect`.",
    safe: "Replica and points stay as they were; what is written since then is not protected.",
    remedy: ["take it up again: the replica is compared, only differences travel" => "secondsite protect {server} --volumes all"],
}
CertificateRevoked "certificate-revoked" {
    means: "The server's certificates were revoked: control and target refuse its agent.",
    safe: "Replica and points stay. Nothing newer comes. The same identity is never taken up again, since who holds the revoked key would have it too.",
    remedy: ["on control's host: a token" => "secondsite token",
             "on {server}: join under another name" => "secondsite join ADDR:PORT --token - --name NEW-NAME --yes"],
}
OtherMachine "other-machine" {
    means: "The agent runs on another machine than the one that joined: a clone, a restored backup, or exchanged hardware.",
    safe: "Nothing of this machine is tracked or sent, so the replica of the true one is not harmed; its points stay.",
    remedy: ["to protect this machine too: on control's host" => "secondsite token",
             "then on this machine" => "secondsite join ADDR:PORT --token - --name NEW-NAME --yes",
             "if it is a clone that should not replicate" => "systemctl disable --now secondsite-agent"],
}
AgentNotStarted "agent-not-started" {
    means: "Volumes are assigned, but the server's agent has never reported.",
    safe: "Nothing is copied yet, so nothing is protected; it begins by itself when the agent reports.",
    remedy: ["on {server}" => "systemctl enable --now secondsite-agent",
             "on {server}: what is in its way" => "secondsite doctor"],
}
AgentSilent "agent-silent" {
    means: "The agent was not heard for more than 15 seconds: the server is down, the agent is dead, or the network between it and control is cut.",
    safe: "Points that are there stay. If only control's connection is cut, replication goes on unseen. If only the agent is dead, writes are still marked and follow when it is back. If the server rebooted, source and target are compared first.",
    remedy: ["on {server}" => "systemctl status secondsite-agent",
             "on {server}: reachability, certificate, kernel" => "secondsite doctor"],
}
CertificateEnded "certificate-ended" {
    means: "A certificate ended before it was renewed: its holder was away, or stopped, for most of the certificate's life.",
    safe: "Replica and points stay. Its holder is refused by everybody, so nothing newer comes through it.",
    remedy: ["a server's: on control's host" => "secondsite token",
             "then on the server, with the same name" => "secondsite join ADDR:PORT --token - --name {server}",
             "the target's or the operator's: on control's host, as before" => "secondsite setup --store DIR",
             "control's" => "systemctl restart secondsite-control"],
}
CertificateEnding "certificate-ending" {
    means: "A certificate has less than a third of its life left. Certificates renew themselves after a third: something is in the way.",
    safe: "Everything works until it ends.",
    remedy: ["on its holder's host" => "secondsite doctor",
             "an operator's is renewed by any command" => "secondsite status"],
}
NoExactPoint "no-exact-point" {
    means: "There are only fuzzy points so far: at none of them could it be proven that nothing was written during the cut.",
    safe: "A fuzzy point holds every block, but not of one instant: a file system may need repair, a database may refuse to start. The next exact one replaces it.",
    remedy: ["order another cut" => "secondsite cut {server} --wait",
             "see what each point says" => "secondsite points {server}"],
}
Backlog "backlog" {
    means: "What was written waits to be sent and committed: programs write faster than the target takes it, or a cut is long in coming.",
    safe: "Nothing is lost while the server lives: changed places are kept in its bitmap, which cannot overflow. If it died now, what was written after the newest exact point would be lost.",
    remedy: ["watch the backlog and the rate" => "secondsite status {server} --watch",
             "if the goal was too ambitious: end, and begin with another" => "secondsite unprotect {server}"],
}
FirstPointDue "first-point-due" {
    means: "The first copy is complete and the first recovery point is on its way.",
    safe: "There is no recovery point yet: if the server died now, there would be nothing to go back to.",
    remedy: ["wait for it" => "secondsite cut {server} --wait"],
}
PointLacksVolume "point-lacks-volume" {
    means: "A volume was added after the newest exact point; the next point has it.",
    safe: "The other volumes are in the newest point. The new one is in none yet.",
    remedy: ["wait for the next" => "secondsite cut {server} --wait"],
}
Connecting "connecting" {
    means: "The agent has just begun with this volume and has no session with the target yet.",
    safe: "Writes are marked and follow. Points that are there stay.",
    remedy: ["it takes seconds; watch" => "secondsite status {server} --watch"],
}
NoSession "no-session" {
    means: "The agent cannot reach the target, or the connection broke: the network is cut, the target is down, its port is closed, or a certificate is refused. It is tried again by itself, with growing pauses of up to 15 seconds.",
    safe: "Nothing is lost while the server lives: writes are marked and follow. Points that are there stay. If it died now, what was written since the newest exact point would be lost.",
    remedy: ["on the second site" => "systemctl status secondsite-target",
             "on {server}: is the target reachable from here" => "secondsite doctor"],
}
NotAssigned "not-assigned" {
    means: "The target does not know, or no longer knows, that this volume belongs to this server. After a change the target may hear of it a moment later than the agent.",
    safe: "Nothing is overwritten: the target takes only what is assigned. Writes are marked and follow.",
    remedy: ["does the target talk to control? on the second site" => "systemctl status secondsite-target",
             "see the warnings" => "secondsite status"],
}
TargetFull "target-full" {
    means: "The target's store has no room for more: what promotion may still write is kept free, and the reserve of target.toml.",
    safe: "Points that are there stay, and can still be promoted. Writes are marked and follow when there is room; nothing is lost while the server lives.",
    remedy: ["on the second site: how much is free" => "df -h /srv/secondsite",
             "make room, or grow the file system; it goes on by itself. Check with" => "secondsite doctor"],
}
TargetStorage "target-storage" {
    means: "The target could not read, write or sync its store, or found the volume's journal damaged. After a failed sync no second try is believed: the volume stops there.",
    safe: "What is on the target is left as it is; committed points that are sound stay. Writes are marked and follow. The other volumes go on.",
    remedy: ["on the second site: what the target says" => "journalctl -u secondsite-target -n 50",
             "is the store sound" => "secondsite doctor",
             "when the disk is repaired, begin again from what is durable" => "systemctl restart secondsite-target"],
}
SessionReplaced "session-replaced" {
    means: "A newer session of the same volume took over at the target. Once is normal after a broken connection; again and again means that two agents run with one certificate.",
    safe: "Only one session at a time can write. Writes are marked and follow.",
    remedy: ["on {server}: is there one agent only" => "systemctl status secondsite-agent"],
}
TargetRestarting "target-restarting" {
    means: "The target is shutting down; the agent comes back by itself.",
    safe: "Writes are marked and follow. Points that are there stay.",
    remedy: ["on the second site: is it back" => "systemctl status secondsite-target"],
}
EpochRefused "epoch-refused" {
    means: "The target refused an epoch that did not fit: out of order, malformed, or not proven by its signature. It is given up and made anew.",
    safe: "The target never commits what is not proven. What the epoch held is marked again and follows.",
    remedy: ["if it comes again: on {server}" => "journalctl -u secondsite-agent -n 50",
             "do both sides run the same version" => "secondsite --version"],
}
VersionMismatch "version-mismatch" {
    means: "Agent and target speak different versions of the protocol.",
    safe: "Points that are there stay. Writes are marked and follow when both sides understand each other.",
    remedy: ["on both sides; upgrade the older one" => "secondsite --version"],
}
VolumeMismatch "volume-mismatch" {
    means: "The volume has another size or block size than its replica.",
    safe: "The replica and its points stay as they are; nothing is written to it.",
    remedy: ["begin again with the new size: end" => "secondsite unprotect {server}",
             "then" => "secondsite protect {server} --volumes all"],
}
DeviceGone "device-gone" {
    means: "The device is not there, is not a block device that can be protected, or is another disk than before.",
    safe: "The replica and its points stay. Other volumes go on. It is looked for again by itself.",
    remedy: ["on {server}: is it there" => "lsblk",
             "on {server}: how each device can be tracked" => "secondsite doctor"],
}
DeviceGrown "device-grown" {
    means: "The device has become larger. It is opened anew with its new size, which takes moments; only the new part is sent.",
    safe: "Writes are marked all along. Points from before keep the size that they had.",
    remedy: ["see it go on" => "secondsite status {server} --watch"],
}
DeviceShrunk "device-shrunk" {
    means: "The device has become smaller, which a volume never does.",
    safe: "The replica and its points stay, with the old size. Nothing newer comes. Other volumes go on.",
    remedy: ["give it back its size, and it goes on by itself after a compare; on {server}" => "lsblk",
             "or begin again with the new size: end" => "secondsite unprotect {server}",
             "then" => "secondsite protect {server} --volumes all"],
}
DeviceUnreadable "device-unreadable" {
    means: "The system refuses to read the device at all.",
    safe: "The replica and its points stay: they may be the best copy that there is. It is tried again by itself.",
    remedy: ["on {server}: what the kernel says of the disk" => "dmesg --level err",
             "what there is to go back to" => "secondsite points {server}"],
}
DeviceNotOffered "device-not-offered" {
    means: "Control chose a device that this agent never offered; the agent opens only its own.",
    safe: "It is neither opened nor sent.",
    remedy: ["on {server}: what it offers" => "secondsite doctor",
             "choose again: end" => "secondsite unprotect {server}"],
}
DeviceNotAllowed "device-not-allowed" {
    means: "The device is not in the `allow` list of the agent's configuration.",
    safe: "It is neither opened nor sent.",
    remedy: ["on {server}: see the list and where it comes from" => "secondsite config check --show",
             "after a change of the list" => "systemctl restart secondsite-agent"],
}
TrackerUnavailable "tracker-unavailable" {
    means: "The volume was protected with --tracker ebpf, and this kernel cannot run it.",
    safe: "Nothing of this volume is sent. Points that are there stay.",
    remedy: ["on {server}: what is missing" => "secondsite doctor",
             "or compare by schedule instead: end" => "secondsite unprotect {server}",
             "then" => "secondsite protect {server} --volumes all --tracker auto"],
}
FilterAbsent "filter-absent" {
    means: "The volume was protected with --tracker ublk, and no filter runs on the server to stand in its write path.",
    safe: "Nothing of this volume is sent. If the filter was there before, its device waits and loses nothing. Points that are there stay.",
    remedy: ["on {server}: start it" => "systemctl start secondsite-filter",
             "on {server}: what it says" => "journalctl -u secondsite-filter -n 50"],
}
FilterFailed "filter-failed" {
    means: "The filter runs and does not stand in front of this device: it may be mounted or in use, too large, or failing.",
    safe: "The device is used as before. Nothing of this volume is sent. Points that are there stay. It is tried again by itself.",
    remedy: ["on {server}: what stands where" => "secondsite filter --status",
             "on {server}: what it says" => "journalctl -u secondsite-filter -n 50"],
}
FilterMemoryOnly "filter-memory-only" {
    means: "The filter's marks, and the blocks that it preserves for a cut, are in memory: they outlive its processes and the agent's, and no power cut or reboot.",
    safe: "All is well, and points are made. After a power cut or a reboot source and target are compared, and only differences travel.",
    remedy: ["with a blank device as reserve they survive: end" => "secondsite unprotect {server}",
             "then" => "secondsite protect {server} --volumes PATH --tracker ublk --reserve DEVICE"],
}
FilterReserve "filter-reserve" {
    means: "The filter keeps a write-intent log on a reserve: after a power cut or a reboot only what was being written is sent once more.",
    safe: "All is well: points are made, and marks survive.",
    remedy: ["on {server}: see it" => "secondsite filter --status"],
}
FilterReserveFailed "filter-reserve-failed" {
    means: "The reserve of the filter could not be written or read. The volume goes on without it, in memory only.",
    safe: "No write has failed. Points are made as before. After a power cut or a reboot source and target are compared.",
    remedy: ["on {server}: what it says" => "journalctl -u secondsite-filter -n 50",
             "with another device: end" => "secondsite unprotect {server}",
             "then" => "secondsite protect {server} --volumes PATH --tracker ublk --reserve DEVICE"],
}
TrackerFailed "tracker-failed" {
    means: "The kernel can run the tracker, but attaching it to this device failed.",
    safe: "Nothing of this volume is sent, since unseen writes could not be told. Points that are there stay. It is tried again by itself.",
    remedy: ["on {server}: what is missing" => "secondsite doctor",
             "on {server}: what the agent says" => "journalctl -u secondsite-agent -n 50"],
}
FirstCopyRunning "first-copy-running" {
    means: "The first copy is on its way. Its percentage counts what is durable at the target.",
    safe: "There is no recovery point of this volume before the copy is complete. A copy that is cut short goes on where it was durable.",
    remedy: ["watch it" => "secondsite status {server} --watch"],
}
MarksInDoubt "marks-in-doubt" {
    means: "Writes may have gone unseen: after a reboot, after the tracker was attached anew, or because what it saw is not what the kernel counted. So source and target are compared, and only differences travel.",
    safe: "Points that are there stay good. There is no newer one before the compare is done; writes that come meanwhile are marked.",
    remedy: ["watch it" => "secondsite status {server} --watch"],
}
EpochsGivenUp "epochs-given-up" {
    means: "Several epochs in a row could not be finished.",
    safe: "Nothing is lost while the server lives: what they held is marked again. The newest point grows old.",
    remedy: ["on {server}: why" => "journalctl -u secondsite-agent -n 50",
             "on the second site: is there room" => "secondsite doctor"],
}
LastPointFuzzy "last-point-fuzzy" {
    means: "The last cut could not be proven: something was written during it, and its file systems could not be held still.",
    safe: "The newest exact point stays and is what counts for the loss. The next point may be exact again.",
    remedy: ["order another cut" => "secondsite cut {server} --wait",
             "on {server}: can its file systems be frozen" => "secondsite doctor"],
}
BlocksUnreadable "blocks-unreadable" {
    means: "The source's disk cannot read some blocks. Points lack them and are fuzzy; they are tried again with every epoch.",
    safe: "Everything else of the volume is replicated. The last exact point may be the best copy of these blocks: do not throw it away.",
    remedy: ["on {server}: what the kernel says of the disk" => "dmesg --level err",
             "what there is to go back to" => "secondsite points {server}"],
}
CompareAsked "compare-asked" {
    means: "The volume was protected with --tracker compare: nothing follows its writes, every cut reads and compares all of it.",
    safe: "Its points are fuzzy: their blocks are not of one instant.",
    remedy: ["follow its writes instead: end" => "secondsite unprotect {server}",
             "then" => "secondsite protect {server} --volumes all --tracker auto"],
}
CompareNoEbpf "compare-no-ebpf" {
    means: "eBPF cannot run here, so nothing follows the volume's writes: every cut reads and compares all of it.",
    safe: "Its points are fuzzy: their blocks are not of one instant.",
    remedy: ["on {server}: what is missing" => "secondsite doctor"],
}
TargetNotStarted "target-not-started" {
    means: "The target has never reported to control.",
    safe: "Nothing can be replicated before it runs.",
    remedy: ["on the second site" => "systemctl enable --now secondsite-target",
             "on the second site: what is in its way" => "secondsite doctor"],
}
TargetSilent "target-silent" {
    means: "The target was not heard for more than 15 seconds. Points and loss are shown as of then.",
    safe: "What is in the store stays. If only its connection to control is cut, replication goes on unseen.",
    remedy: ["on the second site" => "systemctl status secondsite-target",
             "on the second site: what is in its way" => "secondsite doctor"],
}
Other "other" {
    means: "The text says why; this version has no code for it. The other side may be newer.",
    safe: "What is replicated does not depend on this command.",
    remedy: ["the text in full" => "secondsite status {server}",
             "do all hosts run the same version" => "secondsite --version"],
}
}

impl State {
    /// The state in words.
    pub fn words(self) -> &'static str {
        match self {
            Self::FirstCopy => "first copy",
            other => other.code(),
        }
    }

    /// Whether somebody should look: nothing is wrong with the others.
    pub fn needs_attention(self) -> bool {
        matches!(self, Self::Waiting | Self::Behind | Self::Away | Self::Stopped | Self::Other)
    }
}

#[cfg(test)]
mod tests {
    use super::{Explanation, Reason, State};
    use std::collections::BTreeSet;

    #[test]
    fn every_code_is_explained_and_its_own() {
        let states = State::ALL.iter().map(|state| (state.code(), state.explanation()));
        let reasons = Reason::ALL.iter().map(|reason| (reason.code(), reason.explanation()));
        let mut codes = BTreeSet::new();
        for (code, Explanation { means, safe, remedy }) in states.chain(reasons) {
            assert!(codes.insert(code), "{code} twice");
            let kebab = |byte: u8| byte.is_ascii_lowercase() || byte == b'-';
            assert!(code.bytes().all(kebab), "{code}");
            for text in [means, safe] {
                assert!(text.len() > 20 && text.ends_with('.'), "{code}: {text}");
            }
            for step in remedy {
                assert!(!step.command.trim().is_empty() && !step.note.is_empty(), "{code}");
            }
        }
    }

    #[test]
    fn codes_travel_and_unknown_ones_do_no_harm() {
        for reason in Reason::ALL {
            let json = serde_json::to_string(reason).unwrap();
            assert_eq!(json, format!("{:?}", reason.code()));
            assert_eq!(serde_json::from_str::<Reason>(&json).unwrap(), *reason);
        }
        assert_eq!(serde_json::from_str::<Reason>("\"of-tomorrow\"").unwrap(), Reason::Other);
        assert_eq!(serde_json::from_str::<State>("\"of-tomorrow\"").unwrap(), State::Other);
    }
}
