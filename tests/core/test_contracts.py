"""Contracts that no shipped router uses yet: mutable state, a carry through the layers, shared leaves and decisions."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from molora_jax import sharding
from molora_jax.adapters import ADAPTERS
from molora_jax.backbones.model import Model
from molora_jax.core import routing
from molora_jax.core.rules import Rule
from molora_jax.routers import ROUTERS
from molora_jax.routers.base import Router
from molora_jax.training.step import fresh, make_step, update_routers
from tests.battery.cases import BATCH, DEEP, SMALL, TARGETS_PER_ROW, base, mesh8, record


@dataclasses.dataclass(frozen=True)
class Biased(Router):
    """A bias that follows the load (state), a temperature for all layers (shared), the last layers' mass (carry)."""

    own: bool = True  # False: the weight is shared by the layers and a layer has no leaf of its own

    def k_max(self, experts):
        return 2

    def init_leaves(self, key, site, layer):
        return super().init_leaves(key, site, layer) if self.own else {}

    def init_shared(self, key, sites):
        shared = {"temperature": jnp.full((), 3.0)}
        return shared if self.own else shared | {"W": jax.random.normal(key, (4, sites[0].d_in))}

    def init_state(self, site):
        return {"bias": jnp.zeros(site.experts), "calls": jnp.zeros(())}

    def init_carry(self, batch, length):
        return jnp.zeros((batch, length))

    def route(self, p, shared, x, ctx):
        z = routing.logits((p if self.own else shared)["W"], x) * shared["temperature"]
        probs = routing.softmax(z + 0.1 * ctx.carry[..., None] * jnp.arange(z.shape[-1]))
        selected = routing.top_k(probs + ctx.state["bias"], 2)
        made = routing.finish(jnp.where(selected, probs, 0.0), selected, z, probs, ctx, k_max=2)
        count = jnp.sum(made.selected, axis=(0, 1), dtype=jnp.float32)
        return made, ctx.carry + jnp.sum(made.gates, axis=-1), {"count": count}

    def update(self, state, sums):
        under = jnp.mean(sums["count"]) - sums["count"]
        return {"bias": state["bias"] + 1e-3 * under, "calls": state["calls"] + 1}


@dataclasses.dataclass(frozen=True)
class Counting(Router):
    """Its gate is the number of routers that the token has met, as the carry knows it."""

    def k_max(self, experts):
        return 1

    def init_carry(self, batch, length):
        return {"met": jnp.zeros((batch, length))}

    def route(self, p, shared, x, ctx):
        z = routing.logits(p["W"], x)
        selected = jnp.broadcast_to(jnp.arange(z.shape[-1]) == 0, z.shape)
        gates = jnp.where(selected, ctx.carry["met"][..., None], 0.0)
        made = routing.finish(gates, selected, z, routing.softmax(z), ctx, k_max=1)
        return made, {"met": ctx.carry["met"] + 1}, {}


def model_of(router, experts, sites=("ffn",), decoder=SMALL):
    adapter = ADAPTERS["lora"](rank=2, alpha=4.0, dropout=0.0)
    return Model(decoder, (Rule("mix", sites, experts, adapter, router),), (), "dots", 3)


def step_of(model, accumulate=1, mesh=None):
    optimizer = optax.chain(record(), optax.sgd(1e-2))
    constrain = (lambda x: x) if mesh is None else sharding.constrain(mesh)
    step = make_step(
        model, optimizer, lambda i: 1e-2, seed=0, frozen=model.frozen_patterns(), accumulate=accumulate, clip=0.0,
        targets_per_row=TARGETS_PER_ROW, constrain=constrain,
    )  # fmt: skip
    state = jax.jit(lambda p: fresh(model, optimizer, p, model.frozen_patterns(), jax.random.key(0)))(base(SMALL))
    noisy = jax.tree.map(lambda x: x + 0.1 * jnp.sin(jnp.arange(x.size)).reshape(x.shape), state.adapters)
    out = None if mesh is None else (sharding.replicated(mesh),) * 2
    return jax.jit(step, out_shardings=out), state.replace(adapters=noisy)


@pytest.mark.parametrize(
    ("sites", "own"),
    [(("ffn",), True), (("ffn",), False), (("q", "down"), True),
     pytest.param(("q", "k"), False, marks=pytest.mark.slow)],  # the shared weight has one width
    ids=str,
)  # fmt: skip
def test_state_is_updated_once_a_step_on_global_sums(sites, own):
    """One update a step, from the sums of the whole batch, whatever the micro-steps and the devices."""
    model = model_of(Biased(own=own), (4, 4), sites)
    runs = {}
    for name, accumulate, mesh in (("one", 1, None), ("two", 2, None), ("eight", 1, mesh8())):
        step, state = step_of(model, accumulate, mesh)
        params, data = base(SMALL), BATCH
        if mesh is not None:
            params = sharding.put(params, sharding.param_shardings(model.config, params, mesh))
            data = sharding.put_batch(data, mesh, 8)
            state = sharding.put(jax.device_get(state), sharding.replicated(mesh))
        before = jax.device_get(state)
        state, _ = step(state, params, data)
        runs[name] = jax.device_get(state.router_state)
    scopes = runs["one"]["mix"]["000-001"]["router"]
    assert set(scopes) == set(sites)
    for leaves in scopes.values():
        np.testing.assert_array_equal(leaves["calls"], [1, 1])
        assert leaves["bias"].shape == (2, 4) and np.abs(leaves["bias"]).max() > 0
    jax.tree.map(np.testing.assert_array_equal, runs["one"], runs["two"])
    jax.tree.map(np.testing.assert_array_equal, runs["one"], runs["eight"])

    # by hand: evaluation leaves the state alone, and its sums are those of the step
    _, stats, _, _ = model.hidden(base(SMALL), before.adapters, before.router_state, BATCH)
    for scope, leaves in scopes.items():
        count = np.asarray(stats["mix"]["000-001"][scope]["router"]["count"])
        np.testing.assert_allclose(leaves["bias"], 1e-3 * (count.mean(1, keepdims=True) - count), rtol=1e-5, atol=1e-7)
        assert (count.sum(axis=1) == 2 * (BATCH["segment_ids"] > 0).sum()).all(), "padding is not counted"


def test_state_steers_the_next_step():
    model = model_of(Biased(), (4, 4))
    step, state = step_of(model)
    forced = jax.tree.map(jnp.copy, state.router_state)
    forced["mix"]["000-001"]["router"]["ffn"]["bias"] = jnp.tile(jnp.array([0.0, 9.0, 9.0, 0.0]), (2, 1))
    _, metrics = step(state.replace(router_state=forced), base(SMALL), BATCH)
    np.testing.assert_allclose(metrics["site"]["mix/ffn"]["load_max_over_mean"], 2.0, rtol=1e-6)


def test_shared_leaves_get_the_gradient_of_all_layers():
    model = model_of(Biased(), (4, 4))
    step, state = step_of(model)
    after, _ = step(state, base(SMALL), BATCH)
    shared = after.opt[0]["mix"]["shared"]["temperature"]

    def loss(temperatures):
        """Each layer with a temperature of its own, folded into its router's weight."""
        from molora_jax.objectives.lm import lm

        mix = state.adapters["mix"]
        start = mix["shared"]["temperature"]
        W = mix["000-001"]["router"]["ffn"]["W"] * (temperatures / start)[:, None, None]
        tree = {"mix": mix | {"000-001": mix["000-001"] | {"router": {"ffn": {"W": W}}}}}
        hidden = model.hidden(base(SMALL), tree, state.router_state, BATCH)[0]
        return lm(model, base(SMALL), hidden, BATCH, TARGETS_PER_ROW) / BATCH["loss_weight"].sum()

    each = jax.jit(jax.grad(loss))(jnp.full(2, state.adapters["mix"]["shared"]["temperature"]))
    assert (np.abs(each) > 0).all()
    np.testing.assert_allclose(shared, each.sum(), rtol=1e-4)


@pytest.mark.parametrize("experts", [(3, 3, 3, 3), (2, 2, 5, 5), (2, 0, 3, 4)], ids=str)
@pytest.mark.parametrize("sites", [("ffn",), ("q", "down")], ids=",".join)
def test_carry_passes_layers_and_segments(experts, sites):
    """The carry counts the routers met: through equal layers, other expert counts, layers without the rule."""
    model = model_of(Counting(), experts, sites, DEEP)
    params = base(DEEP)
    adapters = jax.jit(model.init_adapters)(jax.random.key(0), params)
    run = jax.jit(lambda a: model.hidden(params, a, {}, BATCH, collect=True)[3])
    gates, met = run(adapters)["mix"], 0
    for segment in model.segments:
        for i, layer in enumerate(segment.layers):
            if not experts[layer]:
                assert segment.name not in gates
                continue
            for scope in sites:
                found = np.asarray(gates[segment.name][scope][i])[BATCH["segment_ids"] > 0]
                np.testing.assert_array_equal(found[:, 0], met)
                assert not np.any(found[:, 1:])
                met += 1


@pytest.mark.parametrize(
    ("share", "sites"), [("attn", ("q", "k", "v", "o")), ("ffn", ("gate", "up", "down")), ("model", ("q", "down")),
                         ("model", ("ffn",))], ids=str)  # fmt: skip
def test_a_shared_decision_is_taken_once_and_no_leaf_is_dead(share, sites):
    """One router a sub-block, or one a model; every leaf has a gradient; statistics lead with the decisions taken."""
    router = ROUTERS["softmax_topk"](k=2, share=share)
    model = model_of(router, (4, 4), sites)
    step, state = step_of(model)
    after, metrics = step(state, base(SMALL), BATCH)
    for path, g in flatten_dict(jax.device_get(after.opt[0]), sep="/").items():
        dead = np.abs(g).reshape(len(g), -1).max(axis=1) == 0
        assert not dead.any(), f"{path}: no gradient at {np.flatnonzero(dead)}"
    table = metrics["site"][f"mix/{share}"]
    assert table["entropy"].shape == ((1,) if share == "model" else (2,))
    routers = [path for path in flatten_dict(state.adapters, sep="/") if "/router/" in path]
    assert len(routers) == 1


def test_a_model_wide_router_may_have_a_state():
    model = model_of(dataclasses.replace(Biased(), share="model"), (4, 4))
    step, state = step_of(model)
    after, _ = step(state, base(SMALL), BATCH)
    (calls,) = [x for path, x in flatten_dict(after.router_state, sep="/").items() if path.endswith("calls")]
    np.testing.assert_array_equal(calls, np.ones_like(calls))


def test_update_is_left_out_where_there_is_no_state():
    model = model_of(ROUTERS["top_p"](), (4, 4))
    assert update_routers(model, {}, {"mix": {}}) == {}


def test_an_adapter_may_have_shared_leaves_alone():
    """A basis for all layers (the place of VeRA and of MoS): no leaf of a layer's own, gradients for the shared."""

    @dataclasses.dataclass(frozen=True)
    class Tied(type(ADAPTERS["lora"]())):
        def init_leaves(self, key, site, layer, *, base=None, base_grad=None):
            return {}

        def init_shared(self, key, sites):
            made = {site.name: super(Tied, self).init_leaves(key, site, 0) for site in sites}
            return {f"{name}_{leaf}": value for name, leaves in made.items() for leaf, value in leaves.items()}

        def factors(self, p, shared, ctx):
            name = ctx.site.name
            return super().factors({leaf: shared[f"{name}_{leaf}"] for leaf in "AB"}, shared, ctx)

    for sites, experts, router in ((("ffn",), 4, ROUTERS["top_p"](p=0.6)), (("q", "down"), 1, None)):
        rule = Rule("mix", sites, (experts,) * 2, Tied(rank=2, alpha=4.0, dropout=0.0), router)
        step, state = step_of(Model(SMALL, (rule,), (), "dots", 3))
        after, metrics = step(state, base(SMALL), BATCH)
        gradients = flatten_dict(jax.device_get(after.opt[0]["mix"]["shared"]), sep="/")
        assert gradients and all(np.abs(g).max() > 0 for g in gradients.values())
        assert int(metrics["skipped"]) == 0
