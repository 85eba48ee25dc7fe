# shellcheck shell=bash disable=SC2154 # from guest/run
# The eBPF tracker under this kernel: its own tests, then the kinds of device that few machines have.
# Each is written at random while it is copied by its marks, then compared with the copy byte for
# byte; the audit is printed, and a difference that it did not see fails.
modprobe -a loop zram dm-mod dm-crypt mq-deadline scsi_mod
a=$(readlink -f /dev/disk/by-id/virtio-a)
b=$(readlink -f /dev/disk/by-id/virtio-b)
sectors=65536

check "the tracker's own tests" "$tests/real_ebpf" --nocapture
note_lines ' blocks taken, |^test result'

followed() { # followed WHAT DEVICE
    check "$1 is followed" followed_here "$(readlink -f "$2")"
    note_lines ' blocks taken, '
}
followed_here() {
    SECONDSITE_LAB_DEVICE=$1 "$tests/real_ebpf" --ignored --exact --nocapture \
        in_the_lab_a_given_device_is_followed || return
    # A filter that matches nothing is green as well.
    grep -q '^test result: ok. 1 passed' "$output" || return
    # A gap is accepted, but not this one: it would come with every bio that is split.
    ! grep 'could not be remembered' "$output"
}

# Requests with numbers of the driver, completed in interrupts, two queues; then with numbers of a
# scheduler.
followed "a virtio disk" "$a"
echo mq-deadline >"/sys/block/${b##*/}/queue/scheduler"
followed "a virtio disk with a scheduler" "$b"

# Bios that are split on their way: pieces in another order, the first at an odd sector.
volume() { # volume NAME: the table comes on stdin
    dmsetup create --noudevsync "$1" && dmsetup mknodes "$1"
}
volume linear <<T
0 32768 linear $a 100001
32768 32768 linear $a 2049
T
followed "a linear volume of two pieces" /dev/mapper/linear
dmsetup remove --noudevsync linear

echo "0 $sectors striped 2 32 $a 0 $b 2049" | volume striped
followed "a volume striped over two disks" /dev/mapper/striped
dmsetup remove --noudevsync striped

key=$(printf '%064d' 7)
echo "0 $sectors crypt aes-xts-plain64 $key 0 $a 2048 1 allow_discards" | volume crypt
followed "an encrypted volume" /dev/mapper/crypt
dmsetup remove --noudevsync crypt

# SCSI: requests that end through another layer, and a scheduler as it comes.
modprobe scsi_debug dev_size_mb=32 delay=0 lbpu=1
modprobe sd_mod
for _ in $(seq 100); do
    scsi=$(grep -l '^scsi_debug' /sys/block/sd*/device/model 2>/dev/null | head -1)
    [ -z "$scsi" ] || break
    sleep 0.1
done
scsi=${scsi#/sys/block/}
followed "a SCSI disk" "/dev/${scsi%%/*}"
