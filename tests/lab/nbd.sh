# shellcheck shell=bash disable=SC2154 # from guest/run
# The kernel's own NBD client on our server, over an overlay: a file system is made, used from many
# connections, checked, and still there after the server was killed.
mkdir -p /run/nbd/overlay /mnt/nbd
truncate -s 512M /run/nbd/base
socket=/run/nbd/socket
serve() {
    SECONDSITE_NBD="$socket /run/nbd/base /run/nbd/overlay" \
        "$tests/nbd_clients" --ignored --exact serve >>/run/nbd/log 2>&1 &
    server=$!
    timeout 60 bash -c "until nbdinfo --size 'nbd+unix:///disk?socket=$socket'; do sleep 0.1; done" >/dev/null 2>&1
}
connect() { timeout 30 nbd-client -unix "$socket" /dev/nbd0 -N disk -C 4 -b 512; }
disconnect() { timeout 30 nbd-client -d /dev/nbd0; }
setting() { [ "$(cat "/sys/block/nbd0/queue/$1")" "$2" "$3" ]; }

modprobe nbd nbds_max=1
check "the server starts" serve
check "the kernel connects, four times" connect
check "it has its size" test "$(blockdev --getsize64 /dev/nbd0)" -eq $((512 << 20))
check "it discards" setting discard_max_bytes -gt 0
check "it flushes" setting write_cache = 'write back'
check "a file system is made" mkfs.ext4 -q /dev/nbd0
check "and mounted" mount -o discard /dev/nbd0 /mnt/nbd
check "it is written" cp -r /usr/share/common-licenses /etc /mnt/nbd/
dd if=/dev/urandom of=/mnt/nbd/random bs=1M count=32 conv=fsync status=none
check "with many requests in flight" fio --name=lab --directory=/mnt/nbd --rw=randrw --bs=4k --size=8m \
    --numjobs=4 --ioengine=psync --direct=1 --verify=crc32c --verify_state_save=0 --fsync=32 --group_reporting
check "it is trimmed" bash -c 'rm -r /mnt/nbd/etc && fstrim /mnt/nbd'
sum=$(sha256sum </mnt/nbd/random)
check "unmounted" umount /mnt/nbd
check "and whole" fsck.ext4 -fn /dev/nbd0
check "the kernel leaves" disconnect
kill -KILL "$server"
check "a server that was killed starts again" serve
check "the kernel connects again" connect
check "the file system is whole" fsck.ext4 -fn /dev/nbd0
check "and mounted again" mount -o ro /dev/nbd0 /mnt/nbd
check "with what was written" test "$(sha256sum </mnt/nbd/random)" = "$sum"
check "all of it" diff -r /usr/share/common-licenses /mnt/nbd/common-licenses
umount /mnt/nbd

# What udev makes of points and replicas: nobody looks at what is on them. The file of the target
# says that this is a second site.
mkdir -p /run/udev/rules.d /etc/secondsite /run/store/servers/1/2 /run/secondsite/points/db1
cp packaging/udev/59-secondsite-replicas.rules /run/udev/rules.d/
properties() { udevadm test --action=change "/sys/class/block/${1##*/}" 2>/dev/null; }
is_linked() { properties "$1" | grep '^DEVLINKS=.*by-uuid/'; }
is_hidden() {
    properties "$1" >/run/properties
    cat /run/properties
    ! grep -E 'by-label|by-uuid|^ID_FS' /run/properties && grep -qx 'SYSTEMD_READY=0' /run/properties &&
        grep -qx 'UDISKS_IGNORE=1' /run/properties && grep -qx 'DM_UDEV_DISABLE_OTHER_RULES_FLAG=1' /run/properties
}
check "udev: elsewhere an nbd device has its links" is_linked /dev/nbd0
touch /etc/secondsite/target.toml
check "udev: on a second site it has none" is_hidden /dev/nbd0
modprobe loop
for file in /run/elsewhere /run/store/servers/1/2/replica.img /run/secondsite/points/db1/sda; do
    truncate -s 16M "$file"
    mkfs.ext4 -q "$file"
    loop=$(losetup --find --show "$file")
    if [ "$file" = /run/elsewhere ]; then hidden=is_linked; else hidden=is_hidden; fi
    check "udev: a loop device on $file: $hidden" "$hidden" "$loop"
    losetup -d "$loop"
done
check "the base was never written" cmp -n $((512 << 20)) /run/nbd/base /dev/zero
disconnect >/dev/null
kill "$server"
