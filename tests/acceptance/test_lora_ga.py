"""LoRA-GA (2407.05000): what the paper promises, a test each, by the numbers of the acceptance list.

5 in whole runs, on a mesh, over several batches and micro-steps is in `tests/training/test_probe.py`; 7 for fewer
vectors in `test_lora_xs.py`.
"""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from molora_jax.adapters import ADAPTERS
from molora_jax.core.types import Context, Site
from molora_jax.errors import InputError
from molora_jax.inits import made as start_of
from molora_jax.inits._singular import singular
from molora_jax.objectives.lm import lm
from molora_jax.runs.products import products
from tests.acceptance import small
from tests.battery.cases import BATCH, SMALL, TARGETS_PER_ROW, Case, method

SITE, R, GAMMA, ALPHA = Site("up", 12, 10, (0,), 3, (3,)), 2, 4.0, 6.0
rng = np.random.default_rng(0)
W, G = (rng.standard_normal((12, 10)) for _ in range(2))  # [D_in, D_out]
C, ETA = 10**0.25 / GAMMA**0.5, ALPHA / R**0.5
PEFT = np.load(pathlib.Path(__file__).parents[1] / "fixtures" / "lora_ga.npz")


def start(adapter="rslora", base=W, gradient=G, **options):
    own = ADAPTERS[adapter](
        rank=R, alpha=ALPHA, dropout=0.0, init=dict(name="lora_ga", gamma=GAMMA) | options
    ).init_leaves(jax.random.key(0), SITE, 0, base=jnp.asarray(base), base_grad=jnp.asarray(gradient))
    return {name: np.asarray(x, np.float64) for name, x in own.items()}


@functools.cache
def case():
    """The shipped config on a small decoder, its start from the gradient of the battery's batch, and that gradient."""
    made = Case(method("lora_ga"))
    return made, *small.begun_from_gradient(made)


def test_1_the_function_is_the_bases_before_the_first_step():
    made, begun, _ = case()
    own = begun["all"]["000-001"]["up"]
    assert np.abs(own["B"]).max() > 0.1, "and B is far from 0"
    np.testing.assert_allclose(made.hidden(begun), made.hidden({}), atol=1e-5)


def test_2_the_start_is_orthogonal_with_c():
    own = start()
    assert own["A"].shape == (3, R, 12) and own["A0"].shape == (1, R, 12) and own["B0"].shape == (1, R, 10)
    for name in "AB":
        np.testing.assert_allclose(own[name][0] @ own[name][0].T, C**2 * np.eye(R), atol=1e-5)
        np.testing.assert_array_equal(own[name], np.broadcast_to(own[f"{name}0"], own[name].shape))
    u, _, vt = np.linalg.svd(G.T)
    np.testing.assert_allclose(np.abs(own["A"][0]), C * np.abs(vt[:R]), atol=1e-5)
    np.testing.assert_allclose(np.abs(own["B"][0]), C * np.abs(u.T[R : 2 * R]), atol=1e-5)


def first_step(own, rate):
    """The change of W (out x in) after one step of gradient descent on (A, B), where dL/dW = G^T."""
    A, B = own["A"][0], own["B"][0].T
    A1, B1 = A - rate * ETA * B.T @ G.T, B - rate * ETA * G.T @ A.T
    return ETA * (B1 @ A1 - B @ A)


@pytest.mark.parametrize("direction", ["ArB2r", "A2rBr", "ArBr", "random"])
def test_3_the_first_step_is_that_of_full_fine_tuning_in_its_first_2r_directions(direction):
    """Float64; what is left falls with the square of the rate."""
    own = start(direction=direction)
    u, s, vt = np.linalg.svd(G.T)
    wanted = (u[:, : 2 * R] * s[: 2 * R]) @ vt[: 2 * R]
    left = [np.linalg.norm(first_step(own, rate) + rate * ETA**2 * C**2 * wanted) for rate in (1e-3, 5e-4)]
    assert left[0] / left[1] == pytest.approx(4.0, rel=0.05) and left[0] < 1e-2 * np.linalg.norm(wanted)


def test_4_its_first_step_lies_nearer_to_the_gradient_than_loras():
    s = np.linalg.svd(G.T, compute_uv=False)
    plain = np.asarray(
        ADAPTERS["rslora"](rank=R).init_leaves(jax.random.key(0), SITE, 0)["A"][:1], np.float64
    )  # fmt: skip
    lora = {"A": plain, "B": np.zeros((1, R, 10))}

    def cosine(own):
        step = first_step(own, 1e-6)
        return -np.sum(step * G.T) / np.linalg.norm(step) / np.linalg.norm(G)

    assert cosine(start()) == pytest.approx(np.sqrt((s[: 2 * R] ** 2).sum() / (s**2).sum()), rel=1e-4)
    assert cosine(start()) > cosine(lora) + 0.1


def test_5_the_gradient_is_full_fine_tunings_and_nothing_else_is_touched():
    made, begun, found = case()
    before = jax.device_get(made.params)

    def loss(kernels):
        blocks = {**made.params["blocks"], **{site: {"kernel": w} for site, w in kernels.items()}}
        own, model = {**made.params, "blocks": blocks}, made.model.without_rules()
        hidden = model.hidden(own, {}, {}, BATCH)[0]
        return lm(model, own, hidden, BATCH, TARGETS_PER_ROW) / jnp.sum(BATCH["loss_weight"])

    wanted = jax.jit(jax.grad(loss))({site: made.params["blocks"][site]["kernel"] for site in SMALL.sites})
    for site in SMALL.sites:
        got = np.stack([g[site] for g in found])
        np.testing.assert_allclose(got, wanted[site], rtol=1e-4, atol=1e-6 * np.abs(wanted[site]).max(), err_msg=site)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(made.params), before)
    assert jax.tree.all(jax.tree.map(lambda a, b: a.shape == b.shape, begun, jax.device_get(made.start().adapters)))


def test_6_exported_it_is_a_lora_of_rank_2r_on_the_unaltered_base():
    """`products` writes `s [B, -B0] [A; A0]` out: as plain LoRA leaves they give the trained model's hidden states."""
    made, begun, _ = case()
    trained = jax.device_get(made.run(made.start(begun))[0].adapters)
    refuse = lambda got, expected: InputError("run", got=got, expected=expected)  # noqa: E731
    written = products(made.model, trained, refuse=refuse)
    assert written["all", 0, "q"][0].shape == (16, SMALL.width), "2R rows"
    plain = Case(method("lora", **{"method.rules.all.adapter.alpha": 16.0}))  # rank 16: s = 1
    leaves = {
        site: {
            name: np.stack([written["all", layer, site][i] for layer in range(SMALL.layers)])[:, None]
            for i, name in enumerate("AB")
        }
        for site in SMALL.sites
    }
    np.testing.assert_allclose(plain.hidden({"all": {"000-001": leaves}}), made.hidden(trained), rtol=1e-4, atol=1e-5)
    assert np.abs(made.hidden(trained) - made.hidden({})).max() > 1e-3
    lost = jax.tree.map(lambda x: x, trained)
    del lost["all"]["000-001"]["q"]["A0"], lost["all"]["000-001"]["q"]["B0"]
    with pytest.raises(InputError, match="without the leaves of .*'q'"):
        products(made.model, lost, refuse=refuse)


def test_7_randomised_vectors_span_the_exact_ones():
    """q = 4R directions, 4 iterations, 2R vectors; largest angle, of a spectrum that decays."""
    u, v = (np.linalg.qr(rng.standard_normal((n, 30)))[0] for n in (60, 30))
    left, _, right = singular(jnp.asarray((u * 0.7 ** np.arange(30)) @ v.T), 2 * R, "randomised", jax.random.key(1))
    for own, exact in ((left, u), (right.T, v)):
        cosine = np.linalg.svd(np.linalg.qr(np.asarray(own, np.float64))[0].T @ exact[:, : 2 * R])[1].min()
        assert np.sqrt(1 - min(cosine, 1.0) ** 2) < 1e-3


@pytest.mark.parametrize("direction", ["ArB2r", "A2rBr", "ArBr"])
@pytest.mark.parametrize("scale", ["stable", "unit", "gd_scale"])
def test_the_variant_of_peft_is_what_peft_makes(direction, scale):
    """tests/fixtures/make_lora_ga.py; singular vectors have no sign. peft's scale is alpha / R."""
    own = start(
        "lora", PEFT["weight"].T, PEFT["gradient"].T, variant="peft", direction=direction,
        scaling=scale.removesuffix("_scale"),
    )  # fmt: skip
    theirs = {name: PEFT[f"{direction}/{scale}/{name}"] for name in "AB"}
    np.testing.assert_allclose(np.abs(own["A"][0]), np.abs(theirs["A"]), atol=2e-4)
    np.testing.assert_allclose(np.abs(own["B"][0]), np.abs(theirs["B"].T), atol=1e-3)


def test_other_scales_and_the_clip_of_the_offset():
    root = np.sqrt(np.linalg.svd(W, compute_uv=False)[:R] / ETA).mean()
    for scaling, c in (("unit", 1.0), ("gd", 1 / ETA), ("weight", root)):
        own = start(scaling=scaling)
        for name in "AB":
            np.testing.assert_allclose(np.linalg.norm(own[name][0], axis=1), c, rtol=1e-5)
    small_kernel = W / 100
    own, free = start(base=small_kernel, norm_clip=True), start(base=small_kernel)
    offset = ETA * own["A0"][0].T @ own["B0"][0]
    assert np.abs(offset).max() == pytest.approx(np.abs(small_kernel).max(), rel=1e-5)
    rho = np.abs(offset).max() / np.abs(ETA * free["A0"][0].T @ free["B0"][0]).max()
    for name in "AB":
        np.testing.assert_allclose(own[name], np.sqrt(rho) * free[name], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(start(norm_clip=True, gamma=1e6)["A"], start(gamma=1e6)["A"], rtol=1e-6)


def test_routed_experts_start_alike_and_change_nothing_whatever_the_gates():
    """Gates that sum to 0.3 as well as to 1: every expert takes its own start off."""
    own = {name: jnp.asarray(v, jnp.float32) for name, v in start().items()}
    adapter = ADAPTERS["rslora"](rank=R, alpha=ALPHA, dropout=0.0, init="lora_ga")
    x = jax.device_put(np.float32(rng.standard_normal((4, 12))))
    gates = jnp.asarray([[0.5, 0.5, 0.0], [0.1, 0.2, 0.0], [0.0, 0.0, 1.0], [2.0, -1.0, 0.0]])
    np.testing.assert_allclose(small.change(adapter, own, gates, x), 0.0, atol=1e-5)
    moved = own | {"B": own["B"].at[1].add(0.1)}
    changed = np.abs(small.change(adapter, moved, gates, x)).max(axis=1)
    assert (changed[[0, 1, 3]] > 1e-2).all() and changed[2] < 1e-5, "the third token does not use that expert"


def test_traps_of_shapes_and_of_no_gradient():
    """c has the out dimension; a gradient of zeros (a dead layer) gives a finite start that changes nothing."""
    assert C == pytest.approx(np.linalg.norm(start()["A"][0, 0]), rel=1e-5) and SITE.d_out == 10
    dead = start(gradient=np.zeros((12, 10)))
    assert all(np.isfinite(x).all() for x in dead.values())
    factors = ADAPTERS["rslora"](rank=R, alpha=ALPHA, init="lora_ga").factors(
        dead, {}, Context(None, None, None, None, None, site=SITE)
    )
    np.testing.assert_allclose(np.einsum("erd,ero->edo", factors.A, factors.B), 0.0, atol=1e-6)
    assert start_of("lora_ga").RANK == "half" and start_of(dict(name="lora_ga", gamma=2.0)).gamma == 2.0
