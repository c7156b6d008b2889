#!/bin/sh
# Runs COMMAND with the environment variables that a machine needs, and none that changes what is built or computed.
#
#   scripts/clean_env.sh COMMAND [ARGUMENT...]
#
# The one place that knows which those are: CI and tests start what must not depend on the caller's shell with it. A
# variable that is wanted all the same: scripts/clean_env.sh env NAME=VALUE COMMAND.
set -eu

for name in $(awk 'BEGIN { for (name in ENVIRON) print name }'); do
  case $name in
    *[!A-Za-z0-9_]*) ;;                                           # a shell's function: only that shell looks at it
    PATH | HOME | USER | LOGNAME | SHELL | TERM | LANG | LC_* | TMPDIR | TZ | DEBIAN_FRONTEND) ;;
    PIP_* | PYENV_ROOT | CUDACXX | DFSSM_TORCH) ;;                # where the tools and packages are
    *_proxy | *_PROXY | *_CA_BUNDLE | *_CA_CERTS | SSL_CERT_*) ;; # how the network is reached
    *) unset "$name" ;;
  esac
done
exec "$@"
