# Shared by scripts/test and scripts/quickstart: what the machine needs, and building as the right
# user. Sourced, never run. Nothing here reads from a terminal.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
rust_needed=1.95.0

say() { printf '%s\n' "$*"; }
die() { printf 'error: %s\n' "$*" >&2; exit 1; }

# Root does everything; another user builds as that user and runs the rest through sudo; a user
# without sudo ends here with 77.
choose_sudo() {
    sudo=()
    if [ "$(id -u)" -ne 0 ]; then
        if command -v sudo >/dev/null && sudo -n true 2>/dev/null; then
            sudo=(sudo -n)
        else
            say "This needs root: loop devices, mounts and eBPF. Run it as root, or as a user whose sudo asks no password." >&2
            exit 77
        fi
    fi
}

# For what needs root only to install packages.
choose_sudo_if_there_is() {
    sudo=()
    [ "$(id -u)" -eq 0 ] || sudo=(sudo -n)
}

as_root() { "${sudo[@]}" env "PATH=$PATH:/usr/sbin:/sbin" "$@"; }

# need_packages COMMAND_OR_FILE=PACKAGE...: installs through apt what is missing, by name.
need_packages() {
    local pair probe missing=()
    for pair in "$@"; do
        probe=${pair%%=*}
        case $probe in
        /*) [ -e "$probe" ] || missing+=("${pair#*=}") ;;
        *) PATH="$PATH:/usr/sbin:/sbin" command -v "$probe" >/dev/null || missing+=("${pair#*=}") ;;
        esac
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    command -v apt-get >/dev/null || die "missing: ${missing[*]}; this is not Debian, so install them by hand"
    say "Installing through apt: ${missing[*]}"
    export DEBIAN_FRONTEND=noninteractive
    as_root apt-get update -qq </dev/null
    as_root env DEBIAN_FRONTEND=noninteractive \
        apt-get install -y -qq --no-install-recommends "${missing[@]}" </dev/null >/dev/null
}

rust_is_new_enough() {
    local have
    command -v cargo >/dev/null && command -v rustc >/dev/null || return 1
    have=$(rustc --version 2>/dev/null | awk '{print $2}') || return 1
    [ "$(printf '%s\n%s\n' "$rust_needed" "$have" | sort -V | head -1)" = "$rust_needed" ]
}

need_rust() {
    [ -f "$HOME/.cargo/env" ] && . "$HOME/.cargo/env"
    rust_is_new_enough && return 0
    if ! command -v rustup >/dev/null; then
        if apt-cache show rustup >/dev/null 2>&1; then
            say "Rust $rust_needed or later is missing: installing Debian's rustup, then the stable toolchain."
            need_packages rustup=rustup
        else
            say "Rust $rust_needed or later is missing: running rustup's installer (https://sh.rustup.rs) for $(id -un)."
            need_packages curl=curl
            curl --proto '=https' --tlsv1.2 -sSf https://sh.rustup.rs |
                sh -s -- -y --no-modify-path --profile minimal --component rustfmt,clippy
            . "$HOME/.cargo/env"
        fi
    else
        say "Rust $rust_needed or later is missing: updating the stable toolchain through rustup."
    fi
    rust_is_new_enough && return 0
    rustup toolchain install stable --profile minimal --component rustfmt,clippy
    rustup default stable
    rust_is_new_enough || die "rustup gave $(rustc --version), $rust_needed or later is needed"
}

# What every build needs.
build_packages=(cc=gcc /usr/include/stdio.h=libc6-dev clang=clang
    /etc/ssl/certs/ca-certificates.crt=ca-certificates)

# What the tests of the installation look at it with.
install_packages=(groff=groff-base systemd-analyze=systemd)

# What the real ring and the quickstart need besides.
real_packages=(losetup=mount mount=mount mkfs.ext4=e2fsprogs mkfs.xfs=xfsprogs mkfs.btrfs=btrfs-progs
    diff=diffutils ip=iproute2
    nft=nftables nbdkit=nbdkit qemu-nbd=qemu-utils nbdfuse=libnbd-bin nbdcopy=libnbd-bin qemu-io=qemu-utils fio=fio)

# What the kernel lab runs on, and what its tests use in the guest.
if grep -qs '^VERSION_ID="12"' /etc/os-release; then
    virtiofsd=/usr/lib/qemu/virtiofsd lab_packages=(/usr/lib/qemu/virtiofsd=qemu-system-common)
else
    virtiofsd=/usr/libexec/virtiofsd lab_packages=(/usr/libexec/virtiofsd=virtiofsd)
fi
lab_packages+=(qemu-system-x86_64=qemu-system-x86
    modprobe=kmod xz=xz-utils nbd-client=nbd-client setpriv=util-linux ip=iproute2 dmsetup=dmsetup lvm=lvm2 "${real_packages[@]}")

# PostgreSQL for the tests that make a cluster of their own: the package would make and start one.
need_postgresql() {
    compgen -G '/usr/lib/postgresql/*/bin/postgres' >/dev/null && return 0
    need_packages /usr/share/postgresql-common=postgresql-common
    as_root sed -i 's/^#\?create_main_cluster.*/create_main_cluster = false/' \
        /etc/postgresql-common/createcluster.conf
    need_packages /usr/lib/postgresql=postgresql
}

# One profile and one set of features for everything, so that no dependency is compiled twice.
# SECONDSITE_NO_REAL leaves the tests out that need root and devices.
features=()
[ -n "${SECONDSITE_NO_REAL:-}" ] || features=(--features secondsite/real,secondsite-tests/real,secondsite-tracker/real)

build_all() {
    say "Building (release)…"
    (cd "$root" && cargo build --release --workspace --all-targets --locked "${features[@]}" </dev/null)
}
