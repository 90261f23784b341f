#!/bin/bash
# build.sh PROGRAMS OUT [VERSION]: makes OUT/berth_VERSION_amd64.deb of the programs in that directory, with dpkg-deb alone.
#
# It builds no program. The same programs and the same commit give the same file, byte by byte: all times in it are
# SOURCE_DATE_EPOCH, or without it the commit's. What people may reword (man pages of the command line, completion, help) comes
# from the programs themselves.
set -euo pipefail
cd "$(dirname "$0")/../.."
umask 022
export LC_ALL=C TZ=UTC

readonly PROGRAMS=$1 OUT=$2
readonly VERSION=${3:-$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1)}
readonly MAINTAINER=${BERTH_MAINTAINER:-The Berth maintainers <maintainers@berth.invalid>}
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2> /dev/null || stat -c %Y CHANGELOG.md)}
export SOURCE_DATE_EPOCH
readonly PACKAGE=${OUT%/}/berth_${VERSION}_amd64.deb DATE=@$SOURCE_DATE_EPOCH

main() {
    command -v dpkg-deb > /dev/null || die "dpkg-deb is missing: install the package dpkg"
    tree=$(mktemp -d)
    trap 'rm -rf "$tree"' EXIT
    chmod 755 "$tree"
    programs
    units
    manuals
    completion
    documents
    control
    # The packer clamps times to SOURCE_DATE_EPOCH; what is older than that would show.
    find "$tree" -exec touch --no-dereference --date="$DATE" {} +
    mkdir -p "$OUT"
    dpkg-deb --root-owner-group -Zxz --build "$tree" "$PACKAGE" > /dev/null
    echo "$PACKAGE"
}

die() {
    echo "deb: $*" >&2
    exit 1
}

# put MODE FILE PATH
put() { install -D -m "$1" "$2" "$tree/$3"; }

# From standard input, without a time or a name in it.
pack() {
    mkdir -p "$tree/$(dirname "$1")"
    gzip -9n > "$tree/$1"
}

programs() {
    put 755 "$PROGRAMS/berth" usr/bin/berth
    put 755 "$PROGRAMS/berthd" usr/sbin/berthd
    for name in berth-agent berth-jailer berth-vmm; do
        put 755 "$PROGRAMS/$name" "usr/lib/berth/$name"
    done
    put 644 resources/deb/berthd.toml etc/berth/berthd.toml
    # Settings of single guests, whose operators need not read each other's.
    install -d -m 750 "$tree/etc/berth/guests"
}

units() {
    for unit in berthd.service berthd.socket berth-vmm@.service; do
        put 644 "resources/systemd/$unit" "lib/systemd/system/$unit"
    done
    put 644 resources/systemd/berth.sysusers usr/lib/sysusers.d/berth.conf
    put 644 resources/systemd/berth.tmpfiles usr/lib/tmpfiles.d/berth.conf
}

manuals() {
    local pages
    pages=$(mktemp -d)
    "$PROGRAMS/berth" man "$pages"
    for page in "$pages"/*.1; do
        pack "usr/share/man/man1/$(basename "$page").gz" < "$page"
    done
    rm -r "$pages"
    for name in berthd berth-jailer berth-vmm; do
        manual $name | pack "usr/share/man/man8/$name.8.gz"
    done
}

# A page of resources/deb/man, with what the program says of itself in place of @HELP@.
manual() {
    while IFS= read -r line; do
        if [ "$line" = @HELP@ ]; then
            "$PROGRAMS/$1" --help | sed 's/\\/\\e/g; s/-/\\-/g; s/^[.'\'']/\\\&&/'
        else
            printf '%s\n' "$line"
        fi
    done < "resources/deb/man/$1.8" | sed "s/@VERSION@/$VERSION/"
}

completion() {
    "$PROGRAMS/berth" completion bash > "$tree/bash"
    "$PROGRAMS/berth" completion zsh > "$tree/zsh"
    "$PROGRAMS/berth" completion fish > "$tree/fish"
    put 644 "$tree/bash" usr/share/bash-completion/completions/berth
    put 644 "$tree/zsh" usr/share/zsh/vendor-completions/_berth
    put 644 "$tree/fish" usr/share/fish/vendor_completions.d/berth.fish
    rm "$tree"/{bash,zsh,fish}
}

documents() {
    local documentation=usr/share/doc/berth
    for file in README.md SECURITY.md CHANGELOG.md docs/*.md; do
        put 644 "$file" "$documentation/$file"
    done
    put 644 resources/deb/copyright $documentation/copyright
    put 644 resources/deb/lintian-overrides usr/share/lintian/overrides/berth
    third_party | pack $documentation/third-party.txt.gz
    pack $documentation/changelog.gz << CHANGES
berth ($VERSION) stable; urgency=medium

  * What is new is told in /usr/share/doc/berth/CHANGELOG.md.

 -- $MAINTAINER  $(date -R --date="$DATE")
CHANGES
}

# The crates that are in the programs, and the notices that their licences want to be kept, each text once.
third_party() {
    local crates sources=${CARGO_HOME:-$HOME/.cargo}/registry/src seen=' ' name version licence hash
    crates=$(cargo tree --locked --edges normal,build --prefix none --format '{p}	{l}' --no-dedupe \
        --package agent --package cli --package jailer --package supervisor --package vmm \
        | sed 's/ (proc-macro)//' | grep -v '(/' | sort -u)
    echo "Other projects' code in Berth's programs, and under which licences:"
    echo
    echo "$crates"
    while IFS=$'\t' read -r name licence; do
        version=${name#* v}
        for text in "$sources"/*/"${name%% *}-$version"/{LICEN[CS]E,COPYRIGHT,NOTICE}*; do
            [ -f "$text" ] || continue
            hash=$(cksum < "$text")
            case $seen in *" $hash "*) continue ;; esac
            seen="$seen$hash "
            printf '\n==== %s: %s\n\n' "$name" "$(basename "$text")"
            cat "$text"
        done
    done <<< "$crates"
}

control() {
    local directory=$tree/DEBIAN
    mkdir "$directory"
    sed -e "s/@VERSION@/$VERSION/" -e "s/@MAINTAINER@/$MAINTAINER/" \
        -e "s/@SIZE@/$(du -sk --apparent-size --exclude=DEBIAN "$tree" | cut -f1)/" resources/deb/control > "$directory/control"
    echo /etc/berth/berthd.toml > "$directory/conffiles"
    for script in postinst prerm postrm; do
        install -m 755 "resources/deb/$script" "$directory/$script"
    done
    (cd "$tree" && find . -type f -not -path './DEBIAN/*' -printf '%P\0' | sort -z | xargs -0 md5sum) > "$directory/md5sums"
}

main
