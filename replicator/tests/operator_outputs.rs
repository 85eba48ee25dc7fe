//! What an operator sees and scripts rely on, against the real control server on loopback: outputs
//! with their numbers masked, and every exit code. Agent and target only report here.

mod site_support;

use secondsite_control::api::{
    AgentReport, InventoryDevice, OrderResult, OrderState, PointReport, TargetReport,
    TargetVolumeReport, VerifyResult, VolumePhase, VolumeReport,
};
use secondsite_control::client::BlockingClient;
use secondsite_control::codes::Reason;
use secondsite_control::pki::{Identity, Role};
use serde_json::Value;
use site_support::{Daemon, PATIENCE, Site};
use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// A site with control, and a server `db1` whose agent and target are this test.
struct Stage {
    site: Site,
    control: Option<Daemon>,
    agent: BlockingClient,
    target: BlockingClient,
    server_id: String,
}

fn client(site: &Site, config: &str, name: &str) -> (BlockingClient, Role) {
    let identity = Identity::load(&site.config(config).join("pki"), name).unwrap();
    let client = BlockingClient::new(&site.listen, identity.client_config().unwrap()).unwrap();
    (client, identity.role)
}

fn disk(name: &str) -> InventoryDevice {
    InventoryDevice {
        name: name.into(),
        path: format!("/dev/{name}"),
        kind: "disk".into(),
        size_bytes: 480 << 30,
        used_by: "/".into(),
        swap: Vec::new(),
        parent: String::new(),
        trackers: vec!["ebpf".into(), "compare".into()],
        refused: String::new(),
    }
}

impl Stage {
    fn new() -> Self {
        let (site, made) = Site::setup();
        let control = Some(Daemon::start(&site.config("dr"), "control"));
        let token = made["token"].as_str().unwrap();
        site.ends("db1", &["join", &site.listen, "--token", token, "--name", "db1"], 0);
        let (agent, role) = client(&site, "db1", "agent");
        let Role::Agent(server_id) = role else { panic!("{role:?}") };
        agent.run(|agent| agent.agent_inventory(&[disk("sda")])).unwrap();
        let (target, _) = client(&site, "dr", "target");
        let stage = Self { site, control, agent, target, server_id };
        stage.target_says(&[]);
        stage
    }

    /// Text as a person gets it: exit code, stdout, stderr.
    fn says(&self, config: &str, arguments: &[&str]) -> (i32, String, String) {
        let output = self.command(config, arguments).output().unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
    }

    fn command(&self, config: &str, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_secondsite"));
        command.args(arguments).arg("--config-dir").arg(self.site.config(config));
        command
    }

    fn volume_id(&self) -> String {
        let poll = self.agent.run(|agent| agent.agent_poll(0, 0, 0)).unwrap();
        poll.assignment.unwrap().volumes[0].id.clone()
    }

    fn protect(&self) {
        self.site.ends("dr", &["protect", "db1", "--volumes", "sda", "--rpo", "30s"], 0);
    }

    fn agent_says(&self, phase: VolumePhase, change: impl FnOnce(&mut VolumeReport)) {
        self.agent_reports(phase, change, BTreeMap::new());
    }

    fn agent_reports(
        &self,
        phase: VolumePhase,
        change: impl FnOnce(&mut VolumeReport),
        orders: BTreeMap<u64, OrderState>,
    ) {
        let mut volume = VolumeReport {
            id: self.volume_id(),
            phase,
            reason: String::new(),
            code: None,
            tracker: "ebpf".into(),
            tracker_reason: String::new(),
            tracker_code: None,
            cut: "quiet".into(),
            progress_bytes: None,
            backlog_bytes: 1_258_291,
            sent_bytes: 0,
            compares: 0,
        };
        change(&mut volume);
        let volumes = vec![volume];
        let report = AgentReport { agent_version: "0".into(), volumes, orders, stopped: None };
        self.agent.run(|agent| agent.agent_report(&report)).unwrap();
    }

    /// Points of this age, in seconds.
    fn target_says(&self, ages: &[u64]) {
        let now = jiff::Timestamp::now().as_nanosecond() as u64;
        let point = |age: &u64| PointReport {
            server: self.server_id.clone(),
            id: format!("{age:032x}"),
            time_ns: now - age * 1_000_000_000,
            generation: 1,
            epochs: BTreeMap::new(),
            consistency: "crash".into(),
            lacking: Vec::new(),
            reason: String::new(),
        };
        let report = TargetReport {
            target_version: "0".into(),
            volumes: Vec::<TargetVolumeReport>::new(),
            points: ages.iter().map(point).collect(),
            free_bytes: 1 << 40,
        };
        self.target.run(|target| target.target_report(&report)).unwrap();
    }
}

/// Numbers, and the folder of this run, hidden.
fn masked(text: &str) -> String {
    let mut masked = String::new();
    for letter in text.chars() {
        let number = letter.is_ascii_digit();
        let inside = masked.ends_with('#') && matches!(letter, '.' | ':' | 'T' | 'Z' | '-');
        match (number, masked.ends_with('#')) {
            (true, true) => {}
            // Names keep their digits.
            (true, false) if masked.ends_with(char::is_alphabetic) => masked.push(letter),
            (true, false) => masked.push('#'),
            (false, _) if inside => {}
            (false, _) => masked.push(letter),
        }
    }
    masked.lines().map(|line| line.split(" --config-dir").next().unwrap().trim_end().to_owned() + "\n").collect()
}

#[test]
fn states_as_people_see_them() {
    let stage = Stage::new();
    let status = |more: &[&str]| {
        let (code, out, talk) = stage.says("dr", &[&["status"], more].concat());
        assert_eq!(code, 0, "{talk}");
        (masked(&out), masked(&talk))
    };
    let (out, talk) = status(&[]);
    assert_eq!(
        out,
        "SERVER  STATE   LOSS IF IT DIED NOW  GOAL  TO TARGET\n\
         db1     joined  everything           #s   off\n"
    );
    assert_eq!(talk, "");

    stage.protect();
    stage.agent_says(VolumePhase::FirstCopy, |volume| {
        volume.progress_bytes = Some((163 << 30, 480 << 30));
    });
    let (out, talk) = status(&[]);
    assert_eq!(
        out,
        "SERVER  STATE                         LOSS IF IT DIED NOW  GOAL  TO TARGET\n\
         db1     first copy # %, calculating  no point yet         #s   -\n"
    );
    assert_eq!(talk, "");

    stage.agent_says(VolumePhase::Connecting, |volume| {
        volume.code = Some(Reason::TargetFull);
        volume.reason = "no space left at /srv".into();
    });
    stage.target_says(&[45]);
    let (out, talk) = status(&[]);
    assert_eq!(
        out,
        "SERVER  STATE   LOSS IF IT DIED NOW  GOAL  TO TARGET\n\
         db1     BEHIND  # s · # MiB       #s   waits for a cut\n"
            .replace("waits for a cut", out.rsplit("   ").next().unwrap().trim_end())
    );
    assert_eq!(talk, "# needs attention: db1 -> secondsite explain db1\n");
    let (code, out, _) = stage.says("dr", &["explain", "db1"]);
    assert_eq!(code, 0);
    assert_eq!(
        masked(&out),
        "db1: BEHIND, target-full since # (# s)\n  \
           now    newest exact point # s ago; sda: no space left at /srv. Loss if it died now: # s · #\n         \
                  MiB.\n  \
           means  The target's store has no room for more: what promotion may still write is kept free, and\n         \
                  the reserve of target.toml.\n  \
           safe   Points that are there stay, and can still be promoted. Writes are marked and follow when\n         \
                  there is room; nothing is lost while the server lives.\n  \
           type   on the second site: how much is free:   df -h /srv/secondsite\n         \
                  make room, or grow the file system; it goes on by itself. Check with:   secondsite doctor\n"
    );
    // The same of the volume alone, of the code alone, and of all that needs attention.
    for arguments in [&["explain", "db1", "sda"][..], &["explain", "target-full"], &["explain"]] {
        let document = stage.site.ends("dr", arguments, 0);
        let explained = &document["explained"][0];
        assert_eq!(explained["code"], "target-full", "{arguments:?}");
        assert_eq!(explained["remedy"][0]["command"], "df -h /srv/secondsite");
        assert_eq!(explained["since"].is_string(), arguments.len() != 2 || arguments[1] == "db1"
            , "{arguments:?}");
        if arguments.len() == 1 { break; }
    }
    stage.site.ends("dr", &["explain", "db1", "sdz"], 64);
    stage.site.ends("dr", &["explain", "nobody"], 64);
    let listed = stage.site.ends("dr", &["explain", "--list"], 0);
    assert_eq!(
        listed["codes"].as_array().unwrap().len(),
        Reason::ALL.len() + secondsite_control::codes::State::ALL.len()
    );

    stage.agent_says(VolumePhase::Following, |_| {});
    stage.target_says(&[4]);
    let (out, talk) = status(&["db1"]);
    assert!(out.contains("\ndb1     protected  # s · # MiB"), "{out}");
    assert_eq!(talk, "");
    let (_, _, talk) = stage.says("dr", &["explain"]);
    assert_eq!(talk, "Nothing needs attention.\n");
}

#[test]
fn nagios_gets_its_codes_and_data() {
    let mut stage = Stage::new();
    let check = |stage: &Stage, arguments: &[&str]| {
        let (code, out, talk) = stage.says("dr", &[&["check", "db1"], arguments].concat());
        assert_eq!((out.lines().count(), talk.as_str()), (1, ""), "{out}");
        (code, masked(&out))
    };
    assert_eq!(check(&stage, &[]).0, 2, "nothing of it is protected");
    stage.protect();
    stage.agent_says(VolumePhase::Following, |_| {});
    stage.target_says(&[4]);
    let (code, out) = check(&stage, &[]);
    assert_eq!(code, 0);
    let expected = "SECONDSITE OK - db1: protected, loss if it died now # s · # MiB | \
                    loss=#s;#;#;# backlog=#B;;;# sending=#B;;;#\n";
    assert_eq!(out.replace(" sending=#B;;;#", ""), expected.replace(" sending=#B;;;#", ""));
    assert_eq!(check(&stage, &["--warning", "1s"]).0, 1);
    assert_eq!(check(&stage, &["--critical", "2s"]).0, 2);
    stage.target_says(&[40]);
    let (code, out) = check(&stage, &[]);
    assert_eq!(code, 1, "{out}");
    assert!(out.starts_with("SECONDSITE WARNING - db1: BEHIND, "), "{out}");
    stage.target_says(&[90]);
    assert_eq!(check(&stage, &[]).0, 2);
    assert_eq!(check(&stage, &["--warning", "soon"].map(|_| "--no-such-option")[..1].as_ref()).0, 3);
}
