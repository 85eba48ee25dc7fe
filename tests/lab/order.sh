# shellcheck shell=bash disable=SC2154 # from guest/run
# The filter under two volumes: writers that never rest, a cut after another, and each point on the
# target has to be a prefix of the write order; also after kills of the filter and of the agent.
modprobe -a ublk_drv dm-mod
filter=/run/order
secondsite filter --dir "$filter" --list /run/order.volumes 2>/run/order.log &
for _ in $(seq 200); do
    [ ! -S "$filter/socket" ] || break
    sleep 0.1
done
check "the filter runs" secondsite filter --dir "$filter" --status

for side in a b; do
    echo "0 32768 linear $(readlink -f /dev/disk/by-id/virtio-$side) 2048" | dmsetup create --noudevsync "disk-$side"
    dmsetup mknodes "disk-$side"
done
order() {
    SECONDSITE_LAB_DEVICES=/dev/mapper/disk-a,/dev/mapper/disk-b SECONDSITE_FILTER_DIR=$filter \
        "$tests/filter_order" --ignored --nocapture
}
SECONDSITE_LAB_POINTS=${SECONDSITE_LONG:+2000}
export SECONDSITE_LAB_POINTS=${SECONDSITE_LAB_POINTS:-200}
export SECONDSITE_LAB_KILLS=$((SECONDSITE_LAB_POINTS / 20)) SECONDSITE_LAB_RESTARTS=$((SECONDSITE_LAB_POINTS / 50))
check "every point of $SECONDSITE_LAB_POINTS is a prefix of the writes" order
note_lines ' points in '
