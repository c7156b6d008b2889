#!/bin/sh
# The section of the changelog about a version: scripts/changes.sh VERSION. Where it has none yet, the one of what is not
# released, with a note.
set -eu

version=${1:?name the version}
cd "$(dirname "$0")/.."
section() { # the lines of section $1, without its heading
  awk -v wanted="## [$1]" 'index($0, "## [") == 1 { inside = index($0, wanted) == 1; next } inside' CHANGELOG.md
}
text=$(section "$version")
if [ -z "$text" ]; then
  echo "changes: CHANGELOG.md has no section [$version]; taken is [Unreleased]" >&2
  text=$(section Unreleased)
fi
[ -n "$text" ] || { echo "changes: CHANGELOG.md has neither a section [$version] nor [Unreleased]" >&2; exit 1; }
echo "$text"
