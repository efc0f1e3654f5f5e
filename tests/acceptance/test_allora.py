"""ALLoRA, arXiv 2410.09692: its acceptance list, against float64 numpy.

T tokens, E experts, R rank; G = dL / d(B A) of an expert, in a kernel's layout [D_in, D_out].
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import molora_jax as mj
from molora_jax import engines
from molora_jax.adapters import ADAPTERS
from molora_jax.adapters.allora import Allora, rates, row_norms
from molora_jax.core.rules import Rule
from molora_jax.core.types import Routing
from molora_jax.engines import auto
from molora_jax.errors import InputError
from molora_jax.placements import projection
from tests.acceptance import small
from tests.battery.cases import Case, combination, random_adapters
from tests.battery.checks import check_gradients, check_step
from tests.engines.problems import mesh
from tests.surgery.make import config_of, lora_rules, new_run

T, E, R, D_IN, D_OUT = 13, 3, 4, 10, 7
RNG = np.random.default_rng(0)
normal = lambda *shape: RNG.standard_normal(shape).astype(np.float32)  # noqa: E731
X, W, DY = normal(T, D_IN), normal(D_IN, D_OUT), normal(T, D_OUT)
LEAVES = {"A": normal(E, R, D_IN), "B": normal(E, R, D_OUT)}
GATES = np.where(RNG.random((T, E)) < 0.6, RNG.random((T, E)), 0).astype(np.float32)


def make(eta_squared=2.0, name="allora", rank=R, form="rows"):
    if name == "lora":
        return ADAPTERS["lora"](rank=rank, alpha=float(rank), dropout=0.0)
    return Allora(rank=rank, eta_squared=eta_squared, form=form)


@functools.partial(jax.jit, static_argnames=("adapter", "train"))
def output(adapter, leaves, x=X, train=True):
    """`[T, D_out]` of a routed projection, as the model does it."""
    gates = jnp.asarray(GATES)[None]
    valid = jnp.ones(gates.shape[:2], bool)
    routing = Routing(gates, gates != 0, gates, gates, valid, k_max=E)
    ctx = small.context(1, len(x), train=train)
    part = projection.part(Rule("r", ("q",), (1,), adapter, router=object()), leaves, {}, routing, ctx, x)
    return engines.project(engines.ALONE, "q", jnp.asarray(W), None, x, [part])[0]


def coefficients(leaves, eta_squared):
    """c `[E, D_out]` of the materialised change, float64."""
    change = np.einsum("erd,ero->edo", *(np.float64(leaves[k]) for k in "AB"))
    return 1 / np.sqrt(np.linalg.norm(change, axis=1) + 1 / eta_squared)


def test_acceptance_1_the_value_is_loras_of_scale_1_whatever_eta():
    plain = output(make(name="lora"), LEAVES)
    for eta_squared in (1.0, 2.0, 4.0):
        for train in (True, False):
            ours = output(make(eta_squared), LEAVES, train=train)
            np.testing.assert_allclose(ours, plain, rtol=1e-6, atol=1e-5)
    np.testing.assert_array_equal(output(make(1.0), LEAVES), output(make(4.0), LEAVES))


@pytest.mark.parametrize("eta_squared", [1.0, 4.0])
def test_acceptance_2_gradients_are_those_of_an_explicit_G_and_the_input_has_the_plain_one(eta_squared):
    objective = lambda leaves, x: jnp.sum(output(make(eta_squared), leaves, x) * DY)  # noqa: E731
    own, dx = jax.jit(jax.grad(objective, argnums=(0, 1)))(LEAVES, X)
    c = coefficients(LEAVES, eta_squared)
    A, B = (np.float64(LEAVES[k]) for k in "AB")
    G = np.einsum("te,td,to->edo", GATES, X, DY, dtype=np.float64)
    np.testing.assert_allclose(own["B"], np.einsum("eo,edo,erd->ero", c, G, A), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(own["A"], np.einsum("ero,eo,edo->erd", B, c, G), rtol=1e-4, atol=1e-4)
    plain = jax.jit(jax.grad(lambda x: jnp.sum(output(make(name="lora"), LEAVES, x) * DY)))(X)
    np.testing.assert_allclose(dx, plain, rtol=1e-5, atol=1e-5)


def test_acceptance_3_the_first_step_of_sgd_is_loras_at_eta_times_the_rate():
    start = dict(LEAVES, B=0 * LEAVES["B"])
    np.testing.assert_allclose(rates(start["A"], start["B"], 4.0), 2.0, rtol=1e-6)
    grad = lambda adapter: jax.jit(jax.grad(lambda p: jnp.sum(output(adapter, p) * DY)))(start)  # noqa: E731
    ours, plain = grad(make(4.0)), grad(make(name="lora"))
    np.testing.assert_allclose(ours["B"], 2.0 * plain["B"], rtol=1e-5, atol=2e-6)  # an entry of sums that cancel
    assert not np.any(ours["A"]) and not np.any(plain["A"])


def test_acceptance_4_c_falls_with_the_norm():
    A = jnp.ones((1, 1, 1))
    c = [float(rates(A, jnp.full((1, 1, 1), norm), 1.0)[0, 0]) for norm in (0.0, 1.0, 3.0, 100.0)]
    assert c[2] == pytest.approx(0.5) and c[0] == 1.0 and c == sorted(c, reverse=True)
    through = jax.jit(jax.grad(lambda B: jnp.sum(output(make(), dict(LEAVES, B=B), 0 * X))))(jnp.asarray(LEAVES["B"]))
    assert not np.any(through), "no gradient through c"


def test_acceptance_5_row_norms_by_gram_are_those_of_the_product():
    change = np.einsum("erd,ero->edo", *(np.float64(LEAVES[k]) for k in "AB"))
    np.testing.assert_allclose(row_norms(LEAVES["A"], LEAVES["B"]), np.linalg.norm(change, axis=1), rtol=1e-5)
    cancels = jnp.array([[[1.0, 2.0], [1.0, 2.0]]]), jnp.array([[[1.0, 3.0], [-1.0, -3.0]]])
    assert np.isfinite(rates(*cancels, 2.0)).all()


def test_acceptance_6_it_merges_into_the_base_and_is_summed_as_lora_is(tmp_path):
    made = new_run(tmp_path / "run", lora_rules(rank=3, name="allora", eta_squared=4.0))
    run = mj.load_run(made)
    merged = mj.load_run(mj.perform(config_of("merge_into_base", made), tmp_path / "merged"))
    np.testing.assert_allclose(merged.logits("a b"), run.logits("a b"), atol=1e-4)
    view, W = run.view(), run.params["blocks"]["q"]["kernel"][1]
    change = np.einsum("erd,ero->do", *(view["all", 1, "q", k] for k in "AB"))
    np.testing.assert_allclose(merged.params["blocks"]["q"]["kernel"][1], W + change, atol=1e-5)


def test_acceptance_6_asf_lora_refuses_to_merge(tmp_path):
    made = new_run(tmp_path / "run", lora_rules(rank=3, name="allora", form="forward"))
    for name, options, words in (
        ("merge_into_base", {}, "whose adapter Allora is not linear"), ("truncate", dict(rank=1), "no products"),
        ("task_arithmetic", {}, "whose adapter is Allora"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=words):
            mj.perform(config_of(name, made, **options), tmp_path / "none")


@pytest.mark.parametrize("form", ["outputs", "forward"])
def test_the_ablations_are_what_they_say(form):
    """OD: the value is LoRA's, every token's own c in the gradients of A and B; ASF: the value itself is bent."""
    adapter, A, B = make(2.0, form=form), *(np.float64(LEAVES[k]) for k in "AB")
    y = np.einsum("td,erd,ero->teo", X, A, B)
    c = 1 / np.sqrt(np.abs(y) + 0.5)
    own, dx = jax.jit(jax.grad(lambda p, x: jnp.sum(output(adapter, p, x) * DY), argnums=(0, 1)))(LEAVES, X)
    said = np.einsum("te,teo->to", GATES, y * c if form == "forward" else y)
    np.testing.assert_allclose(output(adapter, LEAVES), X @ W + said, rtol=1e-4, atol=1e-4)
    if form == "forward":
        c = c - 0.5 * np.abs(y) * c**3  # d (y c) / dy
    seen = GATES[:, :, None] * DY[:, None] * c
    np.testing.assert_allclose(own["B"], np.einsum("teo,td,erd->ero", seen, X, A), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(own["A"], np.einsum("teo,ero,td->erd", seen, B, X), rtol=1e-3, atol=1e-3)
    below = seen if form == "forward" else GATES[:, :, None] * DY[:, None]
    wanted = DY @ W.T + np.einsum("teo,ero,erd->td", below, B, A)
    np.testing.assert_allclose(dx, wanted, rtol=1e-3, atol=1e-3)


def test_the_ablations_are_refused_where_rows_are_split_or_travel():
    config = combination("allora", "softmax_topk", "projection", "kaiming", **{"method.rules.mix.sites": "q"})
    with config.unlocked():
        config.method.rules.mix.adapter = dict(config.method.rules.mix.adapter, form="forward")
    model = Case(config).model
    for name, sizes, words in (
        ("all_to_all", dict(expert=2), "no products of rank R"),
        ("replicate", dict(tensor=2), "set mesh.tensor=1"),
    ):
        assert words in auto.refusal(model, engines.Engine(name, mesh(**(dict(data=4) | sizes))))
    assert auto.refusal(model, engines.Engine("gather", mesh(data=4, expert=2))) == ""


@pytest.mark.slow
@pytest.mark.parametrize("form", ["outputs", "forward"])
@pytest.mark.parametrize("placement", ["ffn", "projection"])
def test_the_ablations_train_in_every_placement(form, placement):
    config = combination("allora", "softmax_topk", placement, "kaiming")
    with config.unlocked():
        config.method.rules.mix.adapter = dict(config.method.rules.mix.adapter, form=form)
    case = Case(config)
    state, losses = case.start(), []
    np.testing.assert_allclose(case.hidden(state.adapters), case.hidden({}), atol=1e-5)
    for _ in range(15):
        state, metrics, _ = case.run(state)
        losses.append(float(metrics["lm_loss"]))
    assert losses[-1] < 0.8 * losses[0]


def test_acceptance_7_the_rank_leaves_no_scale_behind():
    wide = {k: np.concatenate([v, 0 * v], axis=1) for k, v in LEAVES.items()}
    for rank, leaves in ((R, LEAVES), (2 * R, wide)):
        adapter = make(rank=rank)
        assert adapter.scale() == 1.0 and adapter.dropout == 0.0
        np.testing.assert_allclose(output(adapter, leaves), output(make(), LEAVES), rtol=1e-6, atol=1e-6)
        g = jax.jit(jax.grad(lambda p, a=adapter: jnp.sum(output(a, p) * DY)))(leaves)
        own = jax.jit(jax.grad(lambda p: jnp.sum(output(make(), p) * DY)))(LEAVES)
        np.testing.assert_allclose(g["B"][:, :R], own["B"], rtol=1e-4, atol=1e-5)


def test_a_routed_ffn_has_the_gradients_of_materialised_experts():
    """The battery's naive form asks for the gradient of every expert's own weight."""
    case = Case(combination("allora", "softmax_topk", "ffn", "kaiming"))
    adapters = random_adapters(case.model, case.params)
    _, metrics, gradients = case.run(case.start(adapters))
    check_step(case, adapters, metrics)
    check_gradients(case, adapters, gradients, metrics["grad_norm"])


@pytest.mark.slow
@pytest.mark.parametrize("placement", ["ffn", "projection"])
def test_tokens_that_travel_bring_the_same_gradients(placement):
    config = combination("allora", "softmax_topk", placement, "kaiming")
    one, away = Case(config), Case(config, mesh=mesh(data=2, fsdp=2, expert=2), engine="all_to_all")
    adapters = random_adapters(one.model, one.params)
    (_, _, here), (_, _, there) = (case.run(case.start(adapters)) for case in (one, away))
    for path, g in here.items():
        np.testing.assert_allclose(there[path], g, rtol=1e-4, atol=1e-5 * np.abs(g).max(), err_msg=path)


def short_run(adapter, rate, *, steps=100, dropout=0.0, optimizer=optax.sgd, D=16, seed=0):
    """`[steps]` mean row norms of B A, and the factors in the end, of a linear map that learns another."""
    rng = np.random.default_rng(seed)
    x = jax.device_put(np.float32(rng.standard_normal((256, D))))
    y = x @ jax.device_put(np.float32(rng.standard_normal((D, D)) / D**0.5))
    p = {"A": jax.device_put(np.float32(rng.uniform(-1, 1, (1, 4, D)) / D**0.5)), "B": jnp.zeros((1, 4, D))}
    ctx, move = small.context(train=True), optimizer(rate)

    def step(carry, key):
        p, opt = carry

        def loss(p):
            f = adapter.factors(p, {}, ctx)
            keep = jax.random.bernoulli(key, 1 - dropout, (len(x), f.A.shape[1])) / (1 - dropout)
            return jnp.mean(jnp.sum(((x @ f.A[0].T) * keep @ f.B[0] - y) ** 2, axis=-1))

        updates, opt = move.update(jax.grad(loss)(p), opt, p)
        return (optax.apply_updates(p, updates), opt), jnp.mean(row_norms(p["A"], p["B"]))

    keys = jax.random.split(jax.random.key(seed), steps)
    (p, _), norms = jax.jit(lambda p, o: jax.lax.scan(step, (p, o), keys))(p, move.init(p))
    return np.asarray(norms), jax.device_get(p)


@pytest.mark.slow
def test_experiment_rows_rise_as_under_twice_the_rate_and_flatten_below_it():
    ours, _ = short_run(make(4.0), 2e-2)
    twice, _ = short_run(make(name="lora"), 4e-2)
    assert ours[1] == pytest.approx(twice[1], rel=1e-4), "the first step"
    assert ours[5] == pytest.approx(twice[5], rel=0.25)
    assert (ours[2:60] <= twice[2:60] * 1.0001).all() and ours[30] < 0.9 * twice[30]


@pytest.mark.slow
def test_experiment_dropout_holds_B_back_more_than_A():
    """The implicit penalty sum_r ||X A_r B_r||^2 acts on B from its start at 0. On this linear map by a factor of 1.2;
    the 1.5 that is told of a language model is not reached."""
    (_, free), (_, held) = (short_run(make(name="lora"), 1e-2, dropout=d) for d in (0.0, 0.3))
    ratio = {k: np.linalg.norm(free[k]) / np.linalg.norm(held[k]) for k in "AB"}
    assert ratio["B"] > 1.15 and abs(ratio["A"] - 1) < 0.15 and ratio["B"] > ratio["A"]
