# shellcheck shell=bash disable=SC2154 # from guest/run
# The units as they are installed, under systemd and this kernel: the second site and a server on one
# machine, the main job once, and the watchdog. Each daemon is stopped (SIGSTOP) and must be killed
# and started again by init.
units=(secondsite-control secondsite-target secondsite-agent)
watchdog=15

await() { # await SECONDS COMMAND...
    local end=$((SECONDS + $1))
    shift
    until "$@"; do
        [ "$SECONDS" -lt "$end" ] || return 1
        sleep 0.5
    done
}
property() { systemctl show --value --property="$2" "$1"; }

note "$(systemctl --version | head -n 1), $(systemctl is-system-running)"
for unit in "${units[@]}"; do
    check "$unit asks for a watchdog of a minute" grep -qx WatchdogSec=60 "/usr/lib/systemd/system/$unit.service"
    mkdir -p "/etc/systemd/system/$unit.service.d"
    printf '[Service]\nWatchdogSec=%s\n' "$watchdog" >"/etc/systemd/system/$unit.service.d/lab.conf"
done
systemctl daemon-reload

check "PostgreSQL runs" await 120 systemctl is-active --quiet postgresql@15-main
check "PostgreSQL answers" await 60 runuser -u postgres -- psql -Atc 'SELECT 1'

check "users and folders" sh -c 'systemd-sysusers && systemd-tmpfiles --create secondsite.conf'
mkdir -p /srv/secondsite
# The store lies in the guest's memory, with less free than is kept by default.
printf '[target]\nreserve = "64MiB"\n' >/etc/secondsite/conf.d/20-lab.toml
check "setup" secondsite setup --store /srv/secondsite --listen 127.0.0.1:7443 --yes
token=$(secondsite token --json --yes | sed -n 's/.*"token": *"\([^"]*\)".*/\1/p')
check "join" secondsite join 127.0.0.1:7443 --token "$token" --name lab --yes
for unit in "${units[@]}"; do
    check "$unit is active" await 60 systemctl is-active --quiet "$unit"
    check "$unit has a watchdog" test "$(property "$unit" WatchdogUSec)" = "${watchdog}s"
done

disk=$(readlink -f /dev/disk/by-id/virtio-a)
dd if=/dev/urandom of="$disk" bs=1M count=16 oflag=direct status=none
check "protect" secondsite protect lab --volumes "$disk" --rpo 10s --keep none --yes
check "the agent may pin" await 60 sh -c 'ls /sys/fs/bpf/secondsite/*/*/link_queue0'
check "an exact point" timeout 90 secondsite cut lab --wait --yes
check "verify: the replica is the disk" timeout 90 secondsite verify lab --yes

# A second disk behind the filter: what the agent's unit may do is enough for it.
other=$(readlink -f /dev/disk/by-id/virtio-b)
check "the filter runs" systemctl start secondsite-filter
# Offered once the agent has looked again.
check "protect behind it" await 60 secondsite protect lab --volumes "$other" --tracker ublk --rpo 10s --keep none --yes
name=/dev/secondsite/${other##*/}
check "its stable name" await 60 test -b "$name"
dd if=/dev/urandom of="$name" bs=1M count=4 oflag=direct status=none
check "an exact point of both" timeout 120 secondsite cut lab --wait --yes
behind() { secondsite status lab --json | tr -d ' \n' | grep -q '"tracker":"ublk"'; }
check "followed by the filter" behind
check "verify both" timeout 120 secondsite verify lab --yes
check "the filter is restarted under it" systemctl restart secondsite-filter
check "and goes on" timeout 60 dd if=/dev/urandom of="$name" bs=1M count=4 oflag=direct status=none

declare -A before=()
for unit in "${units[@]}"; do
    before[$unit]=$(property "$unit" MainPID)
    kill -STOP "${before[$unit]}"
done
restarted() { [ "$(property "$1" NRestarts)" -ge 1 ] && systemctl is-active --quiet "$1"; }
for unit in "${units[@]}"; do
    check "$unit that stands still is started again" await 180 restarted "$unit"
    check "$unit is another process" test "$(property "$unit" MainPID)" != "${before[$unit]}"
    check "the watchdog ended $unit" sh -c "journalctl -u $unit | grep 'Watchdog timeout'"
done
dd if=/dev/urandom of="$disk" bs=1M count=1 seek=20 oflag=direct status=none
check "an exact point after that" timeout 90 secondsite cut lab --wait --yes
