//! What an operator sees and scripts rely on, against the real control server on loopback: outputs
//! with their numbers masked, and every exit code. Agent and target only report here.

mod site_support;

use secondsite::daemon::agent_side::ASSIGNMENT;
use secondsite::daemon::state::StateDir;
use secondsite_control::api::{
    AgentReport, InventoryDevice, OrderResult, OrderState, PointReport, TargetReport,
    TargetVolumeReport, VerifyResult, VolumePhase, VolumeReport,
};
use secondsite_control::client::BlockingClient;
use secondsite_control::codes::{Reason, State};
use secondsite_control::pki::{Identity, Role};
use serde_json::Value;
use site_support::{Daemon, PATIENCE, Site};
use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::Instant;

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
        let inventory = [disk("sda")];
        agent.run(|agent| agent.agent_inventory(&inventory)).unwrap();
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
            kept: false,
            name: None,
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
    masked
        .lines()
        .map(|line| line.split(" --config-dir").next().unwrap().trim_end().to_owned() + "\n")
        .collect()
}

/// Blanks in a row become one: columns are as wide as numbers that are not shown.
fn squeezed(text: &str) -> String {
    let line = |line: &str| line.split_whitespace().collect::<Vec<_>>().join(" ") + "\n";
    masked(text).lines().map(line).collect()
}

const HEADER: &str = "SERVER STATE LOSS IF IT DIED NOW GOAL HISTORY TO TARGET\n";

#[test]
fn states_as_people_see_them() {
    let stage = Stage::new();
    let status = |row: &str, talk: &str| {
        let (code, out, said) = stage.says("dr", &["status"]);
        assert_eq!((code, masked(&said).as_str()), (0, talk));
        assert_eq!(squeezed(&out), format!("{HEADER}{row}\n"));
    };
    status("db1 joined everything #s - off", "");
    stage.protect();
    let waits = "# needs attention: db1 -> secondsite explain db1\n";
    status("db1 waiting no point yet #s - -", waits);
    stage.agent_says(VolumePhase::FirstCopy, |volume| {
        volume.progress_bytes = Some((163 << 30, 480 << 30));
    });
    status("db1 first copy # %, calculating no point yet #s - -", "");
    stage.agent_says(VolumePhase::Connecting, |volume| {
        volume.code = Some(Reason::TargetFull);
        volume.reason = "no space left at /srv".into();
    });
    stage.target_says(&[45]);
    status("db1 BEHIND # s · # MiB #s # s of # d -", waits);

    let (code, out, _) = stage.says("dr", &["explain", "db1"]);
    assert_eq!(code, 0);
    let expected = "\
db1: BEHIND, target-full since # (# s)
  now    newest exact point # s ago; sda: no space left at /srv. Loss if it died now: # s · # MiB.
  means  The target's store has no room for more: what promotion may still write is kept free, and the
         reserve of target.toml.
  safe   Points that are there stay, and can still be promoted. Writes are marked and follow when
         there is room; nothing is lost while the server lives.
  type   on the second site: how much is free:   df -h /srv/secondsite
         make room, or grow the file system; it goes on by itself. Check with:   secondsite doctor
";
    assert_eq!(masked(&out), expected);
    // The same of all that needs attention, of the volume alone, and of the code alone.
    for (arguments, told_since) in [
        (&["explain"][..], true),
        (&["explain", "db1", "sda"], true),
        (&["explain", "target-full"], false),
    ] {
        let document = stage.site.ends("dr", arguments, 0);
        let explained = &document["explained"][0];
        assert_eq!(explained["code"], "target-full", "{arguments:?}");
        assert_eq!(explained["remedy"][0]["command"], "df -h /srv/secondsite");
        assert_eq!(explained["since"].is_string(), told_since, "{arguments:?}");
    }
    let listed = stage.site.ends("dr", &["explain", "--list"], 0);
    let codes = Reason::ALL.len() + State::ALL.len();
    assert_eq!(listed["codes"].as_array().unwrap().len(), codes);

    stage.agent_says(VolumePhase::Following, |_| {});
    stage.target_says(&[4]);
    status("db1 protected # s · # MiB #s # s of # d waits for a cut", "");
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
    let fine = "SECONDSITE OK - db1: protected, loss if it died now # s · # MiB | \
                loss=#s;#;#;# backlog=#B;;;#\n";
    assert_eq!(check(&stage, &[]), (0, fine.to_owned()));
    assert_eq!(check(&stage, &["--warning", "1s"]).0, 1);
    assert_eq!(check(&stage, &["--critical", "2s"]).0, 2);
    stage.target_says(&[40]);
    let (code, out) = check(&stage, &[]);
    assert_eq!(code, 1, "{out}");
    assert!(out.starts_with("SECONDSITE WARNING - db1: BEHIND, loss "), "{out}");
    stage.target_says(&[90]);
    assert_eq!(check(&stage, &[]).0, 2);
    assert_eq!(stage.says("dr", &["check", "db1", "--warning", "soon"]).0, 3);
    stage.control = None;
    let (code, out) = check(&stage, &[]);
    assert_eq!(code, 3);
    assert!(out.starts_with("SECONDSITE UNKNOWN - "), "{out}");
}

/// A command that goes on, and the lines that it printed; killed when dropped.
struct Going {
    child: Child,
    lines: mpsc::Receiver<String>,
}

impl Going {
    fn start(mut command: Command) -> Self {
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let (send, lines) = mpsc::channel();
        let streams: [Box<dyn Read + Send>; 2] =
            [Box::new(child.stdout.take().unwrap()), Box::new(child.stderr.take().unwrap())];
        for stream in streams {
            let send = send.clone();
            std::thread::spawn(move || {
                for line in BufReader::new(stream).lines().map_while(Result::ok) {
                    if send.send(line).is_err() {
                        return;
                    }
                }
            });
        }
        Self { child, lines }
    }

    /// Waits for a line with this text; all lines until then.
    fn until(&self, wanted: &str) -> Vec<String> {
        let end = Instant::now() + PATIENCE;
        let mut seen: Vec<String> = Vec::new();
        while !seen.last().is_some_and(|line| line.contains(wanted)) {
            let left = end.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left) {
                Ok(line) => seen.push(line),
                Err(_) => panic!("{wanted:?} never came: {seen:?}"),
            }
        }
        seen
    }
}

impl Drop for Going {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn what_goes_on_is_followed() {
    let mut stage = Stage::new();
    // Protect and wait: phases one after the other, to the end.
    let protect = ["protect", "db1", "--volumes", "sda", "--rpo", "30s", "--wait"];
    let mut waiting = Going::start(stage.command("dr", &protect));
    waiting.until("db1 waiting 0 %");
    stage.agent_says(VolumePhase::FirstCopy, |volume| {
        volume.progress_bytes = Some((48 << 30, 480 << 30));
    });
    waiting.until("db1 first copy 10 %  calculating");

    // Without a terminal: a block for every change, no more.
    let blocks = Going::start(stage.command("dr", &["status", "--watch"]));
    blocks.until("first copy 10 %");
    let documents = Going::start(stage.command("dr", &["status", "--json", "--follow"]));
    for _ in 0..2 {
        let line = documents.until("{").pop().unwrap();
        let document: Value = serde_json::from_str(&line).expect("one document a line");
        assert_eq!(document["servers"][0]["state"], "first-copy");
        assert_eq!(document["servers"][0]["percent"], 10);
    }
    stage.agent_says(VolumePhase::Following, |_| {});
    stage.target_says(&[4]);
    let seen = blocks.until("protected");
    let headers = seen.iter().filter(|line| line.starts_with("SERVER")).count();
    assert!(headers <= 2, "the points may come a moment after the agent's word: {seen:?}");
    assert!(!seen.iter().any(|line| line.contains('\u{1b}')), "{seen:?}");
    waiting.until("db1 has its first recovery point.");
    assert!(waiting.child.wait().unwrap().success());
    documents.until("\"state\":\"protected\"");

    // Control goes away and comes back: both go on.
    let config = stage.site.config("dr");
    stage.control = None;
    blocks.until("it is tried again every second");
    let line = documents.until("\"error\"").pop().unwrap();
    assert_eq!(serde_json::from_str::<Value>(&line).unwrap()["error"]["exit_code"], 69);
    stage.control = Some(Daemon::start(&config, "control"));
    blocks.until("db1");
    documents.until("\"servers\"");
}

/// Every file below a folder with what could change of it. Left out: what daemons write meanwhile.
fn tree(dir: &Path) -> BTreeSet<String> {
    let mut files = BTreeSet::new();
    let mut folders = vec![dir.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap().flatten() {
            let (path, facts) = (entry.path(), entry.metadata().unwrap());
            if !path.to_string_lossy().contains("control.db") {
                let (size, mode) = (facts.len(), facts.permissions().mode());
                files.insert(format!("{} {size} {mode:o} {:?}", path.display(), facts.modified()));
            }
            if facts.is_dir() {
                folders.push(path);
            }
        }
    }
    files
}

#[test]
fn the_doctor_finds_what_is_wrong_and_changes_nothing() {
    let mut stage = Stage::new();
    // With these exit codes nothing else is wrong on any machine that runs this test.
    let examine = |stage: &Stage, config: &str| {
        let before = tree(stage.site.dir.path());
        let output = stage.command(config, &["doctor", "--json"]).output().unwrap();
        assert_eq!(before, tree(stage.site.dir.path()), "it changes nothing");
        let document: Value = serde_json::from_slice(&output.stdout).unwrap();
        let checks = document["checks"].as_array().unwrap().clone();
        let failed = checks.iter().filter(|check| check["level"] == "fail").count();
        assert_eq!(document["failed"], failed);
        assert_eq!(output.status.code(), Some(i32::from(failed > 0)));
        for check in &checks {
            let remedy = check["remedy"].as_str().unwrap();
            assert_eq!(check["level"] == "ok", remedy.is_empty(), "{check}");
        }
        checks
    };
    let find = |checks: &[Value], name: &str, text: &str| -> Value {
        let found = checks
            .iter()
            .find(|check| check["check"] == name && check["text"].as_str().unwrap().contains(text));
        found.unwrap_or_else(|| panic!("no {name} with {text:?}: {checks:#?}")).clone()
    };
    // The folder of the site changes while its daemons run.
    let examine_server = |stage: &Stage| {
        let output = stage.command("db1", &["doctor", "--json"]).output().unwrap();
        let document: Value = serde_json::from_slice(&output.stdout).unwrap();
        document["checks"].as_array().unwrap().clone()
    };
    let fresh = examine(&stage, "nothing-here");
    find(&fresh, "role", "neither set up nor joined");
    for name in ["kernel", "btf", "bpf-programs", "bpffs", "memlock", "clock", "device"] {
        find(&fresh, name, "");
    }
    let site = examine(&stage, "dr");
    let level = |checks: &[Value], name: &str, text: &str| {
        find(checks, name, text)["level"].as_str().unwrap().to_owned()
    };
    assert_eq!(level(&site, "config", "control, target"), "ok");
    assert_eq!(level(&site, "certificate", "operator: good for 29 d"), "ok");
    assert_eq!(level(&site, "control", "answers the operator"), "ok");
    assert_eq!(level(&site, "daemon", "control runs"), "ok");
    assert_eq!(level(&site, "daemon", "target does not run"), "warn");
    assert_eq!(level(&site, "store-writable", ""), "ok");
    let server = examine(&stage, "db1");
    assert_eq!(level(&server, "control", "answers the agent"), "ok");
    assert_eq!(level(&server, "target", "assigned nothing"), "ok");

    // With a target named: there, and gone.
    stage.protect();
    let poll = stage.agent.run(|agent| agent.agent_poll(0, 0, 0)).unwrap();
    let state = StateDir::open(&stage.site.config("db1").join("state"), "agent").unwrap();
    state.write(ASSIGNMENT, &poll.assignment.unwrap()).unwrap();
    let target = Daemon::start(&stage.site.config("dr"), "target");
    assert_eq!(level(&examine_server(&stage), "target", " answers"), "ok");
    drop(target);
    assert_eq!(level(&examine_server(&stage), "target", "refused"), "fail");

    // Break what can be broken from here, one by one.
    let dr = stage.site.config("dr");
    let key = dr.join("pki/operator.key");
    std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o644)).unwrap();
    let open = examine(&stage, "dr");
    assert_eq!(level(&open, "key", "operator.key: others may read it"), "fail");
    std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o600)).unwrap();
    std::fs::create_dir(dr.join("conf.d")).unwrap();
    std::fs::write(dr.join("conf.d/x.toml"), "[target]\nreserv = '1GiB'\n").unwrap();
    let misspelt = examine(&stage, "dr");
    assert_eq!(level(&misspelt, "config", "x.toml:2: unknown key `reserv`"), "fail");
    std::fs::write(dr.join("conf.d/x.toml"), "[target]\nreserve = '1000TiB'\n").unwrap();
    assert_eq!(level(&examine(&stage, "dr"), "store-space", "full: "), "fail");
    stage.control = None;
    let silent = examine(&stage, "db1");
    assert_eq!(level(&silent, "control", &stage.site.listen.clone()), "fail");
}

/// What a table of exit codes says, each code by a command that ends so.
#[test]
fn every_exit_code_is_used_as_documented() {
    let mut stage = Stage::new();
    let mut seen = BTreeSet::new();
    let mut ends = |stage: &Stage, config: &str, arguments: &[&str], expected: i32| {
        let document = stage.site.run(config, arguments);
        let text = String::from_utf8_lossy(&document.stderr).into_owned();
        assert_eq!(document.status.code(), Some(expected), "{arguments:?}: {text}");
        // Wrong usage is told by the parser, before anybody knows of --json.
        let by_the_parser = expected == 64 && document.stdout.is_empty();
        if expected > 1 && !by_the_parser {
            let document: Value = serde_json::from_slice(&document.stdout).expect(&text);
            assert_eq!(document["error"]["exit_code"], expected, "{arguments:?}");
            let hint = document["error"]["hint"].as_str().unwrap();
            assert!(!hint.is_empty(), "{arguments:?} says nothing to type: {text}");
        }
        seen.insert(expected);
    };
    for arguments in [&["status"][..], &["explain"], &["explain", "--list"], &["config", "check"]] {
        ends(&stage, "dr", arguments, 0);
    }
    for arguments in [
        &["explode"][..],
        &["status", "nobody"],
        &["explain", "nobody"],
        &["points", "nobody"],
        &["cut", "nobody"],
        &["verify", "nobody"],
        &["protect", "db1", "--volumes", "nothing"],
        &["protect", "db1", "--volumes", "sda", "--wait", "--dry-run"],
        &["explain", "--list", "db1"],
        &["config"],
    ] {
        ends(&stage, "dr", arguments, 64);
    }
    for arguments in [
        &["cut", "db1"][..],
        &["verify", "db1"],
        &["unprotect", "db1"],
        &["setup", "--store", "/x"],
    ] {
        ends(&stage, "dr", arguments, 78);
    }
    for arguments in
        [&["status"][..], &["config", "check"], &["replicate"], &["control"], &["target"]]
    {
        ends(&stage, "nothing-here", arguments, 78);
    }
    ends(&stage, "db2", &["join", &stage.site.listen, "--token", "ss1_x"], 77);
    let file = stage.site.config("a-file");
    std::fs::write(&file, "").unwrap();
    let below = file.join("store");
    ends(
        &stage,
        "other",
        &["setup", "--store", below.to_str().unwrap(), "--no-start", "--listen", "127.0.0.1:9"],
        74,
    );
    ends(&stage, "dr", &["control"], 75);

    // What the agent found out ends the command that waits for it.
    stage.protect();
    let orders = |number: u64, state: OrderState| {
        stage.agent_reports(VolumePhase::Following, |_| {}, BTreeMap::from([(number, state)]));
    };
    let differs = OrderResult::Verify {
        volumes: vec![VerifyResult {
            name: "sda".into(),
            compared_bytes: 480 << 30,
            differing_bytes: 4096,
            differing: vec![(8192, 4096)],
        }],
    };
    let told = [
        (&["verify", "db1"][..], OrderState::Done { result: differs }, 65),
        (&["cut", "db1", "--wait"], failed(75), 75),
        (&["cut", "db1", "--wait"], failed(1), 1),
        (&["verify", "db1"], failed(74), 74),
    ];
    for (number, (arguments, state, expected)) in (1..).zip(told) {
        let mut going = Going::start(stage.command("dr", arguments));
        going.until("0 %");
        orders(number, state);
        assert_eq!(going.child.wait().unwrap().code(), Some(expected), "{arguments:?}");
    }
    stage.control = None;
    for arguments in [&["status"][..], &["explain"], &["cut", "db1"], &["token"]] {
        ends(&stage, "dr", arguments, 69);
    }
    ends(&stage, "db1", &["doctor"], 1);
    seen.insert(65);
    assert_eq!(seen, BTreeSet::from([0, 1, 64, 65, 69, 74, 75, 77, 78]));
}

fn failed(exit_code: u8) -> OrderState {
    OrderState::Failed { exit_code, message: "the agent could not".into() }
}
