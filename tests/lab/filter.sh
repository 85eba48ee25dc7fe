# shellcheck shell=bash disable=SC2154 # from guest/run
# The filter in the write path under this kernel: what goes through it is what would be written
# without it; it outlives kills of its processes under load; it is added to and taken from; it says
# what is wrong.
a=$(readlink -f /dev/disk/by-id/virtio-a)
b=$(readlink -f /dev/disk/by-id/virtio-b)
filter() { timeout 30 secondsite filter "$@"; }
server() { filter --ask hello 2>/dev/null | cut -d' ' -f3; }
await() { # await SECONDS COMMAND...
    local end=$((SECONDS + $1))
    shift
    until "$@"; do [ "$SECONDS" -lt "$end" ] || return 1; done
}
another_than() { local now; now=$(server); [ -n "$now" ] && [ "$now" != "$1" ]; }
keeper() { # keeper [OPTION...]: starts one; its log is kept
    secondsite filter "$@" >>/run/filter.log 2>&1 &
    keeper=$!
}
fails_with() { # fails_with STATUS TEXT COMMAND...
    local status=$1 text=$2 found=0
    shift 2
    "$@" >/run/said 2>&1 || found=$?
    cat /run/said
    [ "$found" -eq "$status" ] && grep -q "$text" /run/said
}

modprobe -a dm-mod ublk_drv
keeper
check "it starts with nothing to do" await 30 another_than ''
check "a volume is added" filter --ask "add v1 $a data 4096 -"
check "it has its stable name" test "$(readlink -f /dev/secondsite/data)" = /dev/ublkb0
disk=${a##*/}
for limit in logical_block_size physical_block_size minimum_io_size write_cache rotational \
    discard_granularity discard_max_bytes write_zeroes_max_bytes; do
    check "the same $limit" diff "/sys/block/$disk/queue/$limit" "/sys/block/ublkb0/queue/$limit"
done
check "the same size" diff "/sys/block/$disk/size" /sys/block/ublkb0/size

# /sys/block/X/stat: 5 writes, 12 discards, 16 flushes.
count() { awk -v n="$1" '{ print $n }' "/sys/block/$disk/stat"; }
grows() { # grows FIELD COMMAND...: the backing device counts more of it
    local before field=$1
    before=$(count "$field")
    shift
    "$@" && [ "$(count "$field")" -gt "$before" ]
}
head -c 4M /dev/urandom >/run/random
check "data goes down" dd if=/run/random of=/dev/secondsite/data bs=1M oflag=direct conv=notrunc
same() { dd if="$1" bs=1M count=4 iflag=direct status=none | cmp - /run/random; }
check "and is below, byte for byte" same "$a"
check "and above" same /dev/secondsite/data
check "a flush reaches the device" grows 16 dd if=/run/random of=/dev/secondsite/data bs=4k count=1 oflag=direct conv=notrunc,fsync
check "a durable write reaches it as one" grows 16 dd if=/run/random of=/dev/secondsite/data bs=4k count=1 oflag=direct,dsync conv=notrunc
check "a discard reaches it" grows 12 blkdiscard -o 1M -l 1M /dev/secondsite/data
check "zeroes are written" blkdiscard -z -o 2M -l 1M /dev/secondsite/data
zeros() { dd if="$1" bs=1M skip=2 count=1 iflag=direct status=none | cmp -n 1048576 - /dev/zero; }
check "and read as zero below" zeros "$a"
check "and above" zeros /dev/secondsite/data

# What is wrong is said.
check "a device that is filtered" fails_with 1 'volume v1 has this' filter --ask "add v2 $a other 4096 -"
echo "0 2048 linear $b 0" | dmsetup create --noudevsync held
check "a busy device, and who has it" fails_with 1 'in use by /dev/mapper/held' filter --ask "add v2 $b other 4096 -"
dmsetup remove --noudevsync held
check "no device" fails_with 1 'look up /dev/none' filter --ask 'add v2 /dev/none other 4096 -'
check "not a block device" fails_with 1 'not a block device' filter --ask 'add v2 /dev/null other 4096 -'
check "a filter on a filter" fails_with 1 'filtered device' filter --ask 'add v2 /dev/ublkb0 other 4096 -'
check "a reserve on a filter" fails_with 1 'filtered device' filter --ask "add v2 $b other 4096 /dev/ublkb0"
mkfs.ext4 -q "$b"
mkdir -p /mnt/b
mount "$b" /mnt/b
check "a mounted device, and where" fails_with 1 'mounted on /mnt/b' filter --ask "add v2 $b other 4096 -"
umount /mnt/b
check "the status says it all" sh -c 'secondsite filter --status --json | grep -q "\"state\": \"served\""'

# A file system on the filter, which is added while the load below is not there yet.
check "a second volume" filter --ask "add v2 $b fs 4096 -"
check "its file system is there" mount /dev/secondsite/fs /mnt/b
check "what is used is not taken out" fails_with 1 'mounted on /mnt/b' filter --ask 'remove v2'

blkdiscard -z /dev/secondsite/data
application() { # application: reads and writes the first volume until /run/stop is there
    rm -f /run/stop
    SECONDSITE_LAB_DEVICE=/dev/secondsite/data SECONDSITE_LAB_BACKING=$a SECONDSITE_LAB_MIB=32 \
        SECONDSITE_LAB_STOP=/run/stop "$tests/filter_load" --ignored --exact --nocapture \
        in_the_lab_a_device_keeps_every_block >/run/load 2>&1 &
    load=$!
}
application
kill_server() {
    local before
    before=$(server)
    kill -9 "$before" && await 30 another_than "$before"
}
for _ in $(seq 10); do
    kill_server || break
    cp /run/random "/mnt/b/$RANDOM"
done
check "ten servers are killed" test "$(grep -c 'the server ended' /run/filter.log)" -ge 10
for _ in 1 2; do
    before=$(server)
    kill -9 "$keeper"
    check "a server outlives its keeper" test "$(server)" = "$before"
    keeper
    check "the next keeper takes over" await 30 another_than "$before"
done
before=$(server)
kill "$keeper"
wait "$keeper"
check "a keeper that ends leaves nobody" fails_with 69 'does not answer' filter --ask hello
keeper
check "and the next one goes on" await 30 another_than ''
umount /mnt/b
check "the file system is whole" e2fsck -fn /dev/secondsite/fs
check "a volume is taken out under the load of another" filter --ask 'remove v2'
check "its name is gone" test ! -e /dev/secondsite/fs
check "its disk is free" e2fsck -fn "$b"
touch /run/stop
wait "$load"
status=$?
cp /run/load "$output"
note_lines ' blocks written and checked'
check "every block is what was written, and nothing failed" sh -c "cat /run/load; exit $status"
check "the last volume is taken out" filter --ask 'remove v1'
check "nothing is left" sh -c '! ls /dev/ublkb* /dev/ublkc*'

# What the recovery with reissue is for: without it the same load fails.
kill "$keeper"
wait "$keeper"
keeper --no-reissue
check "it starts without reissue" await 30 another_than ''
blkdiscard -z "$a"
check "a volume is added" filter --ask "add v1 $a data 4096 -"
application
for _ in 1 2 3; do
    kill_server || break
done
touch /run/stop
wait "$load"
check "then a kill is an I/O error" test $? -ne 0
check "and it says which" grep -q 'failed after .*: Input/output error' /run/load
