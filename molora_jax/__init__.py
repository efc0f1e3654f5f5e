"""Mixtures of LoRA experts in JAX.

Importing the package imports nothing else: a mistake in a config is reported before jax is loaded. `dir(molora_jax)`
lists all names; each is imported when it is asked for.

    load_config(name, ...)     a shipped config by name, or that of a file, with fields changed
    load_base(source)          a base model's weights and tokenizer
    load_base_run(config)      a base model without adapters, to generate and to be looked at
    load_run(workdir)          a finished run: .metrics() .nll(...) .logits(...) .generate(...) .routing(...) .view()
    write_run(workdir, run)    a run of its own from a loaded one, perhaps with other leaves
    train(config, workdir)     trains, or goes on;    evaluate(run): a report;    perform(config, workdir): a surgery
    data.build(config, ...)    the data of a config;    errors.InputError    what bad input raises

    RoutedLoRA, RoutedFFN, attach, sites, init_adapters       routed layers in a Flax model of your own
    balance, routing_loss, update_routers, routing_metrics    of what their routers decided;    nnx    in Flax NNX
    Lora, SoftmaxTopK, Balance, ...      the members of every axis by class;    Router, Adapter, ...    their contracts
    Engine; rank_gated, routed_ffn, ...  the engines and the ops
"""

import ast
import functools
import importlib
import pathlib

__version__ = "0.1.0"

_HOMES = {  # public name -> the module that is imported when it is asked for
    "load_config": "molora_jax.config.shipped",
    "load_base": "molora_jax.io.base",
    "load_base_run": "molora_jax.evaluation.run",
    "load_run": "molora_jax.evaluation.run",
    "write_run": "molora_jax.evaluation.run",
    "train": "molora_jax.training.loop",
    "evaluate": "molora_jax.evaluation.report",
    "perform": "molora_jax.surgery.perform",
    "RoutedFFN": "molora_jax.modules",
    "RoutedLoRA": "molora_jax.modules",
    "attach": "molora_jax.modules",
    "balance": "molora_jax.modules",
    "init_adapters": "molora_jax.modules",
    "routing_loss": "molora_jax.modules",
    "routing_metrics": "molora_jax.modules",
    "sites": "molora_jax.modules",
    "update_routers": "molora_jax.modules",
    "Engine": "molora_jax.engines",
}
_MODULES = {"data": "molora_jax.data", "errors": "molora_jax.errors", "nnx": "molora_jax.modules.nnx"}
_AXES = (
    "adapters",
    "inits",
    "routers",
    "placements",
    "losses",
    "optim",
    "objectives",
    "backbones",
    "regimes",
    "surgery",
)
__all__ = [*_HOMES, *_MODULES]


@functools.cache
def _members() -> dict[str, str]:
    """Class of a member or a contract of any axis, and name of an op -> its module; read from files, not imported."""
    from molora_jax.config.members import classes

    found = {name: f"molora_jax.{axis}.{stem}" for axis in _AXES for name, stem in classes(axis).items()}
    ops = pathlib.Path(__file__).parents[1] / "kernels_pallas" / "__init__.py"
    return found | dict.fromkeys(_literal_all(ops), "kernels_pallas")


def _literal_all(path) -> list[str]:
    body = ast.parse(path.read_text(encoding="utf-8")).body
    listed = [n.value for n in body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__"]
    return ast.literal_eval(listed[0])


def __getattr__(name):
    if name in _MODULES:
        return importlib.import_module(_MODULES[name])
    home = _HOMES.get(name) or (None if name.startswith("_") else _members().get(name))
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)


def __dir__():
    own = (name for name in globals() if name.startswith("__"))
    return sorted({*own, *__all__, *_members()})
