//! Control commands of ublk, one at a time, through a small ring on /dev/ublk-control.
//!
//! Used when devices are made, taken over and removed; never on the path of data.

use super::UblkError;
use super::abi::{
    self, ControlCommand, DeviceInfo, F_CMD_IOCTL_ENCODE, F_USER_RECOVERY, F_USER_RECOVERY_REISSUE,
    Params,
};
use io_uring::{IoUring, cqueue, opcode, squeue, types};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

/// Where the commands go.
const NODE: &str = "/dev/ublk-control";
/// What a kernel must have: 6.1 has the recovery, 6.5 the encoding and how to ask.
const NEEDED: u64 = F_USER_RECOVERY | F_USER_RECOVERY_REISSUE | F_CMD_IOCTL_ENCODE;
/// Between two looks at a device whose last server is still going.
const POLL: Duration = Duration::from_millis(2);

/// The way to give commands.
pub struct Control {
    file: File,
    ring: IoUring<squeue::Entry128, cqueue::Entry>,
    features: u64,
}

impl Control {
    /// Opens it and asks what this kernel can do.
    pub fn open() -> Result<Self, UblkError> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_CLOEXEC)
            .open(NODE)
            .map_err(|error| {
                let failed = UblkError::new("open", NODE, &error);
                match error.raw_os_error() {
                    Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => failed
                        .cause("this kernel has no ublk (CONFIG_BLK_DEV_UBLK, 6.5 or later)")
                        .hint("modprobe ublk_drv"),
                    _ => failed,
                }
            })?;
        let ring = IoUring::builder().build(4).map_err(|error| ring_refused(NODE, &error))?;
        let mut control = Self { file, ring, features: 0 };
        let mut features = 0u64;
        let address = &raw mut features;
        control
            .command(
                abi::GET_FEATURES,
                ControlCommand {
                    dev_id: u32::MAX,
                    len: 8,
                    addr: address as u64,
                    ..Default::default()
                },
            )
            .map_err(|error| {
                UblkError::new("ask for the features of ublk", NODE, &error)
                    .cause("ublk of this kernel is too old: 6.5 or later is needed")
            })?;
        if features & NEEDED != NEEDED {
            let error = io::Error::from_raw_os_error(libc::EOPNOTSUPP);
            return Err(UblkError::new("ask for the features of ublk", NODE, &error)
                .cause(format!("user recovery is missing (features {features:#x})")));
        }
        control.features = features;
        Ok(control)
    }

    /// The kernel's feature bits.
    pub fn features(&self) -> u64 {
        self.features
    }

    /// Makes a device that nobody serves yet; the kernel chooses its number.
    pub fn add(&mut self, wanted: DeviceInfo) -> io::Result<DeviceInfo> {
        let mut info = DeviceInfo { dev_id: u32::MAX, ..wanted };
        let address = &raw mut info;
        self.command(
            abi::ADD_DEV,
            ControlCommand {
                dev_id: u32::MAX,
                len: size_of::<DeviceInfo>() as u16,
                addr: address as u64,
                ..Default::default()
            },
        )?;
        Ok(info)
    }

    /// Sets the limits of a device that is not started.
    pub fn set_params(&mut self, id: u32, params: &Params) -> io::Result<()> {
        let mut params = Params { len: size_of::<Params>() as u32, ..*params };
        self.on_params(abi::SET_PARAMS, id, &mut params)
    }

    /// The limits of a device.
    pub fn params(&mut self, id: u32) -> io::Result<Params> {
        let mut params = Params { len: size_of::<Params>() as u32, ..Default::default() };
        self.on_params(abi::GET_PARAMS, id, &mut params)?;
        Ok(params)
    }

    fn on_params(&mut self, op: u32, id: u32, params: &mut Params) -> io::Result<()> {
        self.command(
            op,
            ControlCommand {
                dev_id: id,
                len: size_of::<Params>() as u16,
                addr: std::ptr::from_mut(params) as u64,
                ..Default::default()
            },
        )
    }

    /// What the kernel says of a device; none if there is no such device.
    pub fn info(&mut self, id: u32) -> io::Result<Option<DeviceInfo>> {
        let mut info = DeviceInfo::default();
        // The path comes first: the kernel checks its owner, and takes it off.
        let path = format!("/dev/ublkc{id}\0");
        let head = path.len();
        let mut buffer = vec![0u8; head + size_of::<DeviceInfo>()];
        buffer[..head].copy_from_slice(path.as_bytes());
        let answer = self.command(
            abi::GET_DEV_INFO2,
            ControlCommand {
                dev_id: id,
                len: buffer.len() as u16,
                addr: buffer.as_mut_ptr() as u64,
                dev_path_len: head as u16,
                ..Default::default()
            },
        );
        match answer {
            Ok(()) => {}
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENODEV | libc::EINVAL)) => {
                return Ok(None);
            }
            Err(error) => return Err(error),
        }
        let bytes = &buffer[head..];
        // SAFETY: `info` is plain numbers of exactly this length.
        unsafe {
            std::ptr::copy_nonoverlapping(
                bytes.as_ptr(),
                (&raw mut info).cast::<u8>(),
                size_of::<DeviceInfo>(),
            );
        }
        Ok(Some(info))
    }

    /// All devices of ublk that this machine has now, whoever made them.
    pub fn devices(&mut self) -> io::Result<Vec<DeviceInfo>> {
        let mut found = Vec::new();
        let entries = match std::fs::read_dir("/sys/class/ublk-char") {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(found),
            Err(error) => return Err(error),
        };
        for entry in entries {
            let name = entry?.file_name();
            let id = name.to_string_lossy().strip_prefix("ublkc").and_then(|id| id.parse().ok());
            if let Some(id) = id {
                found.extend(self.info(id)?);
            }
        }
        found.sort_by_key(|info| info.dev_id);
        Ok(found)
    }

    /// Makes the block device appear. All fetches of all queues must be under way.
    pub fn start(&mut self, id: u32) -> io::Result<()> {
        self.with_pid(abi::START_DEV, id)
    }

    /// Lets the requests go on that waited since the last server went.
    pub fn end_recovery(&mut self, id: u32) -> io::Result<()> {
        self.with_pid(abi::END_USER_RECOVERY, id)
    }

    fn with_pid(&mut self, op: u32, id: u32) -> io::Result<()> {
        let data = u64::from(std::process::id());
        self.command(op, ControlCommand { dev_id: id, data, ..Default::default() })
    }

    /// Begins to take a device over. Waits until nothing of its last server is left: every ring
    /// that held the character device is gone, and with it every write of that server.
    pub fn start_recovery(&mut self, id: u32, patience: Duration) -> io::Result<()> {
        let end = Instant::now() + patience;
        loop {
            let command = ControlCommand { dev_id: id, ..Default::default() };
            match self.command(abi::START_USER_RECOVERY, command) {
                Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
                    if Instant::now() >= end {
                        return Err(error);
                    }
                    std::thread::sleep(POLL);
                }
                // A server died after it had begun and before all its fetches were under way:
                // the kernel has forgotten the one before, and needs no second beginning.
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => return Ok(()),
                answer => return answer,
            }
        }
    }

    /// Takes the block device away. What was not answered fails.
    pub fn stop(&mut self, id: u32) -> io::Result<()> {
        self.command(abi::STOP_DEV, ControlCommand { dev_id: id, ..Default::default() })
    }

    /// Removes a stopped device. Waits until its character device is closed.
    pub fn delete(&mut self, id: u32) -> io::Result<()> {
        self.command(abi::DEL_DEV, ControlCommand { dev_id: id, ..Default::default() })
    }

    fn command(&mut self, op: u32, command: ControlCommand) -> io::Result<()> {
        let command = ControlCommand { queue_id: u16::MAX, ..command };
        let entry = opcode::UringCmd80::new(types::Fd(self.file.as_raw_fd()), op)
            .cmd(command.bytes())
            .build();
        // SAFETY: what `addr` points to belongs to the caller, who waits here for the completion.
        unsafe { self.ring.submission().push(&entry) }.expect("one command at a time");
        loop {
            match self.ring.submit_and_wait(1) {
                Ok(_) => {}
                Err(error) if error.raw_os_error() == Some(libc::EINTR) => {}
                Err(error) => return Err(error),
            }
            if let Some(done) = self.ring.completion().next() {
                return match done.result() {
                    0.. => Ok(()),
                    error => Err(io::Error::from_raw_os_error(-error)),
                };
            }
        }
    }
}

/// Why no ring can be had, with what allows it.
pub(super) fn ring_refused(subject: impl AsRef<Path>, error: &io::Error) -> UblkError {
    let failed = UblkError::new("set up io_uring", subject, error);
    let disabled = std::fs::read_to_string("/proc/sys/kernel/io_uring_disabled");
    match (error.raw_os_error(), disabled) {
        (Some(libc::EPERM), Ok(text)) if text.trim() != "0" => failed
            .cause(format!("io_uring is forbidden: kernel.io_uring_disabled is {}", text.trim()))
            .hint("sysctl kernel.io_uring_disabled=0"),
        (Some(libc::ENOSYS), _) => failed.cause("this kernel has no io_uring"),
        _ => failed,
    }
}
