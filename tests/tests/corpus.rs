//! Every file of the fuzzers' corpus goes through the decoder that it was kept for. Among them is
//! what fuzzing once found.
//!
//! `SECONDSITE_BLESS=1 cargo test --release -p secondsite-tests --test corpus` writes the seeds
//! anew from the golden files.

#[path = "../../replicator/format/tests/format/allocations.rs"]
mod allocations;

use rustls::pki_types::pem::PemObject;
use secondsite_tests::decoders::ALL;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// Nothing that is read takes more at once, bytes: a frame's body, what it unpacks to, and room.
const ALLOCATION_BYTES_MAX: usize = 16 << 20;

/// The whole corpus stays small: bytes.
const CORPUS_BYTES_MAX: u64 = 300 << 10;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn corpus() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus")
}

fn files(dir: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display()));
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files
}

#[test]
fn the_corpus_harms_nothing() {
    if std::env::var_os("SECONDSITE_BLESS").is_some() {
        seed();
    }
    let mut total_bytes = 0;
    for (name, decoder) in ALL {
        let files = files(&corpus().join(name));
        assert!(!files.is_empty(), "{name} has no corpus");
        for file in files {
            let bytes = std::fs::read(&file).unwrap();
            total_bytes += bytes.len() as u64;
            allocations::forget();
            if std::panic::catch_unwind(|| decoder(&bytes)).is_err() {
                panic!("{} does harm; see above", file.display());
            }
            let largest = allocations::largest();
            assert!(largest <= ALLOCATION_BYTES_MAX, "{}: {largest} bytes", file.display());
        }
    }
    assert!(total_bytes <= CORPUS_BYTES_MAX, "the corpus has {total_bytes} bytes");
}

#[test]
fn every_decoder_has_a_fuzz_target() {
    let named: BTreeSet<String> = files(&corpus().join("../fuzz_targets"))
        .iter()
        .map(|file| file.file_stem().unwrap().to_str().unwrap().to_owned())
        .collect();
    assert_eq!(named, ALL.iter().map(|(name, _)| name.to_string()).collect());
}

/// Golden files as first inputs: what is valid leads deep.
fn seed() {
    let format = root().join("replicator/format/tests/golden");
    let stored = root().join("replicator/tests/golden");
    let api = root().join("control/tests/golden");
    let read = |path: PathBuf| std::fs::read(&path).unwrap_or_else(|e| panic!("{path:?}: {e}"));
    let unhex = |path: PathBuf| -> Vec<u8> {
        let text = String::from_utf8(read(path)).unwrap();
        text.split_whitespace().map(|byte| u8::from_str_radix(byte, 16).unwrap()).collect()
    };
    let put = |decoder: &str, name: &str, bytes: &[&[u8]]| {
        std::fs::create_dir_all(corpus().join(decoder)).unwrap();
        std::fs::write(corpus().join(decoder).join(name), bytes.concat()).unwrap();
    };
    for file in files(&format) {
        let name = file.file_stem().unwrap().to_str().unwrap().to_owned();
        if name == "digests" {
            continue;
        }
        let bytes = unhex(file);
        put("frame", &name, &[&bytes]);
        let body = &bytes[80..];
        match name.split('-').next().unwrap() {
            "data" => put("extents", &name, &[&(1u64 << 30).to_le_bytes(), body]),
            "commit" => put("manifest", &name, &[body]),
            kind => {
                let kinds = ["hello", "welcome", "request", "reply", "refusal"];
                let at = kinds.iter().position(|known| *known == kind).unwrap();
                put("message", &name, &[&[at as u8], body]);
            }
        }
    }
    let segment = unhex(stored.join("segment.hex"));
    put("journal", "mended", &[&[0], &segment]);
    put("journal", "as-it-is", &[&[1], &segment]);
    put("journal", "cut-short", &[&[0], &segment[..segment.len() - 9]]);
    for name in ["fresh", "copying", "copied", "promoting", "promoted"] {
        put("state", name, &[&read(stored.join(format!("state-{name}.json")))]);
    }
    let documents = [
        (0, stored.join("agent-assignment.json")),
        (1, stored.join("agent-orders.json")),
        (2, stored.join("agent-enrolment.json")),
        (3, stored.join("target-assignment.json")),
        (4, api.join("agent-poll.json")),
        (5, api.join("target-poll.json")),
        (6, api.join("agent-report.json")),
        (7, api.join("target-report.json")),
        (8, api.join("inventory.json")),
    ];
    for (kind, path) in documents {
        let name = path.file_stem().unwrap().to_str().unwrap().to_owned();
        put("document", &name, &[&[kind], &read(path)]);
    }
    put("header", "golden", &[&unhex(root().join("tracker/tests/golden/header.hex"))]);
    let id = "0123456789abcdef0123456789abcdef";
    for (name, text) in [
        ("agent", format!("secondsite:agent:{id}")),
        ("operator", "secondsite:operator:admin".into()),
        ("control", "secondsite:control".into()),
        ("token", format!("ss1_{}", id.repeat(3))),
        ("fingerprint", format!("SHA256:{}", id.repeat(2))),
        ("id", id.into()),
    ] {
        put("name", name, &[text.as_bytes()]);
    }
    for role in ["control", "target", "agent"] {
        put("config", role, &[&read(stored.join(format!("{role}.toml")))]);
    }
    let fixtures = root().join("replicator/src/inventory/fixtures");
    for name in ["server", "loop"] {
        put("inventory", name, &[&read(fixtures.join(format!("{name}.json")))]);
    }
    let lines = "36 35 98:0 / /mnt/a\\040b rw,noatime shared:1 master:2 - ext4 /dev/sd\\011x rw\n\
                 22 1 0:21 / /proc rw - proc proc rw\n";
    put("mountinfo", "lines", &[lines.as_bytes()]);
    let folder = tempfile::tempdir().unwrap();
    let request = secondsite_control::setup::SetupRequest::new(
        folder.path().join("pki"),
        folder.path().join("control.db"),
        "127.0.0.1:7443".parse().unwrap(),
        vec!["localhost".into()],
    );
    secondsite_control::setup::setup(&request).unwrap();
    for name in ["ca", "control", "target", "operator"] {
        let pem = read(folder.path().join(format!("pki/{name}.pem")));
        let der = rustls::pki_types::CertificateDer::from_pem_slice(&pem).unwrap();
        put("certificate", name, &[&der]);
    }
}
