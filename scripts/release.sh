#!/bin/sh
# Makes a release of the commit that is checked out: `make release`.
#
#   scripts/release.sh OUT [PYTHON]
#
# OUT gets the source distribution; the wheels, those for Arm too where a compiler for it is; dfssm-VERSION.cdx.json, the
# bill of materials of the wheel dfssm with the packages that it runs with (CycloneDX); CHANGES.md, the section of the
# changelog; and SHA256SUMS of all. The version is that of pyproject.toml. A commit gives the same bytes each time, with
# the same compilers. PYTHON as of build_wheels.sh.
set -eu

SBOM_TOOL=cyclonedx-bom==7.5.0

die() {
  echo "release: $*" >&2
  exit 1
}

mkdir -p "${1:?name the folder of the release}"
out=$(cd "$1" && pwd)
python=${2:-python3}
case $python in */*) python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python") ;; esac
cd "$(dirname "$0")/.."
[ -z "$(git status --porcelain)" ] || die "there are changes that are not committed, and a release is of a commit"
version=$(sed -n 's/^version = "\(.*\)"$/\1/p' pyproject.toml)
SOURCE_DATE_EPOCH=$(git log -1 --format=%ct)
export SOURCE_DATE_EPOCH
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

find "$out" -mindepth 1 -delete
scripts/changes.sh "$version" >"$out/CHANGES.md"
"$python" -c 'import sys; from scikit_build_core.build import build_sdist; build_sdist(sys.argv[1])' "$out" >/dev/null
scripts/build_wheels.sh "$out" "$python"
if command -v aarch64-linux-gnu-g++ >/dev/null; then
  scripts/build_arm.sh "$out" "$python"
  if command -v nvcc >/dev/null; then scripts/build_jetson.sh "$out" "$python"; fi
else
  echo "the wheels for Arm are left out: no aarch64-linux-gnu-g++"
fi

# What a user of the wheel has installed, looked at from outside.
"$python" -m venv "$work/wheel"
"$python" -m venv "$work/tool"
"$work/wheel/bin/python" -m pip install -q --disable-pip-version-check --no-deps --require-hashes -r requirements/runtime.txt
"$work/wheel/bin/python" -m pip install -q --disable-pip-version-check --no-deps "$out/dfssm-$version"-*"$(uname -m)".whl
"$work/wheel/bin/python" -m pip uninstall -q -y pip setuptools 2>/dev/null
"$work/tool/bin/python" -m pip install -q --disable-pip-version-check "$SBOM_TOOL"
"$work/tool/bin/cyclonedx-py" environment --output-reproducible --of JSON --mc-type library --pyproject pyproject.toml \
  -o "$out/dfssm-$version.cdx.json" "$work/wheel"
! grep -q "$work" "$out/dfssm-$version.cdx.json" || die "the bill of materials names a folder of this machine"

(cd "$out" && sha256sum -- * >"$work/sums" && mv "$work/sums" SHA256SUMS && cat SHA256SUMS)
