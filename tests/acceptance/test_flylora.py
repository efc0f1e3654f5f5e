"""FlyLoRA: the acceptance list of its specification, item by item (the numbers are the list's)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from molora_jax.adapters import ADAPTERS
from molora_jax.core import sparse_projection
from molora_jax.core.types import Site
from molora_jax.errors import InputError
from molora_jax.modules import RoutedLoRA
from molora_jax.routers import ROUTERS
from molora_jax.training.step import update_routers
from tests.acceptance import small
from tests.battery.cases import Case, method

ROUTER = ROUTERS["sparse_projection"]
T, D, OUT, r, k = 9, 64, 24, 32, 8
SITE = Site("q", D, OUT, (0,), r)
FEW = dict(method__rules__all__sites="q,down")


def adapter(**options):
    return ADAPTERS["lora_sparse_a"](rank=1, alpha=2.0, dropout=0.0, **options)  # 64 over the total rank 32


def normal(*shape, seed=0):
    return jax.device_put(np.float32(np.random.default_rng(seed).standard_normal(shape)))


A = sparse_projection.rows(0, SITE, 0, r, k / r)
X, B, PROBE = normal(T, D), normal(r, 1, OUT, seed=1), normal(T, OUT, seed=2)


def decide(router, x=X, d=None, W=A, **changes):
    state = {"d": jnp.zeros(r) if d is None else jnp.asarray(d, jnp.float32)}
    decision, _, sums = small.routed(router, {"W": W}, {}, x[None], small.context(1, len(x), state=state, **changes))
    return decision, sums


@functools.partial(jax.jit, static_argnums=(0, 1))
def fly(router, made, B, x, d):
    return small.change(made, {"A": A[:, None], "B": B}, decide(router, x, d)[0].gates[0], x)


@functools.partial(jax.jit, static_argnums=(0, 1))
def gradients(router, made, B, x, d):
    return jax.grad(lambda B, x: jnp.sum(PROBE * fly(router, made, B, x, d)), argnums=(0, 1))(B, x)


def by_hand(x, d, select, s=2.0):
    """`(y, mask, h)` in float64, masked densely."""
    h = np.asarray(x, np.float64) @ np.asarray(A, np.float64).T
    score = np.abs(h + d) if select == "abs" else h + d
    mask = np.argsort(np.argsort(-score, axis=-1), axis=-1) < k
    return s * (mask * h) @ np.asarray(B[:, 0], np.float64), mask, h


def test_acceptance_1_rows_of_A_are_sparse_with_entries_of_one_over_r():
    wide = np.asarray(sparse_projection.rows(3, Site("up", 512, 8, (0,), r), 1, r, k / r))
    assert ((wide != 0).sum(1) == 512 * k // r).all()
    np.testing.assert_allclose(wide[wide != 0].std() * r, 1, atol=0.04)  # 4096 entries
    odd = sparse_projection.rows(0, SITE, 0, r, 12 / 32)  # not r // k, which would be one half
    assert ((np.asarray(odd) != 0).sum(1) == round(D * 12 / 32)).all()
    for other in (sparse_projection.rows(1, SITE, 0, r, 0.25), sparse_projection.rows(0, SITE, 1, r, 0.25)):
        assert not np.array_equal(A, other), "of its own seed, site and layer"


def test_acceptance_1_router_and_adapter_have_one_A_which_training_leaves_as_it_is():
    """A step of the config moves B and nothing else; d is state and has no optimizer."""
    case = Case(method("flylora", **{"method.rules.all.sites": "q,down"}))
    state = case.start()
    before = flatten_dict(jax.device_get(state.adapters), sep="/")
    for site in ("q", "down"):
        own, router = before[f"all/000-001/{site}/A"], before[f"all/000-001/router/{site}/W"]
        np.testing.assert_array_equal(own[:, :, 0], router)
        assert not np.array_equal(own[0], own[1]), "layers differ"
    after, _, moved = case.run(state)
    after = flatten_dict(jax.device_get(after.adapters), sep="/")
    assert {path.rpartition("/")[2] for path in moved} == {"B"}
    for path, leaf in after.items():
        assert np.array_equal(leaf, before[path]) != path.endswith("/B"), path


def test_acceptance_2_with_all_ranks_active_it_is_lora_with_that_A():
    for d in (np.zeros(r), np.linspace(-3, 3, r)):
        for select in ("abs", "signed"):
            y = fly(ROUTER(k=r, select=select), adapter(), B, X, d)
            np.testing.assert_allclose(y, 2.0 * (X @ A.T) @ B[:, 0], rtol=1e-4, atol=1e-4)
    rule = small.config("flylora").method.rules["all"]
    assert (rule.experts, rule.adapter.rank, rule.router.k, rule.adapter.alpha) == ("32", 1, 8, 64 / 32)
    assert (rule.adapter.seed, rule.adapter.density) == (rule.router.seed, rule.router.density)


@pytest.mark.parametrize("select", ["abs", "signed"])
def test_acceptance_3_k_ranks_a_token_and_the_dense_masked_form(select):
    d = np.linspace(-0.2, 0.2, r)
    want, mask, _ = by_hand(X, d, select)
    decision, _ = decide(ROUTER(select=select), d=d)
    np.testing.assert_array_equal(decision.selected[0], mask)
    assert (decision.selected.sum(-1) == k).all()
    np.testing.assert_array_equal(decision.gates, decision.selected)  # no weight beside the projection itself
    np.testing.assert_allclose(fly(ROUTER(select=select), adapter(), B, X, d), want, rtol=1e-4, atol=1e-4)


def test_acceptance_4_d_is_for_the_choice_alone():
    chosen = np.arange(r) < k
    few, many = (np.where(chosen, push, 0.0) for push in (50.0, 90.0))
    one, other = (fly(ROUTER(select="signed"), adapter(), B, X, d) for d in (few, many))
    assert np.asarray(decide(ROUTER(select="signed"), d=few)[0].selected[0] == chosen).all()
    np.testing.assert_array_equal(one, other)
    assert np.abs(one - fly(ROUTER(select="signed"), adapter(), B, X, np.zeros(r))).max() > 0.1


def test_acceptance_5_signed_and_abs_choose_half_in_common():
    n = 512
    W = sparse_projection.rows(0, Site("q", n, OUT, (0,), r), 0, r, k / r)
    x = normal(2000, n, seed=5)
    size, signed = (decide(ROUTER(select=select), x, W=W)[0].selected[0] for select in ("abs", "signed"))
    h2 = np.square(np.asarray(x @ W.T))
    np.testing.assert_allclose((size & signed).sum(-1).mean() / k, 0.5, atol=0.06)
    shares = [(h2 * mask).sum() / h2.sum() for mask in map(np.asarray, (signed, size))]
    np.testing.assert_allclose(shares, [0.45, 0.71], atol=0.03)


def test_acceptance_6_the_gradient_of_B_is_of_the_chosen_ranks():
    d = np.where(np.arange(r) < 5, -90.0, 0.0)  # never chosen
    g, _ = gradients(ROUTER(select="signed"), adapter(), B, X, d)
    _, mask, h = by_hand(X, d, "signed")
    assert not np.asarray(g[:5]).any()
    np.testing.assert_allclose(g[:, 0], 2.0 * (mask * h).T @ np.asarray(PROBE, np.float64), rtol=1e-4, atol=1e-4)


def test_acceptance_7_input_grad():
    d = np.zeros(r)
    none, whole = (gradients(ROUTER(), adapter(input_grad=on), B, X, d)[1] for on in (False, True))
    assert not np.asarray(none).any(), "what reaches x is the frozen path's"
    _, mask, _ = by_hand(X, d, "abs")
    closed = 2.0 * (mask * (np.asarray(PROBE, np.float64) @ np.asarray(B[:, 0]).T)) @ np.asarray(A)
    np.testing.assert_allclose(whole, closed, rtol=1e-4, atol=1e-4)
    step, at = 1e-7, np.random.default_rng(3).standard_normal((T, D))
    plus, minus = (by_hand(np.asarray(X, np.float64) + sign * step * at, d, "abs") for sign in (1, -1))
    assert (plus[1] == minus[1]).all(), "away from ties"
    np.testing.assert_allclose(((plus[0] - minus[0]) * PROBE).sum() / (2 * step), (closed * at).sum(), rtol=1e-5)


def test_acceptance_8_the_bias_moves_by_u_against_the_load_of_valid_tokens():
    router = ROUTER(bias_rate=1e-3)
    new = router.update({"d": jnp.array([0.1, 0.2, 0.3])}, {"count": jnp.array([9.0, 3.0, 6.0])})["d"]
    np.testing.assert_allclose(new, [0.1 - 1e-3, 0.2 + 1e-3, 0.3], rtol=1e-6)
    decision, sums = decide(ROUTER(), valid=jnp.arange(T)[None] < 6)
    assert float(sums["count"].sum()) == 6 * k
    np.testing.assert_array_equal(sums["count"], decision.selected[0, :6].sum(0))


def test_acceptance_8_once_a_step_of_the_whole_batch_and_never_in_evaluation():
    """The sums that leave a pass are of the whole batch; only `update_routers`, called once a step, changes d."""
    model, params, adapters, state = small.build("flylora", **FEW)
    before = jax.device_get(state)
    stats = small.lm_loss(model, params, adapters, state, small.batch())[1]
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(state))
    sums = {rule: {s: {n: v["router"] for n, v in sc.items()} for s, sc in seg.items()} for rule, seg in stats.items()}
    count = np.asarray(sums["all"]["000-001"]["q"]["count"])
    np.testing.assert_array_equal(count.sum(-1), k * (small.batch()["segment_ids"] > 0).sum())
    d = update_routers(model, state, sums)["all"]["000-001"]["router"]["q"]["d"]
    np.testing.assert_allclose(d, 1e-3 * np.sign(count.mean(-1, keepdims=True) - count), rtol=1e-6)


def test_acceptance_9_independent_As_are_nearly_orthogonal():
    n = 512
    one, two = (
        np.asarray(sparse_projection.rows(seed, Site("q", n, OUT, (0,), r), 0, r, k / r), np.float64) for seed in (1, 2)
    )
    unit = lambda M: M / np.linalg.norm(M, axis=1, keepdims=True)  # noqa: E731
    np.testing.assert_allclose(np.sqrt(np.square(unit(one) @ unit(two).T).mean()), n**-0.5, atol=0.004)


@pytest.mark.parametrize(("field", "value"), [("seed", 1), ("density", 0.5)])
def test_a_router_of_another_matrix_than_the_adapters_is_refused(field, value):
    """Of two matrices the ranks that act are not those whose projections are large; both changed alike is a matrix."""
    both = {f"method__rules__all__{axis}__{field}": value for axis in ("router", "adapter")}
    for one in both:
        with pytest.raises(InputError, match="the router is the adapter's own A") as error:
            small.config("flylora", **{one: value})
        assert error.value.where == f"method.rules.all.router.{field}"
    small.config("flylora", **both)
    with pytest.raises(InputError, match="the router is the adapter's own A"):
        layer = RoutedLoRA(OUT, experts=r, adapter=adapter(), router=ROUTER(**{field: value}))
        layer.init(jax.random.key(0), X, kernel=jnp.zeros((D, OUT)))


def test_a_router_of_its_own_matrix_serves_other_adapters():
    """Ranks above 1 are blocks, whose A has more rows than the router anyway."""
    small.config("flylora", method__rules__all__adapter__rank=2, method__rules__all__router__seed=3)
    plain = dict(name="lora", rank=1, alpha=2.0, dropout=0.0, init="kaiming")
    small.config("flylora", method__rules__all__adapter=plain, method__rules__all__router__seed=3)
