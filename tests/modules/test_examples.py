"""The examples in the docstrings of public functions run, and every public function of the library has one."""

import doctest
import importlib
import inspect

import pytest

import molora_jax as mj

MODULES = (
    "molora_jax.modules.lora", "molora_jax.modules.sown",
    *(f"kernels_pallas.{name}.api" for name in ("grouped_lora", "moe_ffn", "rank_gated", "routed_ffn")),
    "kernels_pallas.select", "molora_jax.io.base",
)  # fmt: skip


SLOW = [pytest.param(f"molora_jax.modules.{name}", marks=pytest.mark.slow) for name in ("attach", "ffn", "nnx")]


@pytest.mark.parametrize("name", [*MODULES, *SLOW])
def test_examples_run(name):
    module = importlib.import_module(name)
    failed, tried = doctest.testmod(module)
    assert tried and not failed


def test_every_public_function_has_one():
    public = [
        name for home in ("molora_jax.modules", "kernels_pallas") for name in importlib.import_module(home).__all__
    ]
    missing = [name for name in public if ">>>" not in (inspect.getdoc(getattr(mj, name)) or "")]
    assert not missing
