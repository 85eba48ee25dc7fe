//! The second site as real processes: setup, control, token, join, status. No root, loopback only.

mod site_support;

use serde_json::Value;
use site_support::{Daemon, Site};

fn message(document: &Value) -> &str {
    document["error"]["message"].as_str().unwrap()
}

#[test]
fn from_setup_to_a_joined_server() {
    let (site, made) = Site::setup();
    let token = made["token"].as_str().unwrap();
    assert!(made["fingerprint"].as_str().unwrap().starts_with("SHA256:"));
    assert_eq!(made["page"], format!("https://{}", site.listen));
    let again = ["setup", "--store", "/tmp", "--listen", &site.listen];
    assert!(message(&site.ends("dr", &again, 78)).contains("set up already"));

    // Control is not there yet: said, with the address.
    assert!(message(&site.ends("dr", &["status"], 69)).contains(&site.listen));
    let mut control = Daemon::start(&site.config("dr"), "control");
    let status = site.ends("dr", &["status"], 0);
    assert_eq!(status["servers"].as_array().unwrap().len(), 0);

    // A second one with the same configuration is refused; what runs goes on.
    let second = site.run("dr", &["control"]);
    assert_eq!(second.status.code(), Some(75));
    assert!(String::from_utf8_lossy(&second.stderr).contains(&control.child.id().to_string()));

    // A token of another authority: nothing is sent to this control.
    let foreign = format!("{}{}", &token[..36], "0".repeat(64));
    let join = |config: &str, token: &str, name: &str, code| {
        site.ends(config, &["join", &site.listen, "--token", token, "--name", name], code)
    };
    join("db1", &foreign, "db1", 77);
    let joined = join("db1", token, "db1", 0);
    assert_eq!(joined["name"], "db1");
    assert_eq!(joined["fingerprint"], made["fingerprint"]);
    assert!(joined["inventory"].is_array());
    assert!(message(&join("db2", token, "db2", 77)).contains("used"));
    let next = site.ends("dr", &["token", "--ttl", "5min"], 0);
    let next = next["token"].as_str().unwrap();
    assert!(message(&join("db1", next, "db1", 78)).contains("joined already"));
    join("db2", next, "db2", 0);

    let status = site.ends("dr", &["status", "db1"], 0);
    let server = &status["servers"][0];
    assert_eq!((&server["name"], &server["state"]), (&"db1".into(), &"joined".into()));
    assert!(server["loss_seconds"].is_null());
    assert!(!server["reason"].as_str().unwrap().is_empty());
    assert_eq!(site.ends("dr", &["points", "db1"], 0)["points"].as_array().unwrap().len(), 0);
    site.ends("dr", &["status", "nobody"], 64);
    let wrong = ["protect", "db1", "--volumes", "/dev/no-such-device"];
    assert!(message(&site.ends("dr", &wrong, 64)).contains("/dev/no-such-device"));

    // Killed at any time it comes back; what it knew is still known.
    control.signal("KILL");
    control.child.wait().unwrap();
    let mut control = Daemon::start(&site.config("dr"), "control");
    assert_eq!(site.ends("dr", &["status"], 0)["servers"].as_array().unwrap().len(), 2);
    control.told("WATCHDOG=1");
    control.signal("TERM");
    control.told("STOPPING=1");
    assert!(control.child.wait().unwrap().success());
}
