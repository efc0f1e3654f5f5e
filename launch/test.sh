#!/usr/bin/env bash
# The tests, on eight forced CPU devices.
#
#     ./launch/test.sh [--all] [pytest arguments]
#
# --all adds the slow ones: the real model, several processes, every combination.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
export JAX_PLATFORMS=cpu JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$PWD/.jax_cache}"

echo "test: pytest -q tests $*"
exec python -m pytest -q tests "$@"
