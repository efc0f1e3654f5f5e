#!/usr/bin/env bash
# The tests, on eight forced CPU devices.
#
#     ./launch/test.sh [--all] [pytest arguments]
#
# --all adds the slow ones: the real model, several processes, every combination. Paths (tests/core) narrow the run.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
export JAX_PLATFORMS=cpu JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$PWD/.jax_cache}"

if [[ " $* " == *" --all "* && -z "${TPU_LIBRARY_PATH:-}" ]]; then # the TPU's compiler; in a folder of its own, because
  if [ ! -e .venv/tpu/libtpu/libtpu.so ]; then                     # jax would look for a TPU at every start
    libtpu="$(python -c 'import importlib.metadata as m; print(*[r.split(";")[0] for r in m.requires("jax") if "libtpu" in r])')"
    echo "setup: $libtpu into .venv/tpu (once)"
    python -m pip install -qq --disable-pip-version-check --no-deps --target .venv/tpu "$libtpu"
  fi
  export TPU_LIBRARY_PATH="$PWD/.venv/tpu/libtpu/libtpu.so"
fi

if [[ " $* " == *" --all "* && -z "${MOLORA_CUDA_PLUGIN:-}" ]]; then # the GPU's compiler, likewise
  if [ ! -e .venv/cuda/jax_plugins/xla_cuda13 ]; then
    version="$(python -c 'import jaxlib; print(jaxlib.__version__)')"
    echo "setup: jax-cuda13-plugin $version into .venv/cuda (once)"
    python -m pip install -qq --disable-pip-version-check --no-deps --target .venv/cuda \
      "jax-cuda13-pjrt==$version" "jax-cuda13-plugin==$version"
  fi
  export MOLORA_CUDA_PLUGIN="$PWD/.venv/cuda"
fi

if [[ " $* " == *" --all "* ]] &&
  ! python -c 'import lm_eval, material, moto, openai, reasoning_gym, s3fs, wandb' 2>/dev/null; then
  echo "setup: the extra test-all (once, a few minutes)"
  python -m pip install -qq --disable-pip-version-check -c "$constraints" -e '.[test-all]'
fi

paths=tests
for argument in "$@"; do [ ! -e "${argument%%::*}" ] || paths=; done
# Compiling keeps one processor busy, so two workers use two; a file's tests stay together and share what it set up.
echo "test: pytest -q -n 2 --dist loadfile --no-loadscope-reorder $paths $*"
exec python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder $paths "$@"
