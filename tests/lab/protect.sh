# shellcheck shell=bash disable=SC2154 # from guest/run
# Volumes behind the filter, as a user has them protected: a logical volume with PostgreSQL on it,
# which the filter is put under and taken from while it works, and an unmounted disk whose users
# open /dev/secondsite/NAME. Their replicas are checked between two cuts.
modprobe -a ublk_drv dm-mod loop ext4 xfs
export HOME=/root
await() { # await SECONDS COMMAND...
    local end=$((SECONDS + $1))
    shift
    until "$@"; do
        [ "$SECONDS" -lt "$end" ] || return 1
        sleep 0.3
    done
}

# ---- a logical volume with a database, at work
settings='activation { udev_sync = 0 udev_rules = 0 } devices { use_devicesfile = 0 scan = [ "/dev" ] }'
check "a volume group" vgcreate -y --config "$settings" vg0 "$(readlink -f /dev/disk/by-id/virtio-a)"
check "a logical volume" lvcreate -y --config "$settings" -Wn -L 96M -n pg vg0
volume=/dev/mapper/vg0-pg
mkfs.ext4 -q "$volume"
mkdir -p /mnt/pg /run/pg
mount "$volume" /mnt/pg
tools=$(echo /usr/lib/postgresql/*/bin)
mkdir /mnt/pg/data
chown postgres /mnt/pg/data /run/pg
as_postgres() { runuser -u postgres -- env PATH="$tools:$PATH" "$@"; }
check "initdb" as_postgres initdb -D /mnt/pg/data --auth=trust --no-locale --wal-segsize=4 -k
as_postgres postgres -D /mnt/pg/data -k /run/pg -c listen_addresses= -c max_wal_size=24MB -c min_wal_size=8MB \
    -c shared_buffers=8MB >/run/pg/log 2>&1 &
check "PostgreSQL answers" await 60 as_postgres pg_isready -q -h /run/pg
sql() { as_postgres psql -h /run/pg -d postgres -XAtq -v ON_ERROR_STOP=1 -c "$1"; }
check "a table" sql 'CREATE TABLE ledger (n bigint PRIMARY KEY)'

# An unmounted disk: XFS wants more than those of the lab have.
truncate -s 320M /run/disk.img
b=$(losetup -f --show /run/disk.img)

# ---- both sites on this machine
printf '[target]\nreserve = "16MiB"\n' >/run/reserve.toml
check "setup" secondsite setup --store /srv/secondsite --listen 127.0.0.1:7443 --no-start --yes
mkdir -p /etc/secondsite/conf.d
cp /run/reserve.toml /etc/secondsite/conf.d/20-lab.toml
secondsite control >/run/control.log 2>&1 &
check "control answers" await 30 secondsite status --json
secondsite target >/run/target.log 2>&1 &
secondsite filter >/run/filter.log 2>&1 &
check "the filter runs" await 30 secondsite filter --status
token=$(secondsite token --json --yes | sed -n 's/.*"token": *"\([^"]*\)".*/\1/p')
check "join" secondsite join 127.0.0.1:7443 --token "$token" --name lab --no-start --yes
secondsite replicate >/run/agent.log 2>&1 &
agent=$!

# ---- protect, while transactions are committed one after the other
(n=0; while sql "INSERT INTO ledger VALUES ($((n += 1)))" >/dev/null 2>>/run/ledger.errors; do echo "$n" >/run/ledger; done) &
ledger=$!
check "protect the logical volume" secondsite protect lab --volumes "$volume" --rpo 1h --keep none --yes
spliced() { dmsetup table vg0-pg | grep -q " linear $(cat /sys/block/ublkb0/dev) 0"; }
check "its filter was put under it, in use" await 60 spliced
check "a point" timeout 120 secondsite cut lab --wait --yes
tracked() { secondsite status lab --json | tr -d ' \n' | grep -q '"tracker":"ublk"'; }
check "followed by the filter" tracked
check "verify under load" timeout 120 secondsite verify lab --yes

# ---- an unmounted disk
check "the filter itself is no volume" sh -c '! secondsite protect lab --volumes /dev/ublkb0 --tracker ebpf --dry-run --yes'
check "protect a disk" secondsite protect lab --volumes "$b" --tracker ublk --rpo 1h --keep none --yes
name=/dev/secondsite/${b##*/}
check "its stable name" await 60 test -b "$name"
check "XFS on it" mkfs.xfs -q -f "$name"
mkdir -p /mnt/disk
mount "$name" /mnt/disk
cp -r /usr/share/doc/bash /usr/share/doc/base-files /mnt/disk/
sync -f /mnt/disk
await 60 sh -c 'secondsite status lab --json | grep -q following'

before=$(cat /run/ledger)
check "a point of both" timeout 120 secondsite cut lab --wait --yes
after=$(cat /run/ledger)
check "and it is exact" sh -c "secondsite points lab --json | tr -d ' \n' | grep -o '\"consistency\":\"[a-z]*\"' | tail -1 | grep -q crash"
note "the ledger stood between $before and $after when it was cut"

# ---- what the second site has, when nothing is cut any more
kill "$agent"
wait "$agent"
promoted() { secondsite status lab --json | tr -d ' \n' | grep -oE '"(epoch|promoted_epoch)":[0-9]+' | sort -u | awk -F: '{ v[$1] = v[$1] " " $2 } END { exit !(v["\"epoch\""] == v["\"promoted_epoch\""]) }'; }
check "both are promoted" await 60 promoted
for image in /srv/secondsite/servers/*/*/replica.img; do
    case $(blkid -o value -s TYPE "$image") in
    ext4)
        cp --sparse=always "$image" /run/copy.img
        check "the journal of the replica's ext4 is replayed" sh -c 'e2fsck -fy /run/copy.img; [ $? -le 1 ]'
        check "the replica's ext4 is whole" e2fsck -fn /run/copy.img
        mkdir -p /mnt/copy /run/pg2
        mount -o loop /run/copy.img /mnt/copy
        chown postgres /run/pg2
        rm -f /mnt/copy/data/postmaster.pid
        as_postgres postgres -D /mnt/copy/data -k /run/pg2 -c listen_addresses= >/run/pg2/log 2>&1 &
        check "PostgreSQL starts from the replica" await 60 as_postgres pg_isready -q -h /run/pg2
        rows=$(as_postgres psql -h /run/pg2 -d postgres -XAtqc 'SELECT count(*), max(n) FROM ledger')
        note "the replica's ledger: $rows"
        check "every transaction from before the cut, none missing" test "${rows%|*}" = "${rows#*|}" -a "${rows#*|}" -ge "$before" -a "${rows#*|}" -le "$((after + 1))"
        ;;
    xfs)
        cp --sparse=always "$image" /run/copy2.img
        mkdir -p /mnt/copy2
        check "the replica's XFS mounts" mount -o loop,nouuid /run/copy2.img /mnt/copy2
        check "its files are there" diff -r /usr/share/doc/bash /mnt/copy2/bash
        umount /mnt/copy2
        check "and it is whole" xfs_repair -n -f /run/copy2.img
        ;;
    esac
done

# ---- taken out again, at work
secondsite replicate >>/run/agent.log 2>&1 &
umount /mnt/disk
check "unprotect" secondsite unprotect lab --yes
gone() { [ -z "$(ls /dev/secondsite 2>/dev/null)" ] && ! ls /sys/block | grep -q ublkb; }
check "the filters are gone" await 90 gone
now=$(cat /run/ledger)
more() { [ "$(cat /run/ledger)" -gt "$((now + 5))" ]; }
check "the database has worked all along, and does" await 30 more
kill "$ledger"
check "without an error" test ! -s /run/ledger.errors
[ "$failed" -eq 0 ] || tail -n 25 /run/agent.log /run/filter.log /run/target.log /run/control.log
