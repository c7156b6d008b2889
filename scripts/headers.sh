# Sourced by fetch_ort_headers.sh and fetch_trt_headers.sh, which set `what`: headers of others that are compiled into our
# libraries are exactly those that cmake/$what.sha256 names.

die() {
  echo "fetch_$(echo "$what" | tr - _): $*" >&2
  exit 1
}

sums=$(cd "$(dirname "$0")/.." && pwd)/cmake/$what.sha256

# Whether the folder $1 holds all of the headers, unchanged.
checked() { (cd "$1" && sha256sum --check --status --strict "$sums"); }

# Copies the headers found in the folder $1 into DEST, if they are the right ones. Files are renamed into place: another
# build that looks at the same moment sees whole ones.
install_headers() {
  if ! checked "$1"; then
    echo "the headers in $1 are not those of cmake/$what.sha256" >&2
    return 1
  fi
  for header in $(awk '{print $2}' "$sums"); do
    cp "$1/$header" "$dest/.$header.$$" && mv "$dest/.$header.$$" "$dest/$header" || return 1
  done
}

[ $# -ge 1 ] || die "usage: $0 DEST"
mkdir -p "$1"
dest=$(cd "$1" && pwd)
if checked "$dest" 2>/dev/null; then exit 0; fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
