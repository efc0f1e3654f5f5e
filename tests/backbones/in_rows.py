"""A family's checkpoint with adapters, where rows are more than one text: padded, packed, from a cache, on a mesh.

    rows 0, 1   the first text padded on the right, the second on the left; the loss is theirs
    row 2       both texts, packed
    row 3       the second text padded on both sides

What must come out is the fixture's: `tests/fixtures/make_families.py` runs each text alone.
"""

import dataclasses
import functools

import jax
import numpy as np

from configs import common
from molora_jax import config as config_lib
from molora_jax import sharding
from molora_jax.backbones.compile import compile_model
from molora_jax.decode import generate as decoding
from molora_jax.engines import ALONE, Engine
from molora_jax.objectives.lm import lm
from tests.backbones import family_cases
from tests.backbones.family_cases import S

T, B = 2 * S + 4, 8  # places in a row; rows 4 to 7 are the first four again, for a mesh
PLACES = {"padded": ((0, 0, 0), (1, 1, T - S)), "packed": ((2, 0, 0), (2, 1, S)), "in the middle": ((3, 1, 3),)}
MESH = dict(data=2, fsdp=2, tensor=2)
PROMPTS, NEW = (list(range(40, 62)), [9, 100, 7]), 12  # they grow beyond every window and context of the cases


def batch() -> dict:
    tokens, targets = family_cases.rows()
    out = {name: np.zeros((B, T), np.int32) for name in ("tokens", "targets", "segment_ids", "positions")}
    weight = np.zeros((B, T), np.float32)
    for where, places in PLACES.items():
        for row, text, start in places:
            at = (slice(row, None, 4), slice(start, start + S))
            out["tokens"][at], out["targets"][at] = tokens[text], targets[text]
            out["segment_ids"][at] = 1 + out["segment_ids"][row].max()
            out["positions"][at] = np.arange(S)
            weight[row, at[1]] = where == "padded"
    return out | {"loss_weight": weight}


def adapted_model(config: dict, backbone, engine=ALONE):
    """LoRA of scale 1 on every site, and the fixture's factors as its adapters."""
    asked = common.get_config()
    adapter = common.adapter(rank=family_cases.R, alpha=float(family_cases.R), dropout=0.0)
    asked.method.rules = dict(all=common.rule(",".join(family_cases.sites_of(config)), adapter=adapter))
    asked.losses = {}
    config_lib.validate(asked)
    model = compile_model(asked, backbone)
    pairs = family_cases.factors(config, backbone.dims)
    (segment,) = model.segments
    tree = {site: {name: x[:, None] for name, x in pair.items()} for site, pair in pairs.items()}
    return dataclasses.replace(model, engine=engine), {"all": {segment.name: tree}}


@functools.partial(jax.jit, static_argnames="model")
def _run(params, adapters, batch, model):
    def loss(adapters):
        hidden = model.hidden(params, adapters, {}, batch)[0]
        return lm(model, params, hidden, batch, T) / (2 * S), model.logits(params, hidden)

    return jax.value_and_grad(loss, has_aux=True)(adapters)


def run(config: dict, base, *, mesh: bool = False) -> dict:
    """`{where: summary}`: logits of the texts at each of PLACES; loss and gradients of those that are padded."""
    params, rows, engine = base.params, batch(), ALONE
    if mesh:
        devices = sharding.make_mesh(dict.fromkeys(sharding.AXES, 1) | MESH)
        engine = Engine("replicate", devices)
        params = sharding.put(params, sharding.param_shardings(base.config, params, devices))
        rows = sharding.put_batch(rows, devices, B)
    model, adapters = adapted_model(config, base.config, engine)
    if mesh:
        adapters = sharding.put(adapters, sharding.adapter_shardings(adapters, model, devices))
    with jax.default_matmul_precision("highest"):
        (loss, logits), gradients = jax.device_get(_run(params, adapters, rows, model=model))
    (tree,) = gradients["all"].values()
    gradients = {site: {name: x[:, 0] for name, x in pair.items()} for site, pair in tree.items()}
    out = {}
    for where, places in PLACES.items():
        taken = {text: logits[row, start : start + S] for row, text, start in places}
        taken = np.stack([taken.get(text, taken[1]) for text in (0, 1)])
        out[where] = family_cases.adapted_summary(taken, loss, gradients)
    return out


def errors(found: dict, wanted: dict) -> dict[str, float]:
    """`logits` (the largest error of the placements), `loss`, `gradient` (of any factor)."""
    apart = lambda a, b: float(np.linalg.norm(a - b) / np.linalg.norm(b))  # noqa: E731
    middle = found["in the middle"]["logits"][1], wanted["logits"][1]
    logits = [apart(found[where]["logits"], wanted["logits"]) for where in ("padded", "packed")] + [apart(*middle)]
    padded = found["padded"]
    gradient = max(apart(padded[name], x) for name, x in wanted.items() if "/" in name)
    return {"logits": max(logits), "loss": apart(padded["loss"], wanted["loss"]), "gradient": gradient}


def cached(config: dict, base) -> float:
    """How far the logits of a cached generation are from an uncached one's: both must choose the same tokens."""
    model, adapters = adapted_model(config, base.config)
    if not decoding.may_cache(model, PROMPTS, NEW):
        return _falls_back(model, base, adapters)
    rows = decoding.pad(PROMPTS, NEW, model.config.context, seed=3, rows=2)
    static = dict(model=model, size=decoding.new_slots(rows[0].shape[1], NEW), sample=False, keep_logits=True)
    made = []
    with jax.default_matmul_precision("highest"):
        for cache in (True, False):
            inputs = (base.params, adapters, {}, *rows, np.float32(0), np.int32(-1))
            made.append(jax.device_get(decoding.decode(*inputs, cache=cache, **static)))
    (ids, counts, logits), (again, _, slow) = made
    assert (counts == NEW).all() and (ids == again).all(), (ids, again)
    return float(np.linalg.norm(logits - slow) / np.linalg.norm(slow))


def _falls_back(model, base, adapters) -> float:
    """A text grows over a bound of its rotation: 0 where what is asked with a cache is what comes without one."""
    told = [
        decoding.generate(model, base.params, adapters, {}, PROMPTS, max_new_tokens=NEW, eos_id=None, cache=cache)
        for cache in (True, False)
    ]
    return float(told[0] != told[1])
