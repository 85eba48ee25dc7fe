# shellcheck shell=bash disable=SC2154 # from guest/run
# What this kernel offers to secondsite, and what secondsite says of it.
kernel=$(uname -r)

check "secondsite answers" secondsite --version
note_lines '^secondsite '
check "the kernel is the lab's, 6.12" test "${kernel#6.12.}" != "$kernel"

# doctor exits with 0 where nothing fails; a warning is none.
doctor() { secondsite doctor 2>&1 | tee /run/doctor; return "${PIPESTATUS[0]}"; }
check "doctor finds nothing that fails" doctor
says() { grep -E "^ *ok +$1 +$2" /run/doctor || { cat /run/doctor; return 1; }; }
check "doctor: this kernel" says kernel "${kernel//+/\\+}"
check "doctor: types of the kernel" says btf /sys/kernel/btf/vmlinux
check "doctor: programs are taken" says bpf-programs "the kernel takes the programs"
check "doctor: pins have a place" says bpffs "/sys/fs/bpf is mounted"
for disk in a b; do
    check "doctor: disk $disk" says device "$(readlink -f /dev/disk/by-id/virtio-$disk) .*eBPF"
done

check "ublk_drv loads" modprobe ublk_drv
check "/dev/ublk-control is there" test -c /dev/ublk-control
check "device-mapper answers" dmsetup version
note_lines '^(Library|Driver) version'
