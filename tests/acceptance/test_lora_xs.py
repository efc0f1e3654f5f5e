"""LoRA-XS (2405.17604): what it promises, and what every start with a core is asked for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import molora_jax as mj
from configs import common
from launch import flags
from molora_jax import config as schema
from molora_jax.adapters import ADAPTERS
from molora_jax.core.types import Site
from molora_jax.errors import InputError
from molora_jax.inits._singular import singular
from molora_jax.runs.products import products
from tests.acceptance import small
from tests.acceptance.blocks import model, noisy, output
from tests.battery.cases import SMALL, Case, method

SITE = Site("up", 12, 10, (0,), 3, (3,))
W = np.random.default_rng(0).standard_normal((12, 10)).astype(np.float32)


def leaves(init, rank=4, alpha=8.0, **given):
    return ADAPTERS["lora_xs"](rank=rank, alpha=alpha, dropout=0.0, init=init).init_leaves(
        jax.random.key(0), SITE, 0, base=jnp.asarray(W), **given
    )


def test_outer_factors_are_the_kernels_singular_vectors_and_the_core_is_small():
    """float64 numpy: B A is the rank-R truncation of W, B has orthonormal columns; each expert has its own core."""
    made = jax.device_get(leaves(dict(name="lora_xs", deviation=1e-3)))
    assert {name: x.shape for name, x in made.items()} == {"A": (1, 4, 12), "B": (1, 4, 10), "core": (3, 4, 4)}
    u, s, vt = np.linalg.svd(W.T.astype(np.float64))
    np.testing.assert_allclose(made["B"][0].T @ made["A"][0], (u[:, :4] * s[:4]) @ vt[:4], atol=1e-5)
    np.testing.assert_allclose(made["B"][0] @ made["B"][0].T, np.eye(4), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(made["A"][0], axis=1), s[:4], rtol=1e-5)
    assert 0.7e-3 < made["core"].std() < 1.4e-3 and len(np.unique(made["core"])) == 48
    assert leaves("lora_xs")["core"].std() < 2e-5, "the paper's deviation"


def test_the_cores_alone_train_and_outer_factors_have_no_state():
    case = Case(method("lora_xs"))
    before = case.start()
    after, _, gradients = case.run(before)
    assert {path.rpartition("/")[2] for path in gradients} == {"core"}
    old, new = (flatten_dict(jax.device_get(s.adapters), sep="/") for s in (before, after))
    for path in old:
        assert np.array_equal(old[path], new[path]) == (not path.endswith("core")), path
    state = jax.tree.leaves(jax.eval_shape(lambda: before.opt))
    assert {x.shape[-2:] for x in state if x.ndim} == {(16, 16)}
    assert sum(np.prod(x.shape) for x in gradients.values()) == 7 * SMALL.layers * 16**2


@pytest.mark.parametrize("sites", [("q", "down"), ("ffn",)])
def test_routed_experts_share_the_outer_factors(sites):
    """An expert's change is that of a plain LoRA with the pair (core A, B): both placements."""
    router = ("softmax_topk", dict(k=2))
    made, plain = (model(sites, 4, router, adapter=name, **more) for name, more in (
        ("lora_xs", dict(init="orthonormal")), ("lora", {})))  # fmt: skip
    adapters = noisy(made)
    spelt = jax.tree.map(np.asarray, adapters)
    for site, own in spelt["mix"]["000-000"].items():
        if site != "router":
            A = np.einsum("leqr,lrd->leqd", own.pop("core"), own["A"][:, 0])
            own.update(A=A, B=np.broadcast_to(own["B"], (*A.shape[:3], own["B"].shape[-1])))
    np.testing.assert_allclose(output(made, adapters), output(plain, spelt), rtol=1e-5, atol=1e-5)


def test_a_start_with_a_core_and_an_adapter_that_has_one_belong_together():
    config = small.config("lora_xs")
    adapter = config.method.rules.all.adapter
    for name, init, told in (
        ("lora_xs", "kaiming", "a start with a core for lora_xs: lora_"), ("lora", "lora_xs", "a start without a core"),
    ):  # fmt: skip
        with config.unlocked():
            adapter.update(name=name)
            adapter.init = dict(name=init)
        with pytest.raises(InputError, match=told):
            schema.validate(config)
        with pytest.raises(InputError, match="a core"):
            mj.RoutedLoRA(8, experts=1, adapter=dict(name=name, init=init)).init(jax.random.key(0), jnp.ones((1, 2, 8)))
    with pytest.raises(InputError, match="a start that reads no gradient of the base.*by a run of this library"):
        layer = mj.RoutedLoRA(10, experts=1, adapter=dict(name="lora", init="lora_ga"))
        layer.init(jax.random.key(0), jnp.ones((1, 2, 12)), kernel=jnp.asarray(W))


def test_options_of_a_start_are_checked_like_those_of_any_member():
    rule = lambda init: common.rule("q", adapter=common.adapter("lora_xs", init=init))  # noqa: E731
    for init, told in (
        (dict(name="lora_xs", deviation=-1.0), "adapter.init.deviation: got -1.0"),
        (dict(name="lora_xs", devation=1.0), "adapter.init.devation: got an unknown field"),
        (dict(name="lora_xs", svd="lanczos"), "adapter.init.svd"),
        (dict(deviation=1.0), "adapter.init.name: got nothing"),
    ):
        config = common.get_config()
        config.method.rules = dict(all=rule(init))
        with pytest.raises(InputError, match=told):
            schema.validate(config)
    assert hash(ADAPTERS["lora_xs"](init=dict(name="lora_xs", deviation=0.5))) != hash(ADAPTERS["lora_xs"]())


def test_a_start_with_options_may_come_from_outside():
    path = "tests.outside.mypackage.more:Narrow"
    made = [
        ADAPTERS["lora"](rank=2, init=dict(name=path, by=by)).init_leaves(jax.random.key(0), SITE, 0)["A"]
        for by in (0.1, 0.2)
    ]
    np.testing.assert_allclose(made[1], 2 * made[0], rtol=1e-6)
    start = "--config.method.rules.all.adapter.init"
    parsed = lambda by: flags.parse("", [], ["--config=lora", f"{start}={path}", f"{start}.by={by}"])[0]  # noqa: E731
    assert parsed(0.3).method.rules.all.adapter.init.to_dict() == dict(name=path, by=0.3)
    with pytest.raises(InputError, match="init.by: got 2.0"):
        parsed(2.0)


def test_the_largest_rank_is_the_smaller_width():
    config = small.config("lora_xs", method__rules__all__adapter__rank=17)
    with pytest.raises(InputError, match="<= 16, the smaller width of k"):
        schema.check_model(config, SMALL.layers, SMALL.dims, SMALL.ABSENT)


def test_randomised_singular_vectors_span_those_of_the_exact_ones():
    """A spectrum that decays: the largest angle between the two subspaces is below 1e-3 (numpy, float64)."""
    rng = np.random.default_rng(1)
    u, v = (np.linalg.qr(rng.standard_normal((n, 24)))[0] for n in (40, 24))
    made = (u * 0.7 ** np.arange(24)) @ v.T
    near = [np.asarray(x, np.float64) for x in singular(jnp.asarray(made), 4, "randomised", jax.random.key(2))]
    for own, exact in ((near[0], u[:, :4]), (near[2].T, v[:, :4])):
        cosines = np.linalg.svd(np.linalg.qr(own)[0].T @ exact)[1]
        assert np.sqrt(1 - min(1.0, cosines.min()) ** 2) < 1e-3
    np.testing.assert_allclose(near[1], 0.7 ** np.arange(4), rtol=1e-4)


def test_a_run_of_it_is_a_product_for_merges():
    """`runs/products.py`: B core A as `A [R, D_in]`, `s B [R, D_out]`, the core folded into A."""
    made = model(("q",), 1, None, adapter="lora_xs", init="orthonormal")
    adapters = jax.device_get(noisy(made))
    refuse = lambda got, expected: InputError("run", got=got, expected=expected)  # noqa: E731
    A, B = products(made, adapters, refuse=refuse)["mix", 0, "q"]
    own = {name: x[0, 0].astype(np.float64) for name, x in adapters["mix"]["000-000"]["q"].items()}
    np.testing.assert_allclose(B.T @ A, 2.0 * own["B"].T @ own["core"] @ own["A"], atol=1e-5)


def test_a_layer_of_ones_own_takes_it():
    """`RoutedLoRA` beside a kernel of the caller's, options of the start in a dict; the outer factors do not train."""
    layer = mj.RoutedLoRA(
        10, experts=2, adapter=dict(name="lora_xs", rank=2, dropout=0.0, init=dict(name="lora_xs", deviation=0.1)),
        router=dict(name="softmax_topk", k=1),
    )  # fmt: skip
    variables = layer.init(jax.random.key(0), jnp.ones((1, 3, 12)), kernel=jnp.asarray(W))
    shapes = {path[-1]: (path[0], x.shape) for path, x in flatten_dict(variables).items()}
    assert shapes["core"] == ("adapters", (2, 2, 2))
    assert shapes["A"][1] == (1, 2, 12) and shapes["A"][0] != "adapters" != shapes["B"][0]
