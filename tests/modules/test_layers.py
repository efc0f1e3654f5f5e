"""RoutedLoRA and RoutedFFN against numpy in float64, what is sown, what is refused."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import freeze
from jax.sharding import Mesh

import molora_jax as mj
from molora_jax.core import routing as routing_math
from molora_jax.errors import InputError
from tests.modules.oracle import SCALE, D, E, F, K, R, call, gates64, init, mixture, mixture64, normal, random_leaves

LORA = mj.Lora(rank=R, alpha=8.0, dropout=0.0)
TOPK = mj.SoftmaxTopK(k=K)
W, BIAS = normal(1, D, F), normal(2, F)
ONE = Mesh(np.array(jax.devices()[:1]), ("expert",))


def layer(**changes):
    return mj.RoutedLoRA(**(dict(features=F, experts=E, adapter=LORA, router=TOPK) | changes))


def variables_of(module, *args, **kwargs):
    variables = init(module, *args, **kwargs)
    return {name: tree if name == "router_state" else random_leaves(tree) for name, tree in variables.items()}


@pytest.mark.parametrize("lead", [(), (6,), (2, 5), (2, 2, 3)], ids=str)
def test_equals_numpy_for_any_leading_axes(lead):
    x = normal(0, *lead, D)
    valid = normal(5, *lead) > -0.5
    variables = variables_of(layer(), x, kernel=W, bias=BIAS)
    for mask in (None, valid):
        y = call(layer(), variables, x, kernel=W, bias=BIAS, valid=mask)
        np.testing.assert_allclose(y, mixture64(x, W, BIAS, variables["adapters"], mask), atol=2e-5)


def test_gradients_equal_those_of_the_einsum():
    x = normal(0, 2, 5, D)
    variables = variables_of(layer(), x, kernel=W)
    weight = normal(7, 2, 5, F)

    def ours(adapters, x, W):
        return jnp.sum(weight * layer().apply({"adapters": adapters}, x, kernel=W))

    expected = jax.jit(jax.grad(lambda leaves, x, W: jnp.sum(weight * mixture(x, W, None, leaves)), (0, 1, 2)))
    got = jax.jit(jax.grad(ours, (0, 1, 2)))(variables["adapters"], x, W)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected(variables["adapters"], x, W)), strict=True):
        np.testing.assert_allclose(a, b, atol=3e-5, rtol=3e-5)


def test_the_start_is_the_base_and_no_router_is_plain_lora():
    x = normal(0, 2, 5, D)
    base = np.asarray(jax.jit(lambda x: x @ W + BIAS)(x))
    for one in (layer(), layer(experts=1, router=None), layer(adapter=mj.Dora(rank=R, dropout=0.0))):
        variables = init(one, x, kernel=W, bias=BIAS)
        assert np.array_equal(call(one, variables, x, kernel=W, bias=BIAS), base)
    one = layer(experts=1, router=None)
    variables = variables_of(one, x, kernel=W)
    A, B = (np.asarray(variables["adapters"][name][0], np.float64) for name in "AB")
    np.testing.assert_allclose(call(one, variables, x, kernel=W), x @ (W + SCALE * (A.T @ B)), atol=2e-5)
    y, sown = call(one, variables, x, kernel=W, mutable=["routing"])
    assert not sown


def test_the_ffn_equals_numpy():
    x, kernels = normal(0, 2, 5, D), dict(gate=normal(1, D, F), up=normal(2, D, F), down=normal(3, F, D))
    one = mj.RoutedFFN(experts=E, adapter=LORA, router=TOPK)
    variables = variables_of(one, x, **kernels)
    leaves = jax.tree.map(lambda a: np.asarray(a, np.float64), variables["adapters"])
    flat = np.asarray(x, np.float64).reshape(-1, D)
    gates, _ = gates64(flat, leaves["router"]["W"])
    with pytest.raises(InputError, match=r"RoutedFFN, biases\['up'\]: got a float; expected an array"):
        one.apply(variables, x, **kernels, biases=dict(gate=BIAS, up=1.0))
    expected = np.zeros((len(flat), D))
    for e in range(E):
        own = {s: kernels[s] + SCALE * leaves[s]["A"][e].T @ leaves[s]["B"][e] for s in kernels}
        g = flat @ own["gate"]
        expected += gates[:, e : e + 1] * ((g / (1 + np.exp(-g)) * (flat @ own["up"])) @ own["down"])
    y, sown = call(one, variables, x, **kernels, mutable=["routing"])
    np.testing.assert_allclose(y.reshape(-1, D), expected, atol=1e-4)
    np.testing.assert_allclose(sown["routing"]["experts"][0].decision.gates.reshape(-1, E), gates, atol=1e-6)


def test_dropout_is_on_with_train_and_a_key_alone():
    one, x = layer(adapter=mj.Lora(rank=R, dropout=0.5)), normal(0, 2, 5, D)
    variables = variables_of(one, x, kernel=W)
    run = lambda seed=0, **more: call(  # noqa: E731
        one, variables, x, kernel=W, rngs={"dropout": jax.random.key(seed)}, **more
    )
    assert np.array_equal(run(), call(one, variables, x, kernel=W))
    assert np.array_equal(run(1, train=True), run(1, train=True))
    assert not np.allclose(run(1, train=True), run(2, train=True))
    with pytest.raises(InputError, match="no rng named dropout.*adapter.dropout"):
        call(one, variables, x, kernel=W, train=True)
    jax.eval_shape(lambda v: layer().apply(v, x, kernel=W, train=True), variables)  # nothing is random here


def test_what_is_sown_and_only_where_asked():
    x = normal(0, 2, 5, D)
    variables = init(layer(), x, kernel=W)
    assert set(variables) == {"adapters"}
    y = call(layer(), variables, x, kernel=W)
    assert y.shape == (2, 5, F)
    valid = jnp.ones((2, 5), bool).at[0, 3:].set(False)
    _, sown = call(layer(), variables, x, kernel=W, valid=valid, mutable=["routing"])
    (one,) = sown["routing"]["experts"]
    gates, probs = gates64(x.reshape(-1, D), variables["adapters"]["router"]["W"])
    keep = np.asarray(valid).reshape(-1)
    np.testing.assert_allclose(one.decision.gates.reshape(-1, E), gates * keep[:, None], atol=1e-6)
    f, P = (gates[keep] > 0).mean(0) / K, probs[keep].mean(0)
    of_all, of_tokens, z_loss, metrics = jax.jit(
        lambda sown: (mj.balance(sown), mj.balance(sown, normalise="tokens"), mj.routing_loss(sown, mj.ZLoss()),
                      mj.routing_metrics(sown))
    )(sown)  # fmt: skip
    np.testing.assert_allclose(of_all, E * np.sum(f * P), rtol=1e-6)
    with pytest.raises(InputError, match="weight: got 0.5; expected nothing.*0.01 . mj.balance"):
        mj.balance(sown, weight=0.5)
    np.testing.assert_allclose(of_tokens, K * E * np.sum(f * P), rtol=1e-6)
    z = x.reshape(-1, D) @ np.asarray(variables["adapters"]["router"]["W"]).T
    np.testing.assert_allclose(z_loss, np.mean(np.log(np.exp(z[keep]).sum(-1)) ** 2), rtol=1e-5)
    assert float(metrics[""]["active_experts"]) == K


def test_a_router_with_state_is_updated_once_a_step():
    one, x = layer(router=mj.SigmoidTopK(k=K, bias_rate=0.125)), normal(0, 2, 5, D)
    variables = variables_of(one, x, kernel=W)
    _, sown = call(one, variables, x, kernel=W, mutable=["routing"])
    count = np.asarray(sown["routing"]["experts"][0].decision.selected).sum((0, 1))
    state = jax.jit(mj.update_routers)(variables["router_state"], sown, sown)  # two micro-steps
    np.testing.assert_array_equal(state["b"], 0.125 * np.sign(count.mean() - count))
    frozen = freeze({"a": {"b": variables["router_state"]}})
    deep = mj.update_routers(
        frozen, {"routing": {"a": {"b": sown["routing"]}}}, {"routing": {"a": {"b": sown["routing"]}}}
    )
    np.testing.assert_array_equal(deep["a"]["b"]["b"], state["b"])
    assert not np.array_equal(
        call(one, variables | {"router_state": {"b": jnp.arange(4.0)}}, x, kernel=W), call(one, variables, x, kernel=W)
    )
    assert mj.update_routers({}, sown) == {}
    with pytest.raises(InputError, match="no decision of a router"):
        mj.update_routers(variables["router_state"], {"routing": {}})


def test_what_never_trains_is_not_among_the_adapters():
    x = normal(0, 2, 5, D)
    one = layer(adapter=mj.Lora(rank=R, dropout=0.0, init="pissa"))
    variables = init(one, x, kernel=W)
    assert set(variables["frozen"]) == {"A0", "B0"} and set(variables["adapters"]) == {"A", "B", "router"}
    np.testing.assert_allclose(call(one, variables, x, kernel=W), x @ W, atol=1e-5)
    with pytest.raises(InputError, match=r"variables\['frozen'\]: A0: got nothing"):
        one.apply({"adapters": variables["adapters"]}, x, kernel=W)
    one = layer(adapter=mj.Mos(rank=4, budget=4, dropout=0.0))
    variables = init(one, x, kernel=W)
    assert set(variables["frozen"]) == {"I_A", "I_B"} and "shared" in variables["adapters"]
    loss = lambda a: one.apply(variables | {"adapters": a}, x, kernel=W).sum()  # noqa: E731
    jax.eval_shape(jax.grad(loss), variables["adapters"])  # tables of integers have no gradient


WRONG = {
    "k above E": (dict(experts=1), "router.k"),
    "no router for many experts": (dict(router=None), "experts"),
    "unknown adapter": (dict(adapter="lara"), "Did you mean 'lora'"),
    "unknown option": (dict(adapter=dict(name="lora", rnk=3)), "rank"),
    "range of an instance": (dict(adapter=mj.Lora(rank=0)), "adapter.rank"),
    "unknown start": (dict(adapter=mj.Lora(init="pisa")), "Did you mean 'pissa'"),
    "a member from outside that is not there": (dict(router="mypackage_that_is_not:Mine"), "no module named"),
    "a router that reads more than its layer": (dict(router=mj.XLora()), "hidden state"),
    "a router with a carry": (dict(router=mj.Recurrent()), "layer before"),
    "engine without a mesh": (dict(engine="gather"), "mesh"),
    "unknown engine": (dict(engine="gathr"), "Did you mean 'gather'"),
    "experts": (dict(experts=0), "experts"),
    "a number for a mesh": (dict(engine="gather", mesh=8), r"mesh: got 8 .a int.; expected a jax.*Mesh.*\(8,\)"),
    "sizes for a mesh": (dict(mesh={"expert": 8}), "mesh: got .*a .*ict.; expected a jax.sharding.Mesh"),
    "two meshes": (dict(engine=mj.Engine("gather", ONE), mesh=ONE), "with a mesh of its own; expected one of the two"),
    "the class of an adapter": (dict(adapter=mj.Lora), r"adapter: got the class Lora; .*Make one of it: Lora\(\)"),
    "a member of another axis": (dict(adapter=TOPK), "SoftmaxTopK is one of the routers"),
    "a class of another axis": (dict(router=mj.Lora), "got the class Lora; .*Lora is one of the adapters"),
    "a list in a dict": (dict(adapter=dict(name="lora", rank=[2])), "adapter.rank"),
    "a list for an engine": (dict(engine=["gather"]), "engine: got .*expected one of all_to_all"),
    "a list of experts": (dict(experts=[4]), "experts: got .*cannot be hashed"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_parts_are_refused_when_the_module_is_made(case):
    changes, words = WRONG[case]
    with pytest.raises(InputError, match=words):
        layer(**changes)


def test_a_wrong_number_is_refused_whatever_was_made_before():
    made = dict(adapter=mj.Lora(rank=4), router=TOPK)
    assert mj.RoutedLoRA(F, experts=4, **made).made().experts == 4
    with pytest.raises(InputError, match="experts: got 4.0"):
        mj.RoutedLoRA(F, experts=4.0, **made)
    with pytest.raises(InputError, match="adapter.rank: got 4.0"):
        mj.RoutedLoRA(F, experts=4, **made | dict(adapter=mj.Lora(rank=4.0)))


def test_wrong_shapes_and_missing_variables_are_named():
    x = normal(0, 2, 5, D)
    variables = init(layer(), x, kernel=W)
    with pytest.raises(InputError, match=r"kernel: got shape \(8, 8\); expected \(8, 12\)"):
        layer().apply(variables, x, kernel=np.eye(8))
    for bad, name in ((dict(x=[1.0] * D), "x"), (dict(kernel={"kernel": W}), "kernel"), (dict(bias=0.5), "bias")):
        with pytest.raises(InputError, match=f"RoutedLoRA, {name}: got a .*; expected an array. Pass the leaf"):
            layer().apply(variables, **{"x": x, "kernel": W, **bad})
    with pytest.raises(InputError, match="valid: got shape"):
        layer().apply(variables, x, kernel=W, valid=np.ones(2, bool))
    with pytest.raises(InputError, match="got nothing; expected a leaf of shape"):
        layer().apply({}, x, kernel=W)
    with pytest.raises(InputError, match=r"A: got shape \(4, 2, 8\); expected \(8, 2, 8\)"):
        layer(experts=8).apply(variables, x, kernel=W)


def test_members_may_be_names_dicts_or_instances():
    x = normal(0, 5, D)
    made = [layer(adapter=a, router=r) for a, r in (
        (mj.Lora(), TOPK), (dict(name="lora"), dict(name="softmax_topk", k=2)), ("lora", "softmax_topk"),
    )]  # fmt: skip
    trees = [jax.jit(one.init)(jax.random.key(0), x, kernel=W) for one in made]  # each by itself
    assert all(jax.tree.all(jax.tree.map(np.array_equal, trees[0], tree)) for tree in trees)


@dataclasses.dataclass(frozen=True)
class Broken(mj.Router):
    """A router from outside that breaks the contract in one way."""

    how: str = ""
    names: tuple = ()

    def k_max(self, experts):
        return 1

    def route(self, p, shared, x, ctx):
        z = routing_math.logits(p["W"], x)
        probs = routing_math.softmax(z)
        selected = routing_math.top_k(probs, 2 if self.how == "more" else 1)
        k = 2 if self.how == "k_max" else 1
        decision = routing_math.finish(jnp.where(selected, probs, 0.0), selected, z, probs, ctx, k_max=k)
        wide = decision.replace(gates=decision.gates[..., :1])
        found = {"one": decision, "three": (z, (), {}), "sums": (decision, (), None), "shape": (wide, (), {})}
        return found.get(self.how, (decision, ctx.carry, {}))


class Undecorated(mj.SoftmaxTopK):
    pass


def test_a_router_from_outside_is_held_to_the_contract():
    x = normal(0, 2, 5, D)
    make = lambda router: jax.eval_shape(  # noqa: E731
        lambda key: layer(router=router).init(key, x, kernel=W), jax.random.key(0)
    )
    assert make(Broken())["adapters"]["router"]["W"].shape == (E, D)
    for how, words in (
        ("more", "router: got Broken.route, which selects 2 experts of a token; expected at most k_max, which is 1"),
        ("k_max", "says k_max=2 where Broken.k_max.4. is 1"), ("one", "which gave Routing; expected .Routing, carry"),
        ("three", "which gave .*tuple, dict.; expected"), ("sums", "which gave .Routing, tuple, NoneType."),
        ("shape", r"whose gates have the shape .2, 5, 1.; expected \(2, 5, 4\)"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=words):
            make(Broken(how=how))
    with pytest.raises(InputError, match="router: got a Undecorated, which is no frozen dataclass"):
        layer(router=Undecorated(k=2))
    with pytest.raises(InputError, match="router: got Broken.*cannot be hashed.*Write tuples for lists"):
        layer(router=Broken(names=["a"]))


@dataclasses.dataclass(frozen=True)
class Wide(mj.ZLoss):
    """A loss from outside that gives two numbers."""

    def value(self, stats):
        return jnp.stack([super().value(stats)] * 2)


def test_what_is_no_collection_or_no_scalar_is_named():
    x = normal(0, 2, 5, D)
    variables = init(layer(), x, kernel=W)
    y, sown = call(layer(), variables, x, kernel=W, mutable=["routing"])
    for wrong, kind in ((y, r"a ArrayImpl of shape \(2, 5, 12\)"), ((y, sown), "a tuple"), (None, "a NoneType")):
        with pytest.raises(InputError, match=f"sown: got {kind}; .*second of what it returns"):
            mj.balance(wrong)
    with pytest.raises(InputError, match=r"loss: got Wide.value, which gave shape \(2,\); expected a scalar"):
        mj.routing_loss(sown, Wide())
    with pytest.raises(InputError, match="loss: got the class ZLoss; .*Make one of it"):
        mj.routing_loss(sown, mj.ZLoss)
    with pytest.raises(InputError, match=r"router_state: got collections .adapters, router_state"):
        mj.update_routers(variables | {"router_state": {}}, sown)


@pytest.mark.parametrize("lead", [(0,), (2, 0), (0, 5)], ids=str)
def test_no_token_gives_no_row(lead):
    x = jnp.zeros((*lead, D))
    kernels = dict(gate=W, up=W, down=normal(3, F, D))
    ffn = mj.RoutedFFN(experts=E, adapter=LORA, router=TOPK)
    mesh = Mesh(np.array(jax.devices()[:4]), ("expert",))
    routed = mj.attach(nn.Dense(F), [dict(sites="*", experts=E, adapter=LORA, router=TOPK)])
    for one, more, width in (
        (layer(), dict(kernel=W, bias=BIAS), F), (ffn, kernels, D), (routed, {}, F),
        (layer(engine="all_to_all", mesh=mesh), dict(kernel=W, valid=jnp.ones(lead, bool)), F),
    ):  # fmt: skip
        variables = init(one, x, **more)

        def run(v, one=one, more=more):
            y, sown = one.apply(v, x, **more, mutable=["routing"])
            return y.sum(), (y, mj.balance(sown))

        (_, (y, balance)), grads = jax.jit(jax.value_and_grad(run, has_aux=True))(variables)
        assert y.shape == (*lead, width) and np.isfinite(balance), type(one).__name__
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(grads["adapters"]))


def test_the_ffn_says_how_row_factors_are_served():
    with pytest.raises(InputError, match='RoutedFFN.down: got .once.*write down="per_expert"'):
        mj.RoutedFFN(experts=E, adapter=mj.Dora(rank=R), router=TOPK)
    with pytest.raises(InputError, match="RoutedFFN.down: got 'twice'.*among 'once', 'per_expert'"):
        mj.RoutedFFN(experts=E, adapter=LORA, router=TOPK, down="twice")


def test_an_adapter_that_no_config_could_name_is_checked_as_ours():
    @dataclasses.dataclass(frozen=True)
    class Forgetful(mj.Lora):
        def factors(self, p, shared, ctx):
            return super().factors({"A": p["A"], "B": p["B"]}, shared, ctx)

    for options, words in ((dict(init="pissa"), "adapter.init: got 'pissa'.*Forgetful.factors does not say"),
                           (dict(rank=0), "adapter.rank: got 0; expected an integer >= 1")):  # fmt: skip
        with pytest.raises(InputError, match=words):
            layer(adapter=Forgetful(**options))
    assert layer(adapter=Forgetful(rank=R)).made().adapter.rank == R


@dataclasses.dataclass(frozen=True)
class Mine(mj.SoftmaxTopK):
    """A router from outside."""


def test_a_member_from_outside_is_an_instance_or_a_path():
    x = normal(0, 5, D)
    path = f"{Mine.__module__}:Mine"
    trees = [jax.jit(layer(router=r).init)(jax.random.key(0), x, kernel=W) for r in (TOPK, Mine(k=K), path)]
    assert all(jax.tree.all(jax.tree.map(np.array_equal, trees[0], tree)) for tree in trees)
    with pytest.raises(InputError, match="router.k"):
        layer(router=Mine(k=9))
    with pytest.raises(InputError, match="router.jitter"):
        layer(router=dict(name=path, jitter=-1.0))


def test_losses_that_tell_tasks_apart_take_their_ids():
    x = normal(0, 2, 5, D)
    variables = variables_of(layer(router=mj.SoftmaxTopK(k=0)), x, kernel=W)
    _, sown = call(layer(router=mj.SoftmaxTopK(k=0)), variables, x, kernel=W, mutable=["routing"])
    Q = np.asarray(sown["routing"]["experts"][0].decision.gates, np.float64).sum(1)
    Z = Q * np.where([[1, 1, 0, 0], [0, 0, 1, 1]], 1.5, 0.5)  # the first row is of the task "facts"
    loss = mj.LocalizedBalance(delta=0.5, world="facts")
    ids = jnp.array([[1] * 5, [0] * 5])
    got = jax.jit(lambda ids: mj.routing_loss(sown, loss, task_ids=ids, tasks=("other", "facts")))(ids)
    np.testing.assert_allclose(got, Z.var(ddof=1) / Z.mean() ** 2, rtol=1e-5)
    with pytest.raises(InputError, match="task_ids: got shape"):
        mj.routing_loss(sown, loss, task_ids=ids[0], tasks=("other", "facts"))


def test_integers_are_numbers_of_the_kernels_type():
    layer, W = mj.RoutedLoRA(3, experts=2, adapter=mj.Lora(rank=2), router=mj.SoftmaxTopK(k=1)), jnp.full((4, 3), 0.5)
    x = jnp.arange(8).reshape(2, 4)
    variables = init(layer, x, kernel=W)
    np.testing.assert_array_equal(call(layer, variables, x, kernel=W), np.asarray(x) @ np.asarray(W))


def test_padding_may_hold_nan():
    layer, W = mj.RoutedLoRA(3, experts=2, adapter=mj.Lora(rank=2), router=mj.SoftmaxTopK(k=1)), jnp.ones((4, 3))
    valid = jnp.array([[True, True, False]])
    x = jnp.ones((1, 3, 4))
    variables = init(layer, x, kernel=W)
    broken = jnp.where(valid[..., None], x, jnp.nan)

    def loss(adapters, x):
        y = layer.apply(variables | {"adapters": adapters}, x, kernel=W, valid=valid)
        return jnp.sum(jnp.where(valid[..., None], y, 0.0) ** 2)

    gradient = jax.jit(jax.grad(loss))
    wanted, got = (gradient(variables["adapters"], x) for x in (x, broken))
    jax.tree.map(np.testing.assert_array_equal, got, wanted)
