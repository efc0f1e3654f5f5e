"""attach: equal to the model with its weights changed, whatever lifted transform it is in; what is refused."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

import molora_jax as mj
from molora_jax.core.types import Factors
from molora_jax.errors import InputError
from tests.modules.foreign import AXES, Jitted, Masked, Odd, Own, Stacked
from tests.modules.oracle import SCALE, D, E, K, R, call, init, mixture64, normal, random_leaves
from tests.modules.test_engines import mesh as mesh_of

LORA = mj.Lora(rank=R, alpha=8.0, dropout=0.0)
PLAIN = [dict(sites="*", adapter=LORA)]
ROUTED = dict(experts=E, adapter=LORA, router=mj.SoftmaxTopK(k=K))
X = normal(0, 2, 5, D)


def shapes(module, *args):
    """Of `init`: for what is refused before anything is computed."""
    return jax.eval_shape(module.init, jax.random.key(0), *args)


def merged(variables, rule="rule0"):
    """`params` with W + s B A at every Dense layer that has a plain LoRA, whatever axes its kernel has."""
    flat = flatten_dict(variables["params"])
    for path, A in flatten_dict(variables["adapters"]).items():
        if path[-1] == "A":
            B, at = flatten_dict(variables["adapters"])[*path[:-1], "B"], (*path[:-2], "kernel")
            change = SCALE * np.einsum("...erd,...ero->...do", np.float64(A), np.float64(B))
            flat[at] = (flat[at] + change.reshape(flat[at].shape)).astype(np.float32)
    return unflatten_dict(flat)


@pytest.mark.parametrize("options", [dict(layers=1), dict(layers=1, remat=True), dict(axes=AXES, remat=True)], ids=str)
def test_plain_lora_equals_the_model_with_merged_kernels(options):
    """nn.Dense, nn.DenseGeneral of one and of two axes, alone, in nn.remat, in nn.scan, in both; value and gradient."""
    model = Stacked(**options)
    routed = mj.attach(model, PLAIN)
    fresh, own = init(routed, X), init(model, X)
    assert jax.tree.all(jax.tree.map(np.array_equal, fresh["params"], own["params"]))
    call = jax.jit(routed.apply)
    assert np.array_equal(call(fresh, X), jax.jit(model.apply)(own, X)), "B = 0: the base exactly"
    variables = {"params": own["params"], "adapters": random_leaves(fresh["adapters"], size=0.1)}
    np.testing.assert_allclose(call(variables, X), jax.jit(model.apply)({"params": merged(variables)}, X), atol=2e-4)
    slope = lambda f: jax.jit(jax.grad(lambda x, v: jnp.sum(f(v, x) ** 2)))  # noqa: E731
    expected = slope(model.apply)(X, {"params": merged(variables)})
    np.testing.assert_allclose(slope(routed.apply)(X, variables), expected, atol=2e-3, rtol=2e-3)
    grads = jax.jit(jax.grad(lambda a: jnp.sum(routed.apply(variables | {"adapters": a}, X) ** 2)))(
        variables["adapters"]
    )
    assert all(float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(grads))


@dataclasses.dataclass(frozen=True)
class ScaledInput(mj.Ia3):
    """(IA)3 before the kernel at every site: W ((1 + sum_e g_e (l_e - 1)) x)."""

    def init_leaves(self, key, site, layer, *, base=None, base_grad=None):
        return {"l": jax.random.uniform(key, (site.experts, site.d_in))}

    def factors(self, p, shared, ctx):
        empty = Factors(*(jnp.zeros((len(p["l"]), 0, d)) for d in (ctx.site.d_in, ctx.site.d_out)))
        return empty.replace(inp=p["l"])


@pytest.mark.parametrize("mesh", [None, dict(data=2, tensor=2)], ids=str)
def test_experts_that_scale_the_input_reach_the_callers_product(mesh):
    model, x = nn.Dense(6), normal(3, 4, 5, D)
    rule = dict(sites="*", experts=E, adapter=ScaledInput(), router=mj.SoftmaxTopK(k=E))
    routed = mj.attach(model, [rule], **({} if mesh is None else dict(engine="gather", mesh=mesh_of(**mesh))))
    variables = init(routed, x)
    y, sown = jax.jit(lambda v: routed.apply(v, x, mutable=["routing"]))(variables)
    gates = sown["routing"]["rule0"]["experts"][0].decision.gates
    l = variables["adapters"]["rule0"]["l"]  # noqa: E741
    scaled = x * (1 + jnp.einsum("bse,ed->bsd", gates, l - 1))
    np.testing.assert_allclose(y, model.apply({"params": variables["params"]}, scaled), atol=1e-5)


def test_a_scanned_stack_is_its_layers_one_by_one():
    rules = [dict(sites="*up,*/out", **ROUTED), dict(sites="*up", adapter=LORA)]
    scanned, looped = mj.attach(Stacked(axes=AXES), rules), mj.attach(Stacked(), rules)
    variables = init(scanned, X)
    variables["adapters"] = random_leaves(variables["adapters"])
    assert set(variables) == {"params", "adapters"}
    y, sown = jax.jit(lambda v: scanned.apply(v, X, mutable=["routing"]))(variables)
    cut = {name: {f"layers_{i}": jax.tree.map(lambda a, i=i: a[i], tree["layers"]) for i in range(2)}
           for name, tree in variables.items()}  # fmt: skip
    cut["params"]["head"] = variables["params"]["head"]
    z, each = jax.jit(lambda v: looped.apply(v, X, mutable=["routing"]))(cut)
    np.testing.assert_allclose(y, z, atol=1e-4)
    np.testing.assert_allclose(mj.balance(sown), mj.balance(each), rtol=1e-5)
    metrics = mj.routing_metrics(sown)
    assert metrics["layers/up/rule0"]["entropy"].shape == (2,) and len(metrics) == 2
    assert len(mj.routing_metrics(each)) == 4


@pytest.mark.parametrize("missing", ["adapters", "routing", "router_state"])
def test_a_missing_entry_of_a_scan_is_named(missing):
    rules = [dict(sites="*/up", experts=E, adapter=LORA, router=mj.SigmoidTopK(k=K))]
    axes = {name: 0 for name in AXES if name != missing}
    with pytest.raises(InputError, match=f"variable_axes.*layers/up/rule0: got no entry '{missing}'"):
        shapes(mj.attach(Stacked(axes=axes), rules), X)
    variables = shapes(mj.attach(Stacked(axes=AXES), rules), X)
    short = mj.attach(Stacked(axes=axes), rules)
    with pytest.raises(InputError, match=missing):
        jax.eval_shape(lambda v: short.apply(v, X, mutable=["routing"]), variables)
    if missing == "routing":
        jax.eval_shape(lambda v: short.apply(v, X), variables)  # nothing is lost


def test_a_scan_over_time_is_told_of_broadcast():
    """nn.RNN: one cell for all steps, so one set of adapters; the first call, which makes them, already says where."""
    cell = nn.GRUCell(D)
    routed = lambda **entries: mj.attach(nn.RNN(cell, **entries), [dict(sites="*/h*", **ROUTED)])  # noqa: E731
    with pytest.raises(InputError, match="'adapters'.*variable_broadcast .nn.RNN does., all but routing go there"):
        jax.eval_shape(routed().init, jax.random.key(0), X)
    given = dict(variable_axes=dict(routing=0), variable_broadcast=("params", "adapters"))
    shapes = jax.eval_shape(routed(**given).init, jax.random.key(0), X)
    assert flatten_dict(shapes["adapters"], sep="/")["cell/hr/rule0/A"].shape == (E, R, D)
    sown = jax.eval_shape(lambda v: routed(**given).apply(v, X, mutable=["routing"])[1], shapes)
    assert all(m["entropy"].shape == (5,) for m in jax.eval_shape(mj.routing_metrics, sown).values())


def test_a_layer_in_a_scan_of_ones_own_names_what_is_missing_too():
    scanned = lambda *axes: Own(axes=("params", *axes))  # noqa: E731
    make = lambda module: jax.eval_shape(module.init, jax.random.key(0), X)  # noqa: E731
    assert make(scanned("adapters", "routing"))["adapters"]["layers"]["RoutedLoRA_0"]["A"].shape == (2, E, R, D)
    for axes, missing in ((("routing",), "adapters"), (("adapters",), "routing")):
        with pytest.raises(InputError, match=f"around layers/RoutedLoRA_0: got no entry '{missing}'"):
            make(scanned(*axes))


def test_dropout_in_a_scan_needs_its_keys():
    routed = mj.attach(Stacked(axes=AXES, split=("params",)), [dict(sites="*/up", adapter=mj.Lora(dropout=0.5))])
    variables = shapes(routed, X)
    with pytest.raises(InputError, match='"dropout": True to split_rngs'):
        jax.eval_shape(lambda v: routed.apply(v, X, rngs={"dropout": jax.random.key(0)}), variables)


def test_router_state_of_a_scan_is_updated_by_layer():
    rules = [dict(sites="*/up", experts=E, adapter=LORA, router=mj.SigmoidTopK(k=K, bias_rate=0.5))]
    routed = mj.attach(Stacked(axes=AXES), rules)
    variables = init(routed, X)
    _, sown = jax.jit(lambda v: routed.apply(v, X, mutable=["routing"]))(variables)
    selected = sown["routing"]["layers"]["up"]["rule0"]["experts"][0].decision.selected
    count = np.asarray(selected).sum((1, 2))
    state = mj.update_routers(variables["router_state"], sown)
    expected = 0.5 * np.sign(count.mean(-1, keepdims=True) - count)
    np.testing.assert_array_equal(state["layers"]["up"]["rule0"]["b"], expected)


def test_odd_models_are_covered_or_named():
    model, rules = Odd(), [dict(sites="twice,lifted", adapter=LORA)]
    found = mj.sites(model, X)
    assert found.covered == {"twice": (8, 8), "lifted": (8, 8)}
    assert found.not_covered == {"mixed/kernel": "Einsum", "raw": "Odd"}
    routed = mj.attach(model, rules)
    variables = random_leaves(init(routed, X))
    np.testing.assert_allclose(
        call(routed, variables, X), call(model, {"params": merged(variables)}, X), atol=2e-4
    )  # a layer that is called twice has its experts twice, one in a transform of its own has them once
    np.testing.assert_allclose(
        call(routed, variables, X, method="encode"), call(model, {"params": merged(variables)}, X, method="encode"),
        atol=2e-4,
    )  # fmt: skip
    with pytest.raises(InputError, match="'mixed', which matches no Dense layer, but mixed/kernel .of Einsum"):
        shapes(mj.attach(model, [dict(sites="mixed", adapter=LORA)]), X)
    with pytest.raises(InputError, match="'twise'.*Nearest: twice"):
        shapes(mj.attach(model, [dict(sites="twise", adapter=LORA)]), X)
    with pytest.raises(InputError, match="up, inside nn.jit"):
        shapes(mj.attach(Jitted(), PLAIN), X)
    with pytest.warns(UserWarning, match="does not cover mixed/kernel .of Einsum., raw .of Odd."):
        shapes(mj.attach(model, PLAIN), X)


def test_padding_is_neither_routed_nor_counted():
    mask = np.arange(5) < np.array([[3], [5]])
    routed = mj.attach(Masked(), [dict(sites="up", **ROUTED)], valid=lambda x, mask, **_: mask)
    variables = random_leaves(init(routed, X, mask))
    y, sown = call(routed, variables, X, mask, mutable=["routing"])
    p = variables["params"]["up"]
    expected = mixture64(X, p["kernel"], p["bias"], variables["adapters"]["up"]["rule0"])
    np.testing.assert_allclose(y, np.where(mask[..., None], expected, 0), atol=2e-5)
    gates = sown["routing"]["up"]["rule0"]["experts"][0].decision.gates
    np.testing.assert_allclose(gates.sum(-1), mask, atol=1e-6)
    wrong = mj.attach(Masked(), [dict(sites="up", **ROUTED)], valid=lambda x, mask, **_: mask[0])
    with pytest.raises(InputError, match="up/rule0, valid: got shape"):
        wrong.apply(variables, X, mask)


def test_dropout_follows_the_switch_of_the_model():
    routed = mj.attach(Masked(), [dict(sites="up", adapter=mj.Lora(rank=R, dropout=0.5))])
    mask = np.ones((2, 5), bool)
    variables = random_leaves(init(routed, X, mask))

    def drops(*args):
        run = jax.jit(lambda key: routed.apply(
            variables, X, mask, *args, rngs={"dropout": key}, capture_intermediates=True
        )[1]["intermediates"]["up"]["__call__"][0])  # fmt: skip
        return not np.array_equal(run(jax.random.key(0)), run(jax.random.key(1)))

    assert not drops(), "deterministic by its default"
    assert drops(False)


def test_a_start_that_reads_the_base_reads_the_checkpoint():
    model = Stacked(axes=AXES)
    params = init(model, X)["params"]
    routed = mj.attach(model, [dict(sites="*/up", adapter=mj.Lora(rank=R, alpha=8.0, dropout=0.0, init="pissa"))])
    variables = mj.init_adapters(routed, jax.random.key(1), params, X)
    own = variables["adapters"]["layers"]["up"]["rule0"]
    U, s, V = np.linalg.svd(np.float64(params["layers"]["up"]["kernel"]))
    best = np.einsum("ldr,lr,lro->ldo", U[:, :, :R], s[:, :R], V[:, :R])
    np.testing.assert_allclose(SCALE * np.einsum("lerd,lero->ldo", own["A"], own["B"]), best, atol=1e-5)
    np.testing.assert_allclose(call(routed, variables, X), call(model, {"params": params}, X), atol=1e-4)
    assert variables["params"] is params


WRONG = {
    "no rules": ([], "no rule"),
    "unknown field": ([dict(sites="*", adapter=LORA, routr=None)], "routr.*Did you mean 'router'"),
    "layers by number": (dict(a=dict(sites="*", adapter=LORA, layers="0-1")), "rules.a.layers"),
    "no adapter": ([dict(sites="*")], "rules.rule0.adapter: got nothing"),
    "name": (dict(kernel=dict(sites="*", adapter=LORA)), "rules.kernel"),
    "shared leaves": ([dict(sites="*", adapter=mj.Mos())], "leaves the layers share"),
    "scope": ([dict(sites="*", experts=4, adapter=LORA, router=mj.SoftmaxTopK(share="ffn"))], "router.share"),
    "option": ([dict(sites="*", adapter=dict(name="lora", rank=0))], "rules.rule0.adapter.rank"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_rules_are_refused_at_once(case):
    rules, words = WRONG[case]
    with pytest.raises(InputError, match=words):
        mj.attach(Masked(), rules)


def test_an_attach_inside_another_needs_names_of_its_own():
    model, rules = nn.Sequential([nn.Dense(3)]), lambda name: {name: dict(sites="*", adapter=LORA)}
    inner = mj.attach(model, rules("inner"))
    both = mj.attach(nn.Sequential([inner]), rules("outer"))
    own = init(both, X)["adapters"]
    assert {path[-2] for path in flatten_dict(own)} == {"inner", "outer"}
    with pytest.raises(InputError, match="rules.inner: got a name that .* has already, of an attach inside"):
        init(mj.attach(nn.Sequential([inner]), rules("inner")), X)


def test_rules_of_a_config():
    from configs import common

    rules = dict(mlp=common.rule("up", adapter=common.adapter(rank=2), experts="4",
                                 router=dict(name="softmax_topk", k=2)))  # fmt: skip
    routed = mj.attach(Masked(), rules)
    assert set(init(routed, X, np.ones((2, 5), bool))["adapters"]["up"]["mlp"]) == {"A", "B", "router"}


def test_what_belongs_to_the_call_is_no_argument_of_attach():
    mask, rules = np.ones((2, 5), bool), [dict(sites="up", **ROUTED)]
    for more, words in (
        (dict(valid=mask), "valid: got a ndarray; expected a function.*valid=lambda x, mask: mask"),
        (dict(train=True), "train: got a bool; expected a function.*train=lambda x, train: train"),
        (dict(mesh=8, engine="gather"), "mesh: got 8"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=words):
            mj.attach(Masked(), rules, **more)
    with pytest.raises(InputError, match=r"module: got the class Masked; .*Make one of it: Masked\(...\)"):
        mj.attach(Masked, rules)
    for name in ("valid", "train"):
        short = mj.attach(Masked(), rules, **{name: lambda x: x})
        with pytest.raises(InputError, match=f"{name}: got a function that does not take them .too many"):
            short.init(jax.random.key(0), X, mask)


class Flagged(nn.Module):
    """Its switch is an argument of some name, or a field."""

    deterministic: bool | None = None

    @nn.compact
    def __call__(self, x, is_training=None, inference=None):
        return nn.Dense(8, name="up")(x)


def test_dropout_follows_a_switch_of_any_usual_name():
    rules = [dict(sites="up", adapter=mj.Lora(rank=R, dropout=0.5))]
    variables = random_leaves(init(mj.attach(Flagged(), rules), X))

    def drops(module, **more):
        run = lambda seed: mj.attach(module, rules).apply(  # noqa: E731
            variables, X, rngs={"dropout": jax.random.key(seed)}, **more
        )
        return not np.array_equal(run(0), run(1))

    assert drops(Flagged()) and drops(Flagged(), is_training=True) and drops(Flagged(), inference=False)
    assert not drops(Flagged(), is_training=False) and not drops(Flagged(), inference=np.bool_(True))
    assert not drops(Flagged(deterministic=True)) and drops(Flagged(deterministic=True), is_training=True)
    with pytest.raises(InputError, match="is_training: got a value that jit traces; .*for adapter.dropout"):
        jax.jit(lambda on: mj.attach(Flagged(), rules).apply(variables, X, is_training=on))(True)
    plain = mj.attach(Flagged(), [dict(sites="up", adapter=LORA)])
    jax.jit(lambda on: plain.apply(variables, X, is_training=on))(True)  # nothing is random


def test_params_alone_are_told_what_makes_the_others():
    for axes in (None, AXES):
        routed = mj.attach(Stacked(axes=axes), [dict(sites="*/up", adapter=LORA)])
        params = shapes(routed, X)["params"]
        with pytest.raises(InputError, match="got nothing; .*mj.init_adapters for params that are there") as caught:
            jax.eval_shape(lambda params, routed=routed: routed.apply({"params": params}, X), params)
        assert "variable_axes" not in str(caught.value)
