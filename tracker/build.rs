//! Compiles the programs that mark, with clang, into one BPF object.

use std::path::PathBuf;
use std::process::{Command, ExitCode};

const SOURCE: &str = "bpf/tracker.bpf.c";

fn main() -> ExitCode {
    println!("cargo:rerun-if-changed={SOURCE}");
    println!("cargo:rerun-if-env-changed=CLANG");
    let clang = std::env::var("CLANG").unwrap_or_else(|_| "clang".into());
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let status = Command::new(&clang)
        .args(["-O2", "-g", "-Wall", "-Werror", "-target", "bpf", "-mcpu=v3", "-c", SOURCE, "-o"])
        .arg(out.join("tracker.bpf.o"))
        .status();
    match status {
        Ok(status) if status.success() => ExitCode::SUCCESS,
        Ok(status) => {
            eprintln!("{clang} could not compile {SOURCE} for BPF: {status}");
            ExitCode::FAILURE
        }
        Err(cause) => {
            eprintln!(
                "{clang}: {cause}. The programs that mark are compiled with clang: \
                 install it (Debian: apt install clang), or name one in CLANG."
            );
            ExitCode::FAILURE
        }
    }
}
