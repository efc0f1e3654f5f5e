"""Mixtures of LoRA experts in JAX.

Importing the package imports nothing else: a mistake in a config is reported before jax is loaded.
"""

__version__ = "0.1.0"
__all__ = ["load_run"]


def __getattr__(name):
    if name == "load_run":
        from molora_jax.evaluate.run import load_run

        return load_run
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
