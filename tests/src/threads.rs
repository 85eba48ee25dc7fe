//! Single threads of another process: which there are, what they wait for, and one held still while
//! the others go on, as a thread that hangs would be.

use nix::unistd::Pid;
use std::fs::read_to_string;

/// Threads of a process whose name starts with `name`.
pub fn named(process: Pid, name: &str) -> Vec<Pid> {
    let tasks = std::fs::read_dir(format!("/proc/{process}/task")).expect("it runs");
    let ids = tasks.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    ids.filter(|id: &i32| {
        let comm = read_to_string(format!("/proc/{process}/task/{id}/comm")).unwrap_or_default();
        comm.starts_with(name)
    })
    .map(Pid::from_raw)
    .collect()
}

/// The number of the system call that a thread waits in; none while it computes.
pub fn system_call(process: Pid, thread: Pid) -> Option<i64> {
    let text = read_to_string(format!("/proc/{process}/task/{thread}/syscall")).ok()?;
    text.split(' ').next()?.parse().ok()
}

/// Threads held still; let go when dropped.
pub struct Held(Vec<Pid>);

impl Held {
    /// Holds these threads.
    pub fn new(threads: Vec<Pid>) -> Self {
        assert!(!threads.is_empty(), "there is something to hold");
        for thread in &threads {
            ptrace(libc::PTRACE_SEIZE, *thread);
            ptrace(libc::PTRACE_INTERRUPT, *thread);
            // SAFETY: waits for a thread that is ours to trace; no status wanted.
            let stopped =
                unsafe { libc::waitpid(thread.as_raw(), std::ptr::null_mut(), libc::__WALL) };
            assert_eq!(stopped, thread.as_raw(), "{}", std::io::Error::last_os_error());
        }
        Self(threads)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.0.iter().for_each(|thread| ptrace(libc::PTRACE_DETACH, *thread));
    }
}

fn ptrace(request: libc::c_uint, thread: Pid) {
    // SAFETY: these requests read and write no memory of this process.
    let done = unsafe { libc::ptrace(request, thread.as_raw(), 0, 0) };
    assert_eq!(done, 0, "ptrace {request} of {thread}: {}", std::io::Error::last_os_error());
}
