"""Inf and NaN: no gradient, weight or adapter that holds one reaches a run's state."""

import random
import shutil

import numpy as np

import molora_jax
from molora_jax.io import tensors
from molora_jax.io.base import load_base
from molora_jax.runs import warm_start
from molora_jax.runs.checkpoints import Checkpoints, read_manifest
from molora_jax.training import loop
from tests.faults.common import (
    base_folder,
    changed,
    copy_run,
    digests,
    finished_run,
    metric_rows,
    scratch,
    start,
    tiny_config,
)
from tests.faults.report import each, refused

BAD = (np.nan, np.inf, -np.inf)


def _poisoned(change, steps):
    """`put_batch` that changes the batches of some steps (the first is 1)."""
    put_batch, calls = loop.sharding.put_batch, []

    def put(batch, *rest):
        calls.append(None)
        return put_batch(change(dict(batch)) if len(calls) in steps else batch, *rest)

    return put


def gradients(seed, tries):
    """Steps whose gradients are not finite are skipped as a whole and counted; the others go on."""

    def one(number):
        rng = random.Random(number)
        bad = set(rng.sample(range(2, 6), rng.randrange(1, 3)))
        value = BAD[number % 2]  # a weight below 0 is no target

        def poison(batch):
            weight = np.array(batch["loss_weight"], np.float32)
            weight[np.unravel_index(weight.argmax(), weight.shape)] = value
            return batch | {"loss_weight": weight}

        with scratch() as path:
            with changed(loop.sharding, put_batch=_poisoned(poison, bad)):
                result, _ = start(tiny_config(save_every=1), path / "run")
            saved = [digests(path / "run", step) for step in range(7)]
            rows = metric_rows(path / "run")
        same = [n for n in range(1, 7) if _state(saved[n]) == _state(saved[n - 1])]
        counted = [n for n in range(1, 7) if float(rows[n]["skipped"]) > 0]
        if result.step != 6 or set(same) != bad or set(counted) != bad or not np.isfinite(float(rows[6]["loss"])):
            return f"poisoned {sorted(bad)} with {value}: unchanged after {same}, counted at {counted}"
        return ""

    return each(seed, tries, one)


def _state(leaves):
    return {name: leaf for name, leaf in leaves.items() if not name.startswith("train/")}


def padding(seed, tries):
    """A batch of nothing but padding: loss 0, nothing that is not finite."""

    def one(number):
        empty = {2 + number % 4}

        def blank(batch):
            return {name: np.zeros_like(array) for name, array in batch.items()}

        with scratch() as path:
            with changed(loop.sharding, put_batch=_poisoned(blank, empty)):
                result, _ = start(tiny_config(), path / "run")
            rows = metric_rows(path / "run")
        (at,) = empty
        numbers = [float(row[name]) for row in rows.values() for name in ("loss", "lm_loss", "grad_norm")]
        if result.step != 6 or not np.isfinite(numbers).all() or float(rows[at]["lm_loss"]) != 0:
            return f"step {at} was padding alone: lm_loss {rows[at]['lm_loss']}, {numbers}"
        return ""

    return each(seed, tries, one)


def base(seed, tries):
    """A weight that is not finite is refused by its tensor's name."""
    source = base_folder()

    def one(number):
        rng = random.Random(number)
        with scratch() as path:
            shutil.copytree(source, path / "base")
            file = path / "base" / "model.safetensors"
            arrays = {name: np.array(view) for name, view in tensors.read(file).items()}
            name = rng.choice(sorted(arrays))
            arrays[name].reshape(-1)[rng.randrange(arrays[name].size)] = BAD[number % 3]
            tensors.write(file, {k: a.shape for k, a in arrays.items()}, np.float32, iter(arrays.values()))
            return refused(lambda: load_base(f"dir:{path / 'base'}"), name)

    return each(seed, tries, one)


def adapters(seed, tries):
    """A checkpoint whose values are not finite, every digest right: no start from it, and it does not open."""
    source = finished_run()
    whole = warm_start.load(str(source), ("adapters", "opt", "router_state", "train"))
    meta = {k: read_manifest(source / "checkpoints" / "6")[k] for k in ("config", "identity", "samples")}

    def one(number):
        rng = random.Random(number)
        with scratch() as path:
            run = copy_run(source, path / "run")
            shutil.rmtree(run / "checkpoints")
            tree = _spoiled(whole["adapters"], rng, BAD[number % 3])
            checkpoints = Checkpoints(run / "checkpoints", keep=2)
            checkpoints.save(6, whole | {"adapters": tree}, meta=meta, wait=True)
            if number % 2:
                return refused(lambda: molora_jax.load_run(str(run)), "adapters")

            def warm():
                config = tiny_config(init_from=str(run), steps=1)
                result, _ = start(config, path / "other")
                return f"it trained to step {result.step}"

            return refused(warm, "init_from")

    return each(seed, tries, one)


def _spoiled(tree, rng, value):
    """A copy with one value changed."""
    leaves = []

    def copy(node):
        if isinstance(node, dict):
            return {key: copy(child) for key, child in node.items()}
        leaves.append(np.array(node))
        return leaves[-1]

    result = copy(tree)
    floats = [leaf for leaf in leaves if leaf.dtype.kind == "f" and leaf.size]
    leaf = rng.choice(floats)
    leaf.reshape(-1)[rng.randrange(leaf.size)] = value
    return result
