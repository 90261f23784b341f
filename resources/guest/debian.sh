# Sourced by the recipes: Debian's archive, seen through package lists of our own, and roots made from it.
#
# The mirror is the one that this machine's apt uses for Debian, or BERTH_DEBIAN_MIRROR. Lists, package cache and
# sources live under $BERTH_APT; the machine's own apt configuration is read and never written.

readonly SUITE=bookworm
readonly KEYRING=/usr/share/keyrings/debian-archive-keyring.gpg
# Lists younger than this are used as they are, so that one cold start asks the mirror for them once.
readonly LISTS_FRESH_MINUTES=30

# apt_own PROGRAM COMMAND...: apt on our lists, for a machine on which nothing is installed. For downloads.
apt_own() {
    local program=$1
    shift
    APT_CONFIG=$BERTH_APT/apt.conf "$program" -o Dir::State::status="$BERTH_APT/nothing-installed" "$@"
}

# apt_machine COMMAND...: apt-get on our lists, for this machine. For installing.
apt_machine() {
    APT_CONFIG=$BERTH_APT/apt.conf DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 -y "$@"
}

# The newest version of a package on our lists, unpacked into a directory.
apt_unpack() {
    local package=$1 directory=$2 download
    download=$(mktemp -d)
    (cd "$download" && apt_own apt-get download "$package")
    dpkg-deb -x "$download"/*.deb "$directory"
    rm -r "$download"
}

# The first package that a meta-package depends on.
apt_depends() {
    apt_own apt-cache show --no-all-versions "$1" | sed -n 's/^Depends: *\([^ ,]*\).*/\1/p'
}

# debian_root DIRECTORY OPTION...: a minimal Debian root without what no program reads.
debian_root() {
    local directory=$1
    shift
    mmdebstrap --quiet --mode=root --variant=minbase "$@" \
        --aptopt='Acquire::Languages "none"' --aptopt='Acquire::Retries "3"' \
        --dpkgopt=force-unsafe-io \
        --dpkgopt='path-exclude=/usr/share/doc/*' \
        --dpkgopt='path-exclude=/usr/share/man/*' \
        --dpkgopt='path-exclude=/usr/share/info/*' \
        --dpkgopt='path-exclude=/usr/share/locale/*' \
        $SUITE "$directory" "$BERTH_APT/sources.list"
}

# Puts the modules of $KERNEL where modprobe looks for them.
debian_modules() {
    mkdir -p "$1/usr/lib/modules"
    cp -a "$KERNEL/modules" "$1/usr/lib/modules/$(cat "$KERNEL/release")"
}

# Writes the configuration of apt_own and apt_machine and fetches the lists, unless they are fresh. One at a time.
apt_refresh() {
    exec 9> "$BERTH_APT/lock"
    flock 9
    if [ -z "$(find "$BERTH_APT/refreshed" -mmin -$LISTS_FRESH_MINUTES 2> /dev/null)" ]; then
        mkdir -p "$BERTH_APT"/lists/partial "$BERTH_APT"/cache/archives/partial
        : > "$BERTH_APT/nothing-installed"
        apt_sources > "$BERTH_APT/sources.list"
        apt_config > "$BERTH_APT/apt.conf"
        apt_own apt-get update
        touch "$BERTH_APT/refreshed"
    fi
    exec 9>&-
}

# No sandbox, because the cache may be in a home that apt's own user cannot enter.
apt_config() {
    cat << EOF
Dir::Etc::SourceList "$BERTH_APT/sources.list";
Dir::Etc::SourceParts "-";
Dir::State::Lists "$BERTH_APT/lists";
Dir::Cache "$BERTH_APT/cache";
APT::Sandbox::User "root";
Acquire::Languages "none";
Acquire::Retries "3";
EOF
}

apt_sources() {
    local debian=${BERTH_DEBIAN_MIRROR:-} security='' options=''
    if [ -z "$debian" ]; then
        learn_archives
        debian=$(mirror_of Debian)
        security=$(mirror_of Debian-Security)
    fi
    if [ -z "$debian" ]; then
        echo "apt on this machine names no Debian mirror: set BERTH_DEBIAN_MIRROR to one" >&2
        return 1
    fi
    debian=${debian%/}
    if [ -e $KEYRING ]; then options="[signed-by=$KEYRING]"; fi
    echo "deb $options $debian $SUITE main"
    echo "deb $options $debian $SUITE-updates main"
    echo "deb $options $debian $SUITE-backports main"
    echo "deb $options ${security:-$debian-security} $SUITE-security main"
}

# The address of the archive with this label in the machine's own apt configuration, or nothing.
mirror_of() { machine_archives | sed -n "/^cdrom:/d; s/ $1\$//p" | sort -u | sed -n 1p; }

machine_archives() {
    apt-get ${machine_lists:+-o Dir::State::Lists="$machine_lists"} \
        indextargets --format '$(REPO_URI) $(LABEL)' 'Identifier: Packages'
}

# Labels are in the lists, and a fresh machine has none: then they are fetched to a place where any user may.
learn_archives() {
    if [ -n "$(machine_archives)" ]; then
        return
    fi
    machine_lists=$BERTH_APT/machine-lists
    mkdir -p "$machine_lists/partial"
    # An archive that does not answer need not be the one that is wanted.
    apt-get -o Dir::State::Lists="$machine_lists" -o Dir::Cache="$BERTH_APT/cache" -o APT::Sandbox::User=root \
        update >&2 || true
}
