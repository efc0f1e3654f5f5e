"""Mixtures of LoRA experts in JAX.

Importing the package imports nothing else: a mistake in a config is reported before jax is loaded.

    load_base(source)          a base model's weights and tokenizer
    load_base_run(config)      a base model without adapters, to generate and to be looked at
    load_run(workdir)          a finished run: .metrics() .nll(...) .logits(...) .generate(...) .routing(...) .view()
    write_run(workdir, run)    a run of its own from a loaded one, perhaps with other leaves
    train(config, workdir)     trains, or goes on;    evaluate(run): a report;    perform(config, workdir): a surgery
    data.build(config, ...)    the data of a config;    errors.InputError    what bad input raises
"""

import importlib

__version__ = "0.1.0"

_HOMES = {  # public name -> the module that is imported when it is asked for
    "load_base": "molora_jax.io.base",
    "load_base_run": "molora_jax.evaluation.run",
    "load_run": "molora_jax.evaluation.run",
    "write_run": "molora_jax.evaluation.run",
    "train": "molora_jax.training.loop",
    "evaluate": "molora_jax.evaluation.report",
    "perform": "molora_jax.surgery.perform",
}
_MODULES = ("data", "errors")
__all__ = [*_HOMES, *_MODULES]


def __getattr__(name):
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return [*globals(), *__all__]
