#!/bin/sh
# Installs the torch of requirements/torch.txt into the environment of PYTHON.
#
#   scripts/install_torch.sh PYTHON
#
# The package index has a build with CUDA, about 3 GB of it. So on a machine without an NVIDIA GPU: a CPU wheel from a
# local folder that pip is configured for (PIP_FIND_LINKS), else one from PyTorch's own index; its dependencies are
# those of the lock and not installed here. DFSSM_TORCH=any takes what the package index has.
set -eu

CPU_INDEX=https://download.pytorch.org/whl/cpu

python=$1
requirements=$(cd "$(dirname "$0")/.." && pwd)/requirements/torch.txt
version=$(sed -n 's/^torch==//p' "$requirements")

# Without a list of its files it is what an interrupted installation has left.
installed=$("$python" -c 'from importlib.metadata import distribution
torch = distribution("torch"); print(torch.version if torch.files else "")' 2>/dev/null || :)
case $installed in "$version" | "$version"+*) exit 0 ;; esac

pip() { "$python" -m pip install -q --disable-pip-version-check "$@" -r "$requirements"; }

if [ "${DFSSM_TORCH:-}" = any ] || nvidia-smi -L >/dev/null 2>&1; then
  pip
  exit
fi
if pip --no-index --no-deps 2>/dev/null || pip --no-deps --retries 1 --timeout 20 --index-url "$CPU_INDEX" 2>/dev/null; then
  exit
fi
echo "install_torch: no CPU wheel of torch $version for $("$python" -V): none in the folders of PIP_FIND_LINKS, and" \
  "$CPU_INDEX did not give one; put it into such a folder, or set DFSSM_TORCH=any for the build with CUDA (3 GB)" >&2
exit 1
