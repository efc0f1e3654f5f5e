"""The frozen models that objectives ask for: the base without adapters, another run, another base.

They lie on the mesh beside the run's own arrays. What they are made of is part of the run's identity.
"""

import dataclasses
import hashlib
import json

import jax

from molora_jax import sharding
from molora_jax.backbones.base import needs_head
from molora_jax.backbones.compile import compile_base
from molora_jax.engines import Engine
from molora_jax.errors import InputError
from molora_jax.io.base import Base, load_base
from molora_jax.objectives import Frozen
from molora_jax.runs import remote
from molora_jax.runs.checkpoints import read_manifest
from molora_jax.runs.modules import in_place
from molora_jax.runs.opened import open_run

START = "start"  # of the run: its adapters before the first step


def own_reference(source: str, params: dict, start: dict, model) -> Frozen:
    """A run's own model as it was: "base", without its rules, or "start", before the first step.

    `params`: the base's; `start`: the adapters, router state and (where it has them) modules that it began with.
    """
    if source == START:
        params = in_place(params, start.get("modules", {}))
        return Frozen(params, start["adapters"], start["router_state"], model)
    return Frozen(params, {}, {}, model.without_rules())


def load_frozen(
    source: str, config, base: Base, params: dict, model, mesh, *, where: str, known=()
) -> tuple[Frozen, str]:  # fmt: skip
    """`(model, digest of what it is)` of "base", a run's folder, or a base source; its arrays on the mesh.

    Args:
      base, params, model: the run's own. known: digests that it recorded, see `load_base`.

    Raises:
      InputError: no such run or base, or one of another vocabulary.
    """
    if source == "base":
        return own_reference(source, params, {}, model), base.digest
    adapters, state, whole = {}, {}, sharding.replicated(mesh)
    folder = remote.at_hand(source, where=where)
    if (folder / "config.json").is_file() and (folder / "checkpoints").is_dir():
        run = open_run(folder, warn=lambda text: None)
        other, frozen_model = run.base, dataclasses.replace(run.model, engine=Engine("replicate", mesh))
        own = in_place(other.params, run.items.get("modules", {}))
        adapters, state = run.items["adapters"], run.items["router_state"]
        saved = read_manifest(folder / "checkpoints" / str(run.step))["tree"]
        digest = hashlib.sha256(json.dumps([other.digest, saved], sort_keys=True).encode()).hexdigest()
    elif ":" in source:
        try:
            other = load_base(source, dtype=config.base.dtype, seed=config.seed, known=known, where=where)
        except InputError as error:  # of a file, say: which field named it
            raise error if error.where == where else error.inside(where) from None
        own, frozen_model, digest = other.params, compile_base(config, other.config), other.digest
    else:
        raise InputError(where, got=repr(source), expected="the folder of a run, or a base source (pkg:, dir:, ...)")
    needs_head(other.config, "a distribution over tokens", where)
    _same_vocabulary(other, base, source, where)
    if config.data.seq_len > other.config.context:
        raise InputError(
            where, got=f"{source}, with a context of {other.config.context}",
            expected=f"at least data.seq_len={config.data.seq_len}",
        )  # fmt: skip
    frozen_model = dataclasses.replace(frozen_model, max_segments=model.max_segments, tasks=model.tasks)
    same = (other.digest, other.config) == (base.digest, base.config) and own["embed"].dtype == params["embed"].dtype
    same = same and jax.tree.structure(other.params) == jax.tree.structure(params)  # of the same quantisation
    if same and own is other.params:  # no trained copies: the arrays that are there
        own = params
    else:
        own = sharding.put(own, sharding.param_shardings(other.config, own, mesh))
    return Frozen(own, sharding.put(adapters, whole), sharding.put(state, whole), frozen_model), digest


def _same_vocabulary(other: Base, base: Base, source: str, where: str):
    """Distributions over tokens can only be compared where the tokens are the same."""
    theirs, ours = (model_base.tokenizer.inner.get_vocab(with_added_tokens=True) for model_base in (other, base))
    if other.config.vocab == base.config.vocab and theirs == ours:
        return
    got = f"{source}, with {other.config.vocab:,} tokens"
    if other.config.vocab == base.config.vocab:
        name = min(theirs.items() ^ ours.items(), key=lambda item: item[1])[0]
        got = f"{source}, whose token {name!r:.40} is another or none here"
    raise InputError(where, got=got, expected=f"the vocabulary of base.source ({base.config.vocab:,} tokens)")
