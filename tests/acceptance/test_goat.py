"""GOAT: the acceptance list of its specification, item by item (the numbers are the list's)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from molora_jax.adapters import ADAPTERS
from molora_jax.core.types import Site
from molora_jax.errors import InputError
from molora_jax.losses import LOSSES
from molora_jax.routers import ROUTERS
from molora_jax.runs.checkpoints import Checkpoints
from tests.acceptance import small

E, K, R, D_IN, D_OUT = 8, 2, 2, 48, 32
L = D_OUT // E
W = np.random.default_rng(0).standard_normal((D_IN, D_OUT)).astype(np.float32)
X = np.random.default_rng(1).standard_normal((5, D_IN)).astype(np.float32)
U, S, VT = np.linalg.svd(W.T.astype(np.float64), full_matrices=False)
TOP2 = ROUTERS["softmax_topk"](k=K)


def adapter(name="lora", rank=R, alpha=32.0, **options):
    return ADAPTERS[name](rank=rank, alpha=alpha, dropout=0.0, init=dict(name="goat", **options))


def start(made, experts=E):
    site = Site("up", D_IN, D_OUT, (0,), experts, (experts,))
    return made.init_leaves(jax.random.key(0), site, 0, base=jnp.asarray(W))


def products(leaves, s):
    """`s B_i A_i [E, D_out, D_in]`, float64."""
    A, B = (np.asarray(leaves[name], np.float64) for name in "AB")
    return s * np.einsum("ero,erd->eod", B, A)


def segment(i, rank=R, mini=False):
    at = np.arange(rank) + i * L + (L - rank if mini else 0)
    return (U[:, at] * S[at]) @ VT[at]


def change(made, leaves, gates, x=X):
    return np.asarray(small.change(made, leaves, jnp.asarray(gates, jnp.float32), jnp.asarray(x)))


@pytest.mark.parametrize("made", [adapter(alpha=a) for a in (0.5, 4.0, 64.0)] + [adapter("lora_aligned")])
def test_acceptance_1_products_are_the_segments_over_rho_for_any_scale_and_balanced(made):
    leaves = start(made)
    s = made.scale() * (D_IN**0.5 if type(made).__name__ == "LoraAligned" else 1)
    for i, product in enumerate(products(leaves, s)):
        np.testing.assert_allclose(product, segment(i) / 10, atol=2e-6)
    norms = [np.sqrt(np.square(np.asarray(leaves[name])).sum((1, 2))) for name in "AB"]
    np.testing.assert_allclose(*norms, rtol=1e-5)
    # and what the layer does is the same, whatever the part of the scale that lies with A
    g = np.eye(E)[[3] * len(X)]
    np.testing.assert_allclose(
        change(made, leaves, g), X @ (segment(3) - sum(map(segment, range(E))) / E).T / 10, atol=1e-5
    )


def test_acceptance_2_all_experts_with_equal_gates_are_the_base():
    made = adapter()
    leaves = start(made)
    np.testing.assert_allclose(change(made, leaves, np.full((len(X), E), 1 / E)), 0, atol=1e-5)
    residual = W.T - sum(products(leaves, 16.0)) / E  # the paper's W_res, by E and not by k
    g = np.zeros((len(X), E))
    g[:, [1, 4]] = 0.3, 0.7
    wanted = X @ residual.T + X @ (0.3 * segment(1) + 0.7 * segment(4)).T / 10
    np.testing.assert_allclose(X @ W + change(made, leaves, g), wanted, atol=1e-4)


def test_acceptance_3_the_mean_over_random_routers_approaches_the_base():
    made, rng = adapter(), np.random.default_rng(2)
    leaves = start(made)
    draws = 16384
    routers = jax.device_put(np.float32(rng.standard_normal((draws, E, D_IN)) / 4))
    x = jnp.asarray(X[0])
    gates = jax.jit(jax.vmap(lambda w: TOP2.route({"W": w}, {}, x[None, None], small.context(1, 1))[0].gates[0, 0]))(
        routers
    )
    moved = change(made, leaves, gates, np.broadcast_to(X[0], (draws, D_IN)))
    spread = gates.std(0) / draws**0.5
    assert (np.abs(gates.mean(0) - 1 / E) < 4 * spread).all()
    error = {n: np.linalg.norm(moved.reshape(-1, n, D_OUT).mean(1), axis=-1).mean() for n in (1, 64, 4096)}
    assert 0.7 < error[1] / error[64] / 8 < 1.4 and 0.6 < error[64] / error[4096] / 8 < 1.7
    assert error[1] > 1e-2 * np.linalg.norm(X[0] @ W), "a token's own start is not the base"


def test_acceptance_4_without_residual_the_base_is_whole_and_one_expert_is_pissa_over_rho():
    made = adapter(residual=0.0)
    leaves = start(made)
    assert set(leaves) == {"A", "B"}
    g = np.eye(E)[[2] * len(X)]
    np.testing.assert_allclose(change(made, leaves, g), X @ segment(2).T / 10, atol=1e-4)
    one, pissa = adapter(), ADAPTERS["lora"](rank=R, alpha=32.0, dropout=0.0, init="pissa")
    leaves, top = start(one, 1), start(pissa, 1)
    for name in "AB":
        np.testing.assert_allclose(10**0.5 * np.abs(leaves[name]), np.abs(top[name]), atol=1e-4)
    np.testing.assert_array_equal(leaves["A"], leaves["A0"])
    np.testing.assert_allclose(change(one, leaves, np.ones((len(X), 1))), 0, atol=1e-5)


def test_acceptance_5_segments_are_disjoint_ordered_and_mini_takes_their_ends():
    found = {}
    for kind, rank in (("goat", R), ("goat_mini", R), ("goat", L), ("goat_mini", L)):
        leaves = start(adapter(rank=rank, alpha=16.0 * rank, segments=kind))
        found[kind, rank] = products(leaves, 16.0)
        values = np.square(np.asarray(leaves["A"])).sum(-1) * 16 * 10  # the singular values taken
        at = np.abs(values.reshape(-1, 1) - S).argmin(-1)
        assert (np.diff(at) > 0).all() and len(set(at)) == E * rank
        np.testing.assert_allclose(values.reshape(-1), S[at], rtol=1e-4)
    np.testing.assert_allclose(found["goat_mini", R][3], segment(3, mini=True) / 10, atol=1e-5)
    assert not np.allclose(found["goat", R], found["goat_mini", R], atol=1e-3)
    np.testing.assert_array_equal(found["goat", L], found["goat_mini", L])


def test_acceptance_6_the_theory_scale_gives_the_full_gradient_in_the_mean():
    made, n, r, draws = ADAPTERS["lora_aligned"](rank=4, dropout=0.0), 256, 4, 300
    s = made.scale_at(Site("up", n, D_OUT, (0,), 1))
    assert s == pytest.approx((3 * n / r) ** 0.5)
    for width, rank, wanted in ((4096, 1, 110.9), (4096, 8, 39.2), (1024, 4, 27.7)):
        own = ADAPTERS["lora_aligned"](rank=rank)
        assert own.scale_at(Site("up", width, 8, (0,), 1)) == pytest.approx(wanted, abs=0.05)
    site = Site("up", n, D_OUT, (0,), draws)
    A = np.asarray(made.init_leaves(jax.random.key(0), site, 0)["A"], np.float64)  # of `draws` experts
    mean = np.einsum("erd,erf->df", A, A) / draws
    assert np.trace(mean) == pytest.approx(r / 3, rel=0.01)
    g = np.random.default_rng(0).standard_normal((D_OUT, n))
    assert np.trace(s**2 * mean) / n == pytest.approx(1, rel=0.02)  # W moves by s^2 g A^T A where B moves by s g A^T
    off = s**2 * g @ mean
    assert np.vdot(off, g) / np.vdot(g, g) == pytest.approx(1, rel=0.02)
    np.testing.assert_allclose(s**2 * mean, np.eye(n), atol=5 * (n / (r * draws)) ** 0.5 / 3)


def test_acceptance_7_balance_is_k_at_uniform_and_unselected_experts_learn_nothing():
    loss = LOSSES["balance"](**dict(small.config("goat").losses.balance))
    x, ctx = jnp.ones((1, 5, D_IN)), small.context(1, 5)
    decision = small.routed(TOP2, {"W": jnp.zeros((E, D_IN))}, {}, x, ctx)[0]
    stats = jax.tree.map(lambda v: v[None], loss.stats(decision, ctx))
    assert float(loss.value({"r": {"s": {"q": stats}}})) == pytest.approx(K, rel=1e-5)
    np.testing.assert_allclose(decision.gates.sum(-1), 1, rtol=1e-6)
    made = adapter()
    leaves = start(made)
    g = jnp.zeros((5, E)).at[:, jnp.array([1, 4])].set(0.5)
    grads = jax.jit(jax.grad(lambda p: jnp.sum(small.change(made, leaves | p, g, jnp.asarray(X)) ** 2)))(
        {name: leaves[name] for name in "AB"}
    )
    for name, of in grads.items():
        assert {int(e) for e in np.flatnonzero(np.abs(of).sum((1, 2)))} == {1, 4}, name


def test_acceptance_8_saved_leaves_and_the_base_restore_the_outputs(tmp_path):
    made = adapter()
    leaves = start(made) | {"A": start(made)["A"] + 0.1}
    with Checkpoints(tmp_path / "checkpoints", keep=1) as checkpoints:
        checkpoints.save(1, {"adapters": leaves}, meta={})
    shapes = {"adapters": jax.tree.map(np.zeros_like, leaves)}
    restored = Checkpoints(tmp_path / "checkpoints", keep=1).restore(1, shapes)["adapters"]
    g = np.full((len(X), E), 1 / E)
    np.testing.assert_allclose(change(made, restored, g), change(made, leaves, g), atol=1e-5)


def test_acceptance_9_signs_of_singular_vectors_do_not_matter():
    """The kernel's transpose under other signs of rows and columns: the triplets of another decomposition."""
    left, right = (np.sign(np.random.default_rng(s).standard_normal(n)) for s, n in ((3, D_IN), (4, D_OUT)))
    site = Site("up", D_IN, D_OUT, (0,), E, (E,))
    other = adapter().init_leaves(jax.random.key(0), site, 0, base=jnp.asarray(left[:, None] * W * right))
    got = right[:, None] * products(other, 16.0) * left
    np.testing.assert_allclose(got, products(start(adapter()), 16.0), atol=1e-5)


def test_the_config_scales_by_an_experts_rank():
    rule = small.config("goat").method.rules["all"]
    assert (rule.experts, rule.router.k, rule.adapter.alpha / rule.adapter.rank) == ("8", 2, 16.0)


def test_more_triplets_than_a_segment_has_are_refused():
    with pytest.raises(InputError, match="adapter.rank at up: got 5 for each of 8 experts; expected <= 4"):
        start(adapter(rank=5))
