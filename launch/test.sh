#!/usr/bin/env bash
# The tests, on eight forced CPU devices.
#
#     ./launch/test.sh [--all] [pytest arguments]
#
# --all adds the slow ones: the real model, several processes, every combination. Paths (tests/core) narrow the run.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
export JAX_PLATFORMS=cpu JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$PWD/.jax_cache}"

paths=tests
for argument in "$@"; do [ ! -e "${argument%%::*}" ] || paths=; done
echo "test: pytest -q $paths $*"
exec python -m pytest -q $paths "$@"
