"""LoRA-SB (2411.19557): what the paper promises, a test each, by the numbers of the acceptance list.

That the gradient which it starts from is that of full fine-tuning, and comes from the run's rows, is in
`tests/training/test_probe.py`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from molora_jax.adapters import ADAPTERS
from molora_jax.core import trees
from molora_jax.core.types import Site
from molora_jax.objectives.lm import lm
from tests.acceptance import small
from tests.battery.cases import BATCH, SMALL, TARGETS_PER_ROW, Case, method

SITE, R, ETA = Site("up", 12, 10, (0,), 3, (3,)), 4, 1e-2
rng = np.random.default_rng(0)
W, G = (rng.standard_normal((12, 10)) for _ in range(2))  # [D_in, D_out]
FIRST = -ETA * np.sign(G.T)  # the first step of full fine-tuning, out x in


def start(alpha=float(R), **options):
    adapter = ADAPTERS["lora_xs"](rank=R, alpha=alpha, dropout=0.0, init=dict(name="lora_sb", eta=ETA) | options)
    own = adapter.init_leaves(jax.random.key(0), SITE, 0, base=jnp.asarray(W), base_grad=jnp.asarray(G))
    return adapter, {name: np.asarray(x, np.float64) for name, x in own.items()}


def test_1_outer_factors_are_orthonormal_and_the_core_is_diagonal_and_sorted():
    _, own = start()
    for factor in (own["A"][0], own["B"][0]):
        np.testing.assert_allclose(factor @ factor.T, np.eye(R), atol=1e-6)
    assert own["core"].shape == (3, R, R)
    for core in own["core"]:
        s = np.diag(core)
        assert np.array_equal(core, np.diag(s)) and (s >= 0).all() and (np.diff(s) <= 0).all()


@pytest.mark.parametrize("svd", ["exact", "randomised"])
def test_2_what_it_adds_is_the_best_of_its_rank(svd):
    _, own = start(svd=svd)
    s = np.linalg.svd(FIRST, compute_uv=False)
    apart = np.linalg.norm(FIRST - own["B"][0].T @ own["core"][0] @ own["A"][0])
    assert apart == pytest.approx(np.sqrt((s[R:] ** 2).sum()), rel=1e-5 if svd == "exact" else 1e-2)


def test_2_the_raw_gradient_is_an_option():
    _, own = start(step="gradient")
    s = np.linalg.svd(-ETA * G.T, compute_uv=False)
    np.testing.assert_allclose(np.diag(own["core"][0]), s[:R], rtol=1e-5)


def test_3_the_cores_gradient_is_the_projected_one():
    """Autodiff of a loss with dL/dW = g, through the placement's own product; s = 2."""
    adapter, own = start(alpha=2.0 * R)
    x, dy = rng.standard_normal((6, 12)), rng.standard_normal((6, 10))
    g = dy.T @ x  # out x in
    leaves = {name: jnp.asarray(v[:1] if name == "core" else v, jnp.float32) for name, v in own.items()}
    ones = jnp.ones((6, 1))

    def loss(core):
        y = small.change(adapter, leaves | {"core": core}, ones, jnp.asarray(x, jnp.float32))
        return jnp.sum(y * dy.astype(np.float32))

    found = np.asarray(jax.jit(jax.grad(loss))(leaves["core"]), np.float64)[0]
    A, B = own["A"][0], own["B"][0].T
    np.testing.assert_allclose(found, 2.0 * B.T @ g @ A.T, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(B @ (found / 2.0) @ A, B @ B.T @ g @ A.T @ A, rtol=1e-4, atol=1e-4)


def best(g, B, A, s):
    """(1 / s^2) (B^T B)^-1 g_C (A A^T)^-1 with g_C = s B^T g A^T."""
    core = s * B.T @ g @ A.T
    return np.linalg.solve(B.T @ B, core) @ np.linalg.inv(A @ A.T) / s**2


def test_4_the_preconditioned_gradient_is_the_least_squares_one_and_orthonormal_factors_need_none():
    _, own = start()
    s, g = 1.5, G.T
    for A, B in ((rng.standard_normal((R, 12)), rng.standard_normal((10, R))), (own["A"][0], own["B"][0].T)):
        design = s * np.einsum("or,qi->oirq", B, A).reshape(g.size, R * R)  # s B g_C A, by entries of g_C
        wanted = np.linalg.lstsq(design, g.reshape(-1), rcond=None)[0].reshape(R, R)
        np.testing.assert_allclose(best(g, B, A, s), wanted, atol=1e-6)
    A, B = own["A"][0], own["B"][0].T
    np.testing.assert_allclose(best(g, B, A, 1.0), B.T @ g @ A.T, atol=1e-5)


@functools.cache
def case():
    """The shipped config on a small decoder, its start from the gradient of the battery's batch: `(case, begun)`."""
    made = Case(method("lora_sb", **{"method.rules.all.adapter.init.eta": 1e-4}))
    return made, small.begun_from_gradient(made)[0]


@jax.jit
def loss_of(adapters):
    made, _ = case()
    hidden = made.model.hidden(made.params, adapters, {}, BATCH)[0]
    return lm(made.model, made.params, hidden, BATCH, TARGETS_PER_ROW) / jnp.sum(BATCH["loss_weight"])


def test_5_the_run_begins_beside_the_base_and_with_a_lower_loss():
    """Not a theorem: of a small step, downhill. Upward (+eta), the loss is higher."""
    made, begun = case()
    silent = jax.tree_util.tree_map_with_path(lambda p, x: x * (p[-1].key != "core"), begun)
    turned = jax.tree_util.tree_map_with_path(lambda p, x: -x if p[-1].key == "core" else x, begun)
    assert np.abs(made.hidden(begun) - made.hidden({})).max() > 1e-4
    np.testing.assert_allclose(made.hidden(silent), made.hidden({}), atol=1e-6)
    assert loss_of(begun) < loss_of(silent) < loss_of(turned)


def test_6_r_squared_numbers_a_matrix_train_and_the_outer_factors_do_not():
    made, begun = case()
    before = made.start(begun)
    after, _, gradients = made.run(before)
    assert {path.rpartition("/")[2] for path in gradients} == {"core"}
    assert trees.count(gradients) == 7 * SMALL.layers * 16**2
    for site in SMALL.sites:
        old, new = begun["all"]["000-001"][site], jax.device_get(after.adapters)["all"]["000-001"][site]
        assert np.array_equal(old["A"], new["A"]) and np.array_equal(old["B"], new["B"])
        assert not np.array_equal(old["core"], new["core"])
    assert max(x.size for x in jax.tree.leaves(after.opt)) == SMALL.layers * 16**2, "no moments of A and B"


def path_of(s, optimizer, steps=4, precondition=False):
    """W's change after each step on the loss |W0 + s B C A - T|^2 / 2 (the target's gradient at W0 is G)."""
    _, own = start(alpha=s * R)
    A, B, core = own["A"][0], own["B"][0].T, own["core"][0]
    tx, out = optimizer, []
    state = tx.init(jnp.asarray(core))
    for _ in range(steps):
        g = G.T + s * B @ core @ A
        grad = best(g, B, A, s) if precondition else s * B.T @ g @ A.T
        update, state = tx.update(jnp.asarray(grad), state)
        core = core + np.asarray(update, np.float64)
        out.append(s * B @ core @ A)
    return np.array(out)


def test_7_the_scale_is_a_learning_rate():
    """The start does not depend on s; Adam's step of W is s times as long, and the preconditioned SGD's the same."""
    starts = [path_of(s, optax.sgd(0.0), 1) for s in (1.0, 2.0)]
    np.testing.assert_allclose(*starts, rtol=1e-5, atol=1e-9)
    same = [path_of(s, optax.adam(rate, eps=1e-12)) for s, rate in ((1.0, 1e-3), (2.0, 0.5e-3))]
    np.testing.assert_allclose(*same, rtol=1e-3, atol=1e-7)
    assert np.abs(path_of(2.0, optax.adam(1e-3)) - path_of(1.0, optax.adam(1e-3))).max() > 1e-3
    both = [path_of(s, optax.sgd(1e-2), precondition=True) for s in (1.0, 2.0)]
    np.testing.assert_allclose(*both, rtol=1e-5, atol=1e-9)


def test_8_the_mean_of_cores_is_the_mean_of_the_changes():
    adapter, own = start()
    cores = own["core"] + rng.standard_normal((3, R, R))
    x, ones = jax.device_put(np.float32(rng.standard_normal((5, 12)))), jnp.ones((5, 1))

    def change(core):
        leaves = {name: jnp.asarray(v, jnp.float32) for name, v in (own | {"core": core[None]}).items()}
        return np.asarray(small.change(adapter, leaves, ones, x))

    np.testing.assert_allclose(
        change(cores.mean(axis=0)), np.mean([change(c) for c in cores], axis=0), rtol=1e-5, atol=1e-5
    )


def test_traps_the_shipped_config_has_no_decay_and_a_scale_of_1():
    made = method("lora_sb")
    adapter = made.method.rules.all.adapter
    assert adapter.alpha == adapter.rank and made.optim.weight_decay == 0.0 and adapter.dropout == 0.0
    assert adapter.init.step == "sign"
