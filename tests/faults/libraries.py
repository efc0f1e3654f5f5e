"""What the libraries underneath do with the same faults, without us: one line a fact, measured here and now.

    python -m tests.faults.libraries

Why the checks of this project exist; docs/reliability.md quotes it. A library that has learnt better says so here.
"""

import contextlib
import pathlib
import random
import tempfile

import grain
import jax
import numpy as np
import safetensors.numpy
from ml_collections import ConfigDict
from orbax.checkpoint import v1 as ocp

from tests.faults import mutate

TRIES = 20


def _saved(folder, number=0):
    tree = {
        "w": np.random.default_rng(number).standard_normal(4000).astype(np.float32),
        "step": np.full(1, 3, np.int32),
    }
    context = ocp.Context()
    context.array.saving.use_ocdbt = False
    context.array.saving.use_compression = False
    with context:
        ocp.save_pytree(folder, tree)
    return tree, max(pathlib.Path(folder).rglob("c/0"), key=lambda path: path.stat().st_size)


def _load(folder, tree):
    return ocp.load_pytree(folder, jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), tree))


def _raises(call) -> bool:
    try:
        call()
    except Exception:  # noqa: BLE001 - whatever a library raises
        return True
    return False


def orbax_flipped_bit(folder):
    silent = 0
    for number in range(TRIES):
        tree, file = _saved(folder / str(number), number)
        raw, rng = bytearray(file.read_bytes()), random.Random(number)
        raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        file.write_bytes(raw)
        with contextlib.suppress(Exception):
            silent += not np.array_equal(_load(folder / str(number), tree)["w"], tree["w"])
    return f"Orbax: a flipped bit of a tensor's file is restored as another value, silently: {silent} of {TRIES}"


def orbax_truncated(folder):
    raised = 0
    for number in range(TRIES):
        tree, file = _saved(folder / str(number), number)
        file.write_bytes(file.read_bytes()[: random.Random(number).randrange(16_000)])
        raised += _raises(lambda n=number, t=tree: _load(folder / str(n), t))
    return f"Orbax: a truncated file raises: {raised} of {TRIES}"


def orbax_dtype(folder):
    tree, _ = _saved(folder / "a")
    got = _load(folder / "a", {**tree, "w": np.zeros(4000, np.int32)})["w"]
    return f"Orbax: float32 restored into a template of int32 is cast without a word: {got.dtype == np.int32}"


def orbax_missing_leaf(folder):
    tree, _ = _saved(folder / "a")
    raised = _raises(lambda: _load(folder / "a", tree | {"b": np.zeros(3)}))
    return f"Orbax: a template with a leaf that is not there raises: {raised}"


def safetensors_values(folder):
    raw = safetensors.numpy.save({"../../w": np.full(4, np.nan, np.float32)})
    loaded = safetensors.numpy.load(raw)
    return f"safetensors: NaN and a name such as ../../w are accepted: {bool(np.isnan(loaded['../../w']).all())}"


def safetensors_flipped_bit(folder):
    raw = bytearray(safetensors.numpy.save({"w": np.zeros(1000, np.float32)}))
    raw[-100] ^= 1
    return f"safetensors: a flipped bit of a value is accepted: {bool(safetensors.numpy.load(bytes(raw))['w'].any())}"


def npz_pickle(folder):
    canary, file = folder / "ran", folder / "a.npz"
    file.write_bytes(mutate.npz_with_pickle(canary))
    refused = _raises(lambda: np.load(file)["a"])
    np.load(file, allow_pickle=True)["a"]
    return f"numpy: an npz file runs code under allow_pickle=True: {canary.exists()}; refused by default: {refused}"


def config_dict(folder):
    config = ConfigDict({"learning_rate": 1e-3})
    config.learning_rte = 1.0
    locked = ConfigDict({"learning_rate": 1e-3}).lock()
    locked.learning_rate = float("nan")
    taken = "learning_rte" in config, locked.learning_rate != locked.learning_rate
    return f"ml_collections: a config takes a misspelt key: {taken[0]}; a locked one takes NaN: {taken[1]}"


def grain_shards(folder):
    """Two processes read six of twelve samples; four processes go on from that state."""

    def shard(count, index):
        return iter(grain.MapDataset.range(12)[index::count].to_iter_dataset())

    readers = [shard(2, i) for i in range(2)]
    seen = [next(reader) for reader in readers for _ in range(3)]
    state = readers[0].get_state()
    for index in range(4):
        reader = shard(4, index)
        reader.set_state(state)
        with contextlib.suppress(StopIteration):
            seen += list(reader)
    repeated = len(seen) - len(set(seen))
    return (
        f"grain: a state of 2 processes is taken by 4: {repeated} of 12 samples came twice, {12 - len(set(seen))} never"
    )


FACTS = (
    orbax_flipped_bit, orbax_truncated, orbax_dtype, orbax_missing_leaf, safetensors_values, safetensors_flipped_bit,
    npz_pickle, config_dict, grain_shards,
)  # fmt: skip


def main():
    for fact in FACTS:
        with tempfile.TemporaryDirectory() as folder:
            print(fact(pathlib.Path(folder)), flush=True)


if __name__ == "__main__":
    main()
