"""The examples in the docstrings of public functions run, and every public function of the library has one."""

import doctest
import importlib
import inspect

import pytest

import molora_jax as mj

MODULES = ("attach", "ffn", "lora", "nnx", "sown")


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    module = importlib.import_module(f"molora_jax.modules.{name}")
    failed, tried = doctest.testmod(module)
    assert tried and not failed


def test_every_public_function_has_one():
    public = importlib.import_module("molora_jax.modules").__all__
    missing = [name for name in public if ">>>" not in (inspect.getdoc(getattr(mj, name)) or "")]
    assert not missing
