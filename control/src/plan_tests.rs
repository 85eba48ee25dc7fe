//! What `protect` chooses and refuses.

use super::*;

fn device(name: &str, kind: &str, parent: &str) -> InventoryDevice {
    InventoryDevice {
        name: name.to_owned(),
        path: format!("/dev/{name}"),
        kind: kind.to_owned(),
        size_bytes: 1 << 30,
        used_by: String::new(),
        swap: Vec::new(),
        parent: parent.to_owned(),
        trackers: vec!["ebpf".to_owned(), "compare".to_owned()],
        refused: String::new(),
    }
}

fn request(volumes: &[&str]) -> ProtectRequest {
    ProtectRequest {
        volumes: volumes.iter().map(|name| (*name).to_owned()).collect(),
        goal_seconds: 30,
        keep: "none".to_owned(),
        tracker: TrackerChoice::Auto,
        reserve: None,
        block_bytes: None,
        include_swap: false,
        dry_run: false,
    }
}

fn machine() -> Vec<InventoryDevice> {
    let mut sda = device("sda", "disk", "");
    sda.swap = vec![("sda3".to_owned(), 4096, 8192)];
    let mut sdb = device("sdb", "disk", "");
    sdb.trackers.clear();
    sdb.refused = "a member of md0: protect md0".to_owned();
    vec![
        device("loop3", "loop", ""),
        device("loop3p1", "part", "loop3"),
        device("sda1", "part", "sda"),
        sda,
        device("vg0/root", "lvm", "sda1"),
        device("md0", "raid", "sdb"),
        sdb,
    ]
}

fn taken(name: &str) -> Taken {
    Taken { name: name.to_owned(), path: format!("/dev/{name}"), reserve: None }
}

fn names(plan: &Plan) -> Vec<&str> {
    plan.chosen.iter().map(|chosen| chosen.planned.name.as_str()).collect()
}

#[test]
fn all_takes_whole_disks_and_what_lies_on_refused_ones() {
    let plan = plan("db1", &machine(), &[], &request(&["all"])).unwrap();
    assert_eq!(names(&plan), ["sda", "md0"]);
    assert_eq!(plan.left_out, ["sdb: a member of md0: protect md0"]);
    assert_eq!(plan.chosen[0].excluded, [(4096, 8192)]);
    assert_eq!(plan.chosen[0].planned.skipped_swap, [("sda3".to_owned(), 8192)]);
}

#[test]
fn all_leaves_out_what_is_protected() {
    let plan = plan("db1", &machine(), &[taken("vg0/root")], &request(&["all"])).unwrap();
    assert_eq!(names(&plan), ["md0"]);
    assert!(plan.left_out.contains(&"sda: vg0/root is protected already".to_owned()));
}

#[test]
fn a_loop_device_only_by_name() {
    let chosen = plan("db1", &machine(), &[], &request(&["/dev/loop3"])).unwrap();
    assert_eq!(names(&chosen), ["loop3"]);
    let refused = plan("db1", &machine()[..1], &[], &request(&["all"])).unwrap_err();
    assert_eq!(refused.problem().exit_code, exit::UNAVAILABLE);
}

#[test]
fn what_overlaps_is_refused_by_name() {
    let message = |volumes: &[&str], taken: &[Taken]| {
        plan("db1", &machine(), taken, &request(volumes)).unwrap_err().problem().message.clone()
    };
    assert_eq!(message(&["sda"], &[taken("sda")]), "/dev/sda of db1 is protected already");
    for (wished, there) in [("vg0/root", "sda"), ("sda", "vg0/root"), ("sda1", "vg0/root")] {
        let message = message(&[wished], &[taken(there)]);
        assert!(message.contains(&format!("overlaps /dev/{there}")), "{message}");
    }
    assert!(message(&["sda", "sda1"], &[]).contains("overlap"));
    assert!(message(&["sdz"], &[]).contains("has offered no device \"sdz\""));
    assert!(message(&["sdb"], &[]).contains("a member of md0"));
}

#[test]
fn a_wished_tracker_or_nothing() {
    let mut inventory = machine();
    inventory[3].trackers.remove(0);
    inventory[3].refused = "the kernel has no BTF".to_owned();
    let with = |tracker| ProtectRequest { tracker, ..request(&["sda"]) };
    let refused = plan("db1", &inventory, &[], &with(TrackerChoice::Ebpf)).unwrap_err();
    assert_eq!(refused.problem().exit_code, exit::UNAVAILABLE);
    assert!(refused.problem().message.contains("the kernel has no BTF"));
    let auto = plan("db1", &inventory, &[], &with(TrackerChoice::Auto)).unwrap();
    assert_eq!(auto.chosen[0].planned.tracker, "compare");
}

#[test]
fn block_sizes_and_retention_are_checked() {
    let exit_code = |request: &ProtectRequest| {
        plan("db1", &machine(), &[], request).unwrap_err().problem().exit_code
    };
    for block_bytes in [0, 512, 5000, 2 << 20] {
        let request = ProtectRequest { block_bytes: Some(block_bytes), ..request(&["sda"]) };
        assert_eq!(exit_code(&request), exit::USAGE, "{block_bytes}");
    }
    let kept = ProtectRequest { keep: "7d,24h".to_owned(), ..request(&["sda"]) };
    assert_eq!(exit_code(&kept), exit::USAGE);
    let mut inventory = machine();
    let block = |inventory: &[InventoryDevice]| {
        plan("db1", inventory, &[], &request(&["sda"])).unwrap().chosen[0].planned.block_bytes
    };
    inventory[3].size_bytes = 4 << 40;
    assert_eq!(block(&inventory), 4096);
    inventory[3].size_bytes += 512;
    assert_eq!(block(&inventory), 16384);
}

#[test]
fn swap_is_shipped_on_request() {
    let request = ProtectRequest { include_swap: true, ..request(&["sda"]) };
    let plan = plan("db1", &machine(), &[], &request).unwrap();
    assert!(plan.chosen[0].excluded.is_empty() && plan.chosen[0].planned.skipped_swap.is_empty());
}

#[test]
fn a_reserve_is_a_device_that_nothing_else_is_on() {
    let mut inventory = machine();
    for at in [2, 3, 4] {
        inventory[at].trackers.push("ublk".to_owned());
    }
    let mut sdc = device("sdc", "disk", "");
    sdc.trackers.push("ublk".to_owned());
    inventory.push(sdc);
    inventory.push(device("sdd", "disk", ""));
    let with = |volumes: &[&str], reserve: &str| ProtectRequest {
        tracker: TrackerChoice::Ublk,
        reserve: Some(reserve.to_owned()),
        ..request(volumes)
    };
    let said = |inventory: &[InventoryDevice], taken: &[Taken], request: &ProtectRequest| {
        let refused = plan("db1", inventory, taken, request).unwrap_err();
        refused.problem().message.clone()
    };
    let good = plan("db1", &inventory, &[], &with(&["sdc"], "sdd")).unwrap();
    assert_eq!((names(&good), good.reserve.as_deref()), (vec!["sdc"], Some("/dev/sdd")));

    let none = said(&inventory, &[], &with(&["sdc"], "/dev/none"));
    assert!(none.contains("has offered no device"), "{none}");
    for (volume, reserve) in [("sdc", "sdc"), ("sda", "vg0/root"), ("sda1", "sda")] {
        let own = said(&inventory, &[], &with(&[volume], reserve));
        assert!(own.contains("reserve of the filter"), "{volume} {reserve}: {own}");
    }
    let on_taken = said(&inventory, &[taken("sda")], &with(&["sdc"], "vg0/root"));
    assert!(on_taken.contains("sda is protected"), "{on_taken}");
    let with_reserve = |reserve: &str| Taken { reserve: Some(reserve.into()), ..taken("sda") };
    let second = said(&inventory, &[with_reserve("/dev/loop3")], &with(&["sdc"], "sdd"));
    assert!(second.contains("a reserve already: /dev/loop3"), "{second}");
    plan("db1", &inventory, &[with_reserve("/dev/sdd")], &with(&["sdc"], "sdd")).unwrap();
    let reused = said(&inventory, &[with_reserve("/dev/sdd")], &request(&["sdd"]));
    assert!(reused.contains("it is the reserve"), "{reused}");
    let beside = ProtectRequest { tracker: TrackerChoice::Ebpf, ..with(&["sdc"], "sdd") };
    assert!(said(&inventory, &[], &beside).contains("--reserve is for a filter"));
    let all = plan("db1", &inventory, &[with_reserve("/dev/sdd")], &request(&["all"])).unwrap();
    assert!(!names(&all).contains(&"sdd"), "{:?}", names(&all));
    inventory.last_mut().unwrap().used_by = "mounted on /srv".to_owned();
    let used = said(&inventory, &[], &with(&["sdc"], "sdd"));
    assert!(used.contains("in use: mounted on /srv"), "{used}");
}
