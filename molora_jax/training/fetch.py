"""All that a run reads, brought to this machine and made ready: `launch.fetch`."""

import pathlib

from molora_jax import data as data_lib
from molora_jax import stores
from molora_jax.backbones.sizes import base_shapes
from molora_jax.config import objectives as objectives_config
from molora_jax.config.resolve import adapter_source
from molora_jax.core import trees
from molora_jax.io.base import configured_base, load_base
from molora_jax.io.base_facts import pinned
from molora_jax.objectives import compile_objective
from molora_jax.runs import remote
from molora_jax.training.frozen import START


def fetch(config):
    """Yields a line for each thing that is here now.

    Raises:
      InputError: what the run's start would raise of its base, its rows and its inputs.
    """
    base = configured_base(config, stored=True)
    base, _ = pinned(base, None)
    count = trees.count(base_shapes(base.config))
    at = "made from a seed" if base.folder is None else base.folder
    yield f"base {config.base.source}: {count:,} weights, sha256 {base.digest[:16]}, {at}"
    for where, value in objectives_config.used(config).items():
        for name, source in compile_objective(value, where=where).frozen().items():
            if source not in (START, "base"):
                yield f"{where}.{name} {source}: {_model(source, config)}"
    starts = [config.train.init_from] if config.train.init_from else []
    for run in (*starts, *(config.surgery.get("inputs", ()) if config.get("surgery") else ())):
        yield f"run {run}: {remote.at_hand(run)}"
    for rule in config.method.rules.values():
        for text in rule.load:
            kind, path = adapter_source(text)
            yield f"adapter {text}: {remote.at_hand(path) if kind == 'run' else stores.at_hand(path)}"
    data = data_lib.build(
        config.data, tokenizer=base.tokenizer, batch_size=config.train.batch_size, seed=config.seed,
        reads=objectives_config.reads(config), unit=objectives_config.unit(config),
    )  # fmt: skip
    yield f"data {config.data.tasks}: {data.train.size:,} training examples, fingerprint {data.fingerprint[:16]}"


def _model(source: str, config) -> pathlib.Path | str:
    """A frozen model that an objective asks for: a run's folder, or a base source."""
    if ":" not in source or stores.is_url(source):
        return remote.at_hand(source)
    return load_base(source, dtype=config.base.dtype, seed=config.seed, stored=True).folder or "made from a seed"
