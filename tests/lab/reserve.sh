# shellcheck shell=bash disable=SC2154 # from guest/run
# The reserve of filtered volumes: what is refused, what is spilled, what is sent after a power cut,
# and that a reserve which fails is nobody's error.
modprobe -a ublk_drv dm-mod ext4 loop
a=$(readlink -f /dev/disk/by-id/virtio-a)
b=$(readlink -f /dev/disk/by-id/virtio-b)
dir=/run/reserve list=/run/reserve.volumes
filter() { timeout 60 secondsite filter --dir "$dir" "$@"; }
await() { # await SECONDS COMMAND...
    local end=$((SECONDS + $1))
    shift
    until "$@"; do
        [ "$SECONDS" -lt "$end" ] || return 1
        sleep 0.2
    done
}
fails_with() { # fails_with TEXT COMMAND...
    local text=$1
    shift
    ! "$@" >/run/said 2>&1 && cat /run/said && grep -q "$text" /run/said
}
start() {
    secondsite filter --preserve=16KiB --dir "$dir" --list "$list" 2>>/run/reserve.log &
    await 30 filter --ask hello
}
check "the filter runs" start

# ---- what is no reserve
blank() { dd if=/dev/zero of="$b" bs=1M count=1 oflag=direct conv=notrunc status=none; }
addpart "$a" 1 2048 196608
addpart "$a" 2 200704 2048
addpart "$a" 3 204800 16384
volume=${a}1
add() { filter --ask "add $1 $volume data 4096 $2"; }
mkfs.ext4 -q "$b"
check "a file system" fails_with 'carries an ext file system' add v1 "$b"
mkdir -p /mnt/b
mount "$b" /mnt/b
check "a mounted device" fails_with 'mounted on /mnt/b' add v1 "$b"
umount /mnt/b
blank
signature() { printf "$1" | dd of="$b" bs=1 seek="$2" conv=notrunc,fsync status=none; }
signature 'EFI PART' 512
check "a partition table" fails_with 'carries a .*partition table' add v1 "$b"
signature '\0\0\0\0\0\0\0\0' 512
pvcreate -qq --config 'devices { use_devicesfile = 0 scan = [ "/dev" ] }' "$b"
check "a physical volume of LVM" fails_with 'carries an LVM' add v1 "$b"
blank
echo "0 2048 linear $b 0" | dmsetup create --noudevsync held
check "a device that is held" fails_with 'in use by /dev/mapper/held' add v1 "$b"
dmsetup remove --noudevsync held
check "the volume itself" fails_with 'lies on a filtered device' add v1 "$volume"
check "too small" fails_with 'it is too small' add v1 "${a}2"
check "a volume with a small one" add v0 "${a}3"
check "one reserve a server" fails_with 'the reserve of this server is' filter --ask "add v2 $b other 4096 ${a}2"
check "taken out again" filter --ask 'remove v0'

# ---- full: each volume takes up to half of what is left
loops=()
for n in 1 2 3 4 5; do
    truncate -s 64M "/run/volume$n"
    loops+=("$(losetup -f --show "/run/volume$n")")
done
full() {
    local loop
    for loop in "${loops[@]}"; do
        filter --ask "add f${loop##*/} $loop f${loop##*/} 4096 ${a}3" || return
    done
}
check "full" fails_with 'it is full' full
for loop in "${loops[@]}"; do
    filter --ask "remove f${loop##*/}" >/dev/null 2>&1
    losetup -d "$loop"
done
check "nothing is left" sh -c '! ls /dev/ublkb*'

# ---- spill, and a power cut
dd if=/dev/urandom of="$volume" bs=1M oflag=direct status=none 2>/dev/null
export SECONDSITE_LAB_DEVICES=$volume SECONDSITE_LAB_RESERVE=$b SECONDSITE_FILTER_DIR=$dir SECONDSITE_FILTER_LIST=$list
check "points spill; after a power cut little is sent" "$tests/filter_reserve" --ignored --nocapture
note_lines ' KiB '

# ---- a reserve that fails
id=$(filter --status --json | sed -n 's/.*"id": *"\([^"]*\)".*/\1/p')
check "taken out" filter --ask "remove $id"
blank
echo "0 131072 linear $b 0" | dmsetup create --noudevsync reserve
dmsetup mknodes reserve
check "added with another" add v9 /dev/mapper/reserve
write() { dd if=/dev/urandom of=/dev/secondsite/data bs=4k seek="$1" count="$2" oflag=direct conv=notrunc,fsync status=none; }
check "it is written to" write 0 200
check "its marks survive a power cut" sh -c "secondsite filter --dir $dir --status | grep -q 'marks survive a power cut'"
dmsetup suspend --noflush --nolockfs reserve
echo "0 131072 error" | dmsetup load reserve
dmsetup resume --noudevsync reserve
check "no write fails when it does" write 10000 200
check "nor later" write 20000 200
failed_is_said() { filter --status | grep -q 'the reserve has failed'; }
check "it is said" await 20 failed_is_said
check "and no later start believes it" sh -c "grep -q ' data 4096 -$' $list"
check "taken out with a failed reserve" filter --ask 'remove v9'
[ "$failed" -eq 0 ] || tail -n 40 /run/reserve.log
