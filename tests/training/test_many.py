"""Several runs in one step: each is the run trained alone (acceptance 8 of MixLoRA), and the base is read once.

No run has a routing loss of weight 0: at B = 0 all experts are equal, so the gradient of a router that the language
model's loss alone moves is rounding, which Adam makes a whole step of. Two programs then differ, whatever they are.
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from molora_jax import sharding
from molora_jax.core import trees
from molora_jax.optim import OPTIMIZERS
from molora_jax.training import many
from molora_jax.training.step import Knobs, fresh, make_step
from tests.battery.cases import BATCH, TARGETS_PER_ROW, Case, combination

STEPS, N = 3, 3
RULES = {
    "lora": ("lora", "none", "projection"),
    "mixlora": ("lora", "softmax_topk", "ffn"),
    "stateful": ("lora", "sigmoid_topk", "projection"),  # a load bias moves without a gradient
}
RANK = {"lora": 3, "mixlora": 18, "stateful": 3}  # 4 experts of rank 18: loops over tiles, by expert
MESHES = {
    "one device": (None, None),
    "replicate": (dict(data=4, fsdp=2, expert=1, tensor=1), "replicate"),
    "gather": (dict(data=2, fsdp=2, expert=2, tensor=1), "gather"),
    "all_to_all": (dict(data=2, fsdp=1, expert=4, tensor=1), "all_to_all"),
    "tensor": (dict(data=2, fsdp=2, expert=1, tensor=2), "replicate"),
}


class Side:
    """A method's step on a mesh: of one run, and of N."""

    def __init__(self, name, mesh=None, engine=None, **options):
        config = combination(*RULES[name], "kaiming", **{"method.rules.mix.adapter.dropout": 0.2})
        config.method.rules.mix.adapter.rank = RANK[name]
        self.mesh = None if mesh is None else sharding.make_mesh(mesh)
        case = Case(config, mesh=self.mesh, engine=engine)
        member = OPTIMIZERS["adamw"](learning_rate=1.0, warmup=2)
        shapes = jax.eval_shape(case.model.init_adapters, jax.random.key(0), case.params)
        pairs = trees.pairs(case.model, trees.split(shapes, case.frozen)[0])
        rated = lambda rates: (member.at(rates).make(STEPS, pairs), member.at(rates).schedule(STEPS))  # noqa: E731
        constrain = (lambda x: x) if self.mesh is None else sharding.constrain(self.mesh)
        options = dict(accumulate=1, clip=0.5, targets_per_row=TARGETS_PER_ROW) | options
        self.plain = make_step(
            case.model, None, None, rated=rated, frozen=case.frozen, constrain=constrain, **options
        )  # fmt: skip
        start = lambda seed: fresh(  # noqa: E731
            case.model, member.make(STEPS, pairs), case.params, case.frozen, jax.random.key(seed)
        )  # fmt: skip
        self.start, self.model, self.params = jax.jit(start), case.model, case.params
        self.knobs = [
            Knobs.of(seed, dataclasses.replace(member, learning_rate=rate), dict(losses_of(case.model, weight)).items())
            for seed, rate, weight in ((0, 1e-3, 0.1), (1, 2e-3, 0.05), (5, 5e-4, 0.5))  # not 0: see the module
        ]
        self.places = None
        if self.mesh is not None:
            places = sharding.param_shardings(case.decoder, case.params, self.mesh)
            self.params = sharding.put(jax.device_get(case.params), places)
            self.places = sharding.state_shardings(jax.eval_shape(self.start, 0), case.model, self.mesh)

    def rows(self, run, step):
        return {name: np.roll(rows, 2 * run + step, axis=0) for name, rows in BATCH.items()}

    def alone(self, run, bad=()):
        """`(metrics of every step, state)` of one run by itself."""
        state, knobs, out = self.start(run), self.knobs[run], []
        if self.mesh is not None:
            state = sharding.put(jax.device_get(state), self.places)
        step = jax.jit(self.plain, out_shardings=self._out(self.places))
        for i in range(STEPS):
            rows = self.rows(run, i)
            if (run, i) in bad:
                rows["loss_weight"] = rows["loss_weight"] * np.nan
            rows = rows if self.mesh is None else sharding.put_batch(rows, self.mesh, 8)
            state, metrics = step(state, self.params, rows, {}, knobs)
            out.append(jax.device_get(metrics))
        return out, jax.device_get(state)

    def _out(self, places):
        return None if self.mesh is None else (places, sharding.replicated(self.mesh))

    def arguments(self, i, bad=()):
        rows = [self.rows(run, i) for run in range(N)]
        for run, step in bad:
            if step == i:
                rows[run]["loss_weight"] = rows[run]["loss_weight"] * np.nan
        stacked = jax.tree.map(lambda *x: np.stack(x), *rows)
        return stacked if self.mesh is None else many.put_batches(rows, self.mesh)

    def together(self, bad=()):
        state, knobs, out = many.stack([self.start(run) for run in range(N)]), many.stack(self.knobs), []
        if self.mesh is not None:
            state = sharding.put(jax.device_get(state), many.shardings(self.places))
        for i in range(STEPS):
            state, metrics = self.step(state, self.params, self.arguments(i, bad), {}, knobs)
            out.append(jax.device_get(metrics))
        return out, jax.device_get(state)

    @functools.cached_property
    def step(self):
        places = None if self.mesh is None else many.shardings(self.places)
        return jax.jit(many.over_runs(self.plain), out_shardings=self._out(places))


def losses_of(model, weight):
    return [(name, dataclasses.replace(loss, weight=weight)) for name, loss in model.losses]


def same(side, bad=()):
    metrics, state = side.together(bad)
    for run in range(N):
        want, final = side.alone(run, bad)
        for got, wanted in zip(metrics, want, strict=True):
            got = jax.tree.map(lambda x: x[run], got)  # noqa: B023
            for path, value in flatten_dict(wanted, sep="/").items():
                np.testing.assert_allclose(flatten_dict(got, sep="/")[path], value, rtol=1e-5, atol=1e-5, err_msg=path)
        own = jax.tree.map(lambda x: x[run], state)  # noqa: B023
        for part in ("adapters", "router_state", "skipped", "step"):
            for a, b in zip(jax.tree.leaves(getattr(own, part)), jax.tree.leaves(getattr(final, part)), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5, err_msg=part)
    return metrics, state


SLOW = pytest.mark.slow


@pytest.mark.parametrize("name", [pytest.param("lora", marks=SLOW), "mixlora", pytest.param("stateful", marks=SLOW)])
def test_each_run_is_the_run_alone(name):
    metrics, state = same(Side(name))
    losses = np.array([m["loss"] for m in metrics])
    assert losses.shape == (STEPS, N) and len(np.unique(losses[-1].round(4))) == N, "no two runs are one"
    if name == "stateful":
        moved = [np.abs(leaf).max(axis=tuple(range(1, leaf.ndim))) for leaf in jax.tree.leaves(state.router_state)]
        assert all((m > 0).all() for m in moved)


@pytest.mark.parametrize(
    ("name", "on"),
    [("stateful", "gather"), *(pytest.param(*point, marks=SLOW) for point in (
        ("lora", "replicate"), ("mixlora", "replicate"), ("stateful", "replicate"), ("mixlora", "gather"),
        ("mixlora", "tensor"), ("mixlora", "all_to_all"),
    ))],
)  # fmt: skip
def test_each_run_is_the_run_alone_on_eight_devices(name, on):
    mesh, engine = MESHES[on]
    same(Side(name, mesh, engine))


@SLOW
def test_micro_steps_and_a_run_that_is_not_finite():
    """Run 1 has a NaN at its second step: it alone skips, the others do not see it."""
    side = Side("mixlora", accumulate=2)
    _, state = same(side, bad=((1, 1),))
    metrics, _ = side.together(bad=((1, 1),))
    assert [list(m["skipped"]) for m in metrics] == [[0, 0, 0], [0, 1, 0], [0, 0, 0]]


def test_the_base_has_no_axis_of_runs():
    """Every product with a frozen kernel is one, of all runs' rows; no kernel is copied for each run."""
    side = Side("mixlora")
    state, knobs = many.stack([side.start(run) for run in range(N)]), many.stack(side.knobs)
    text = str(jax.make_jaxpr(many.over_runs(side.plain))(state, side.params, side.arguments(0), {}, knobs))
    c = side.model.config
    for d_in, d_out in {c.dims(site) for site in ("q", "k", "gate", "down")}:
        assert f"f32[{d_in},{d_out}]" in text
        assert not re.search(rf"f32\[{N},({c.layers},)?{d_in},{d_out}\]", text), (d_in, d_out)


@SLOW
def test_no_collective_moves_what_runs_do_not_share():
    """Over `data`, one run's step and that of N have the same collectives (of N times the bytes)."""
    mesh = dict(data=8, fsdp=1, expert=1, tensor=1)
    side = Side("mixlora", mesh, "replicate")
    one = jax.jit(side.plain, out_shardings=side._out(side.places))
    state = sharding.put(jax.device_get(side.start(0)), side.places)
    rows = sharding.put_batch(side.rows(0, 0), side.mesh, 8)
    alone = one.lower(state, side.params, rows, {}, side.knobs[0]).compile().as_text()
    states = sharding.put(
        jax.device_get(many.stack([side.start(run) for run in range(N)])), many.shardings(side.places)
    )
    knobs = many.stack(side.knobs)
    together = side.step.lower(states, side.params, side.arguments(0), {}, knobs).compile().as_text()
    kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
    count = lambda text: {k: len(re.findall(rf"= \S+ {k}\(", text)) for k in kinds.split("|")}  # noqa: E731
    assert sum(count(together).values()) <= sum(count(alone).values()) + 1 and count(together)["all-reduce"]
    for kind in ("all-gather", "reduce-scatter", "all-to-all", "collective-permute"):
        assert count(together)[kind] == count(alone)[kind], kind


def test_take_is_the_reverse_of_stack():
    trees_ = [{"a": jnp.full((2, 3), i), "b": {"c": jnp.int32(i)}} for i in range(N)]
    for i in range(N):
        jax.tree.map(np.testing.assert_array_equal, many.take(many.stack(trees_), i), trees_[i])
    one = jnp.ones(3)
    tree, axes = many.shared_or_stacked([{"w": one, "own": jnp.full(2, i)} for i in range(N)])
    assert tree["w"] is one and axes == {"w": None, "own": 0} and tree["own"].shape == (N, 2)
