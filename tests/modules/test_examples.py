"""The examples in the docstrings of public functions run, and every public function of the library has one."""

import doctest
import importlib
import inspect
import json

import pytest

import molora_jax as mj

MODULES = (
    "molora_jax.modules.lora", "molora_jax.modules.sown",
    *(f"kernels_pallas.{name}.api" for name in ("grouped_lora", "moe_ffn", "rank_gated", "routed_ffn")),
    "kernels_pallas.select", "molora_jax.io.base", "molora_jax.engines.base",
)  # fmt: skip


SLOW = [pytest.param(f"molora_jax.modules.{name}", marks=pytest.mark.slow) for name in ("attach", "ffn", "nnx")]


@pytest.mark.parametrize("name", [*MODULES, *SLOW])
def test_examples_run(name):
    module = importlib.import_module(name)
    failed, tried = doctest.testmod(module)
    assert tried and not failed


@pytest.mark.slow
def test_examples_of_runs(tmp_path, monkeypatch):
    """One after the other in one folder: the first makes the run `runs/a` that the others open."""
    monkeypatch.chdir(tmp_path)
    rows = [json.dumps({"prompt": f"Double {n}", "target": str(2 * n)}) for n in range(40)]
    (tmp_path / "double.jsonl").write_text("\n".join(rows))
    runner = doctest.DocTestRunner()
    for name in ("load_config", "train", "load_run", "evaluate", "write_run", "perform", "load_base_run"):
        function = getattr(mj, name)
        for test in doctest.DocTestFinder(recurse=False).find(function, name, globs={}):
            failed, tried = runner.run(test)
            assert tried and not failed, name


def test_every_public_function_has_one():
    """What `molora_jax` itself lists: modules, ops, and the functions on runs."""
    public = [name for name in mj.__all__ if callable(getattr(mj, name))]
    public += importlib.import_module("kernels_pallas").__all__
    missing = [name for name in public if ">>>" not in (inspect.getdoc(getattr(mj, name)) or "")]
    assert not missing
