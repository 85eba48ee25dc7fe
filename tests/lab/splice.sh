# shellcheck shell=bash disable=SC2154 # from guest/run
# A filter's place under device-mapper volumes that are in use: the tracker's own tests, one process
# each, then what udev makes of the device below.
modprobe -a dm-mod dm-crypt dm-delay dm-snapshot dm-era dm-raid dm-multipath dm-round-robin loop
mkdir -p /run/lock/lvm

in_the_lab() { # in_the_lab TEST
    "$tests/real_splice" --ignored --exact --nocapture "in_the_lab_$1" &&
        # A filter that matches nothing is green as well.
        grep -q '^test result: ok. 1 passed' "$output"
}
for test in in_and_out_under_a_writer a_mounted_file_system_stays_whole each_step_may_be_repeated \
    what_cannot_be_spliced_is_refused another_table_is_noticed writes_beside_the_filter_are_counted \
    a_slow_disk_is_not_waited_for nobodys_death_leaves_it_suspended \
    a_swapper_killed_at_any_moment_changes_all_or_nothing what_lvm_does_is_noticed; do
    check "${test//_/ }" in_the_lab "$test"
    note_lines '^-- ' | sed 's/^-- -- /-- /'
done

# The same content three times: a volume, the device below it, and a disk that is marked or not.
b=$(readlink -f /dev/disk/by-id/virtio-b)
mkdir -p /run/udev/rules.d /run/secondsite/filtered
cp packaging/udev/59-secondsite-filtered.rules /run/udev/rules.d/
mkfs.ext4 -q -F -L payroll "$b"
blockdev --flushbufs "$b"
for name in v secondsite-t1-below; do
    dmsetup create --noudevsync "$name" --table "0 65536 linear $b 0"
done
properties() { # properties DEVICE: what udev makes of an event of it
    udevadm test --action=change "/sys/dev/block/$(stat -Lc '%Hr:%Lr' "$1")" 2>/dev/null
}
dmsetup mknodes
is_linked() { properties "$1" | grep '^DEVLINKS=.*by-label/payroll'; }
is_hidden() {
    properties "$1" >/run/properties
    cat /run/properties
    ! grep -E 'by-label|by-uuid|^ID_FS' /run/properties && grep -qx 'SYSTEMD_READY=0' /run/properties &&
        grep -qx 'UDISKS_IGNORE=1' /run/properties && grep -qx 'DM_UDEV_DISABLE_OTHER_RULES_FLAG=1' /run/properties
}
check "udev: the volume keeps its links" is_linked /dev/mapper/v
check "udev: the device below has none" is_hidden /dev/mapper/secondsite-t1-below
check "udev: a disk has its links" is_linked "$b"
mark=/run/secondsite/filtered/$(cat "/sys/class/block/${b##*/}/dev")
touch "$mark"
check "udev: a marked disk has none by content" is_hidden "$b"
has_its_id() { properties "$b" | grep '^DEVLINKS=.*by-id/virtio-b'; }
check "udev: a marked disk keeps those by hardware" has_its_id
dmsetup remove --noudevsync v
dmsetup remove --noudevsync secondsite-t1-below
