"""LoRA-Pro, arXiv 2407.18242: its acceptance list, against float64 numpy, and its optimizer in a real step.

L layers, E experts, R rank; a pair is by itself for every layer and expert.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from molora_jax import sharding
from molora_jax.core import eigen, tangent, trees
from molora_jax.errors import InputError
from molora_jax.optim.lora_pro import LoraPro
from tests.battery.cases import Case, changed, combination, method, random_adapters
from tests.engines.problems import mesh

L, E, R, D_IN, D_OUT = 2, 3, 4, 24, 17
RIDGE = 1e-6
RNG = np.random.default_rng(0)
A, B = (RNG.standard_normal((L, E, R, d)).astype(np.float32) for d in (D_IN, D_OUT))
G = RNG.standard_normal((L, E, D_IN, D_OUT)).astype(np.float32)  # dL/dW of the kernel
nearest = jax.jit(tangent.nearest, static_argnums=(4, 5))


@pytest.mark.parametrize("n", [1, 2, 5, pytest.param(64, marks=pytest.mark.slow)])
def test_eigenvectors_of_small_matrices_are_those_of_numpy(n):
    F = np.random.default_rng(n).standard_normal((3, n, 40)) * np.logspace(0, -3, n)[:, None]
    for M in (np.float32(F @ np.swapaxes(F, -1, -2)), np.zeros((3, n, n), np.float32)):
        w, V = (np.asarray(x, np.float64) for x in jax.jit(eigen.symmetric)(M))
        top = np.abs(M).max() or 1.0
        np.testing.assert_allclose(np.sort(w), np.linalg.eigvalsh(M.astype(np.float64)), atol=3e-6 * n * top)
        np.testing.assert_allclose(V * w[:, None] @ np.swapaxes(V, -1, -2), M, atol=3e-6 * n * top)
        np.testing.assert_allclose(V @ np.swapaxes(V, -1, -2), np.broadcast_to(np.eye(n), M.shape), atol=1e-5)


def projected(A, B, g):
    """`P_A g + g P_B - P_A g P_B` in the kernel's layout, float64."""
    A, B, g = (np.asarray(x, np.float64) for x in (A, B, g))
    P_A, P_B = (np.swapaxes(F, -1, -2) @ np.linalg.inv(F @ np.swapaxes(F, -1, -2)) @ F for F in (A, B))
    return P_A @ g + g @ P_B - P_A @ g @ P_B


def plain(A, B, g, s):
    """LoRA's gradients, float32."""
    a, b = s * np.einsum("...ro,...do->...rd", B, g), s * np.einsum("...rd,...do->...ro", A, g)
    return np.float32(a), np.float32(b)


def gram(F):
    return np.einsum("...rd,...qd->...rq", F, F)


def norm(x):
    return np.linalg.norm(np.asarray(x, np.float64))


@pytest.mark.parametrize("s", [0.5, 2.0, 16.0])
def test_acceptance_1_and_2_the_step_is_the_projection_of_the_gradient_and_leaves_nothing_in_the_tangent_space(s):
    made = nearest(A, B, *plain(A, B, G, s), s, RIDGE)
    moved = np.asarray(tangent.moved(A, B, *made, s))
    np.testing.assert_allclose(moved, projected(A, B, G), atol=1e-5 * np.abs(G).max())
    rest = G - moved
    assert np.abs(rest @ np.swapaxes(B, -1, -2)).max() < 1e-4 and np.abs(A @ rest).max() < 1e-4
    descent = sum(np.sum(x * y) for x, y in zip(made, plain(A, B, G, s), strict=True))
    assert descent == pytest.approx(norm(moved) ** 2, rel=1e-4), "never uphill"


def test_acceptance_3_any_X_moves_the_weight_alike_and_sylvesters_is_nearest_to_loras_gradients():
    s = 2.0
    a, b = plain(A, B, G, s)
    own = nearest(A, B, a, b, s, RIDGE)
    moved = tangent.moved(A, B, *own, s)
    distance = lambda pair: norm(pair[0] - a) ** 2 + norm(pair[1] - b) ** 2  # noqa: E731
    rng = np.random.default_rng(1)
    for _ in range(50):
        X = rng.standard_normal((L, E, R, R)).astype(np.float32)
        other = nearest(A, B, a, b, s, RIDGE, X)
        np.testing.assert_allclose(tangent.moved(A, B, *other, s), moved, atol=2e-4)
        # a step from Sylvester's X along any direction
        away = 0.05 * X
        near = own[0] + np.einsum("...rq,...qd->...rd", away, A), own[1] - np.einsum("...qr,...qo->...ro", away, B)
        assert distance(near) > distance(own) and distance(other) > distance(own)


@pytest.mark.parametrize("s", [0.5, 2.0])
def test_acceptance_4_loras_own_step_is_never_nearer_even_rescaled(s):
    a, b = plain(A, B, G, s)
    theirs = np.asarray(tangent.moved(A, B, a, b, s), np.float64)
    ours = np.asarray(tangent.moved(A, B, *nearest(A, B, a, b, s, RIDGE), s))
    for at in np.ndindex(L, E):
        best = np.sum(theirs[at] * G[at]) / np.sum(theirs[at] ** 2)  # the scalar c of least squares
        assert norm(G[at] - ours[at]) <= norm(G[at] - best * theirs[at])


def test_acceptance_5_other_factors_of_the_same_product_move_it_alike():
    s, T = 2.0, np.eye(R) + 0.4 * RNG.standard_normal((L, E, R, R))
    A2 = np.float32(np.linalg.inv(T) @ A)
    B2 = np.float32(np.swapaxes(T, -1, -2) @ B)
    np.testing.assert_allclose(
        np.swapaxes(A2, -1, -2) @ B2, np.swapaxes(A, -1, -2) @ B, atol=1e-4, err_msg="the same product"
    )
    one, other = (tangent.moved(*F, *nearest(*F, *plain(*F, G, s), s, RIDGE), s) for F in ((A, B), (A2, B2)))
    np.testing.assert_allclose(other, one, atol=1e-3 * np.abs(one).max())
    lora = [tangent.moved(*F, *plain(*F, G, s), s) for F in ((A, B), (A2, B2))]
    assert norm(lora[1] - lora[0]) > 0.1 * norm(lora[0]), "LoRA's own does not"


AT = ("all/000-001/q/A", "all/000-001/q/B")


def tree(A, B, **more):
    return {"all": {"000-001": {"q": {"A": jnp.asarray(A), "B": jnp.asarray(B)}, **more}}}


def walk(member, A, B, gradients, s, *, each=lambda W, g: g, steps=3, **more):
    """Steps from (A, B) with `gradients[t]` of the weight: the product and other leaves after each."""
    optimizer = member.make(100, {AT: s})
    params, states, out = tree(A, B, **more), None, []
    states = optimizer.init(params)

    @jax.jit
    def step(params, states, g):
        leaves = params["all"]["000-001"]["q"]
        a, b = tangent.gradients(leaves["A"], leaves["B"], g, s)
        rest = {name: jax.tree.map(jnp.ones_like, x) for name, x in more.items()}
        updates, states = optimizer.update(tree(a, b, **rest), states, params)
        return optax.apply_updates(params, updates), states

    for t in range(steps):
        params, states = step(params, states, jnp.asarray(gradients[t]))
        leaves = params["all"]["000-001"]["q"]
        out.append(s * np.einsum("...rd,...ro->...do", *(np.asarray(leaves[k], np.float64) for k in "AB")))
    return out, params, states


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_acceptance_6_at_full_rank_it_is_adamw_on_the_weight(decay):
    """What is left is s dB dA, of the order of the rate's square."""
    D, s = 6, 2.0
    rng = np.random.default_rng(2)
    F = [np.float32(np.eye(D) + 0.3 * rng.standard_normal((L, E, D, D))) for _ in range(2)]
    gs = [rng.standard_normal((L, E, D, D)).astype(np.float32) for _ in range(3)]

    def gap(lr):
        member = LoraPro(learning_rate=lr, decay="constant", ridge=1e-7, weight_decay=decay)
        products, _, _ = walk(member, *F, gs, s)
        W, full = jnp.asarray(s * np.einsum("...rd,...ro->...do", *F), jnp.float32), optax.adamw(lr, weight_decay=decay)
        opt, found = full.init(W), []
        for g, ours in zip(gs, products, strict=True):
            updates, opt = full.update(jnp.asarray(g), opt, W)
            W = optax.apply_updates(W, updates)
            found.append(np.abs(ours - np.asarray(W)).max())
        return np.array(found) / lr

    wide, narrow = gap(4e-3), gap(1e-3)
    assert (narrow < 0.06).all() and (narrow < wide / 3).all(), (wide, narrow)


@pytest.mark.parametrize("form", ["full", "efficient"])
def test_acceptance_7_the_first_step_from_zero_is_finite_and_the_whole_direction_in_the_rows_of_A(form):
    s, lr = 2.0, 1e-3
    router = {"router": {"q": {"W": jnp.ones((L, E, 5))}}}
    member = LoraPro(learning_rate=lr, decay="constant", form=form)
    products, params, states = walk(member, A, 0 * B, [G] * 3, s, **router)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((params, products)))
    own = np.asarray(A, np.float64)
    P_A = np.swapaxes(own, -1, -2) @ np.linalg.inv(own @ np.swapaxes(own, -1, -2)) @ own
    if form == "full":  # Adam's first direction is the sign of g~ = P_A g
        np.testing.assert_allclose(products[0], -lr * P_A @ np.sign(P_A @ G), atol=0.02 * lr)
    else:
        b = np.einsum("...rd,...do->...ro", A, G)
        wanted = -lr * s * np.swapaxes(own, -1, -2) @ np.sign(np.linalg.inv(own @ np.swapaxes(own, -1, -2)) @ b)
        np.testing.assert_allclose(products[0], wanted, atol=0.02 * np.abs(wanted).max())
    moved = np.asarray(params["all"]["000-001"]["router"]["q"]["W"]) - 1
    np.testing.assert_allclose(moved, -3 * lr, rtol=1e-3, err_msg="a router moves by AdamW")
    paths = flatten_dict(states[0].mu, sep="/")
    held = {"full": {"q/change", "router/q/W"}, "efficient": {"q/A", "q/B", "router/q/W"}}[form]
    assert {path.removeprefix("all/000-001/") for path in paths} == held, "each moment once"


def test_an_expert_without_tokens_that_stands_at_zero_stays():
    """Its pair has gradient 0 and B 0: nothing is divided by nothing."""
    g, B0 = G.copy(), 0 * B
    g[:, 1] = 0.0
    products, params, _ = walk(LoraPro(decay="constant"), A, B0, [g] * 3, 2.0)
    assert not np.any(products[-1][:, 1]) and np.abs(products[-1][:, 0]).max() > 0
    np.testing.assert_array_equal(params["all"]["000-001"]["q"]["A"][:, 1], A[:, 1])


@pytest.mark.parametrize("form", ["full", "efficient"])
def test_runs_side_by_side_are_each_alone(form):
    """`jax.vmap` of the update over runs of other factors and rates."""
    factors = [(A, B), (A[::-1], B[::-1] + 1)]
    grads = [plain(*F, G, 2.0) for F in factors]
    stack = lambda trees: jax.tree.map(lambda *x: jnp.stack(x), *trees)  # noqa: E731

    def one(rate, params, grads):
        rates = {"learning_rate": rate, "rise": 0.0}
        optimizer = LoraPro(form=form, decay="constant").at(rates).make(10, {AT: 2.0})
        return optimizer.update(grads, optimizer.init(params), params)[0]

    rates = jnp.array([1e-3, 4e-3])
    both = jax.jit(jax.vmap(one))(rates, stack([tree(*F) for F in factors]), stack([tree(*g) for g in grads]))
    for n in range(2):
        alone = jax.jit(one)(rates[n], tree(*factors[n]), tree(*grads[n]))
        for x, y in zip(jax.tree.leaves(both), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(x[n], y, rtol=2e-4, atol=1e-7)


def test_a_mixture_on_eight_devices_moves_as_on_one_and_its_moments_lie_as_the_weights_do():
    config = combination("lora", "softmax_topk", "projection", "kaiming", **{"method.rules.mix.sites": "down"})
    config = changed(config, {"optim.name": "lora_pro"})
    one = Case(config)
    eight = Case(config, mesh=mesh(data=2, fsdp=2, expert=2), engine="gather")
    adapters = random_adapters(one.model, one.params)
    (a, _, _), (b, _, _) = (case.run(one.start(adapters)) for case in (one, eight))
    start = flatten_dict(adapters, sep="/")
    for x, y in zip(*(flatten_dict(jax.device_get(s.adapters), sep="/").items() for s in (a, b)), strict=True):
        moved = x[1] - start[x[0]]
        np.testing.assert_allclose(y[1] - start[x[0]], moved, atol=2e-3 * np.abs(moved).max(), err_msg=x[0])
    moments = flatten_dict(b.opt[1][0].mu, sep="/")
    assert moments["mix/000-001/down/change"].sharding.spec == sharding.P(None, "expert", "tensor", "fsdp")
    assert moments["mix/000-001/router/down/W"].sharding.spec == sharding.P()


def test_trap_the_scale_is_the_adapters_and_pairs_are_found_by_name():
    case = Case(method("lora_pro", **{"method.rules.all.adapter.name": "rslora"}))
    shapes = trees.split(jax.eval_shape(case.model.init_adapters, jax.random.key(0), case.params), case.frozen)[0]
    assert set(trees.pairs(case.model, shapes).values()) == {32.0 / 16**0.5}
    frozen = trees.split(shapes, ("*/A",))[0]
    for tree_, words in ((frozen, "no A and B of one product"), (tree(A[:, :1], B), "a pair of its own for every")):
        pairs = trees.pairs(case.model, tree_) | {AT: 1.0}
        with pytest.raises(InputError, match=words):
            LoraPro().make(10, pairs).init(tree_)


def descend(R, D=12, steps=50, lr=2e-3, batch=64):
    """`{method: (distance of the change from full fine-tuning's, loss)}` of a two-layer net whose target moved."""
    rng = np.random.default_rng(3)
    W = [jax.device_put(np.float32(rng.standard_normal((D, D)) / D**0.5)) for _ in range(2)]
    goal = [w + jax.device_put(np.float32(0.5 * rng.standard_normal((D, D)) / D**0.5)) for w in W]
    x = jax.device_put(np.float32(rng.standard_normal((batch, D))))
    net = lambda W: jnp.tanh(x @ W[0]) @ W[1]  # noqa: E731
    loss = lambda changes: jnp.mean((net([w + c for w, c in zip(W, changes, strict=True)]) - net(goal)) ** 2)  # noqa: E731
    start = {f"q{i}": {"A": jax.device_put(np.float32(rng.uniform(-1, 1, (1, 1, R, D)) / D**0.5)),
                       "B": jnp.zeros((1, 1, R, D))} for i in range(2)}  # fmt: skip
    pairs, s = {(f"{q}/A", f"{q}/B"): 2.0 for q in start}, 2.0
    product = lambda leaves: [s * jnp.einsum("lerd,lero->do", f["A"], f["B"]) for f in leaves.values()]  # noqa: E731
    found = {}
    pro = LoraPro(learning_rate=lr, decay="constant").make(steps, pairs)
    for name, optimizer, params, changes in (
        ("full", optax.adam(lr), [jnp.zeros((D, D))] * 2, lambda p: p),
        ("lora", optax.adam(lr), start, product), ("pro", pro, start, product),
    ):  # fmt: skip

        def step(carry, _, optimizer=optimizer, changes=changes):
            params, opt = carry
            updates, opt = optimizer.update(jax.grad(lambda p: loss(changes(p)))(params), opt, params)
            return (optax.apply_updates(params, updates), opt), None

        run = jax.jit(lambda p, o, step=step: jax.lax.scan(step, (p, o), None, length=steps)[0][0])
        found[name] = changes(run(params, optimizer.init(params)))
    gap = lambda c: float(sum(jnp.sum((a - b) ** 2) for a, b in zip(c, found["full"], strict=True)) ** 0.5)  # noqa: E731
    return {name: (gap(c), float(loss(c))) for name, c in found.items()}


@pytest.mark.slow
def test_experiment_it_lies_between_lora_and_full_fine_tuning_and_nears_it_as_the_rank_grows():
    runs = {R: descend(R) for R in (2, 6, 12)}
    for R, run in runs.items():
        assert run["pro"][0] < run["lora"][0], (R, run)
        assert run["full"][1] < run["pro"][1] < run["lora"][1] or R == 12, (R, run)
    gaps = [run["pro"][0] for run in runs.values()]
    assert gaps[2] < 0.5 * gaps[0] and gaps[0] > gaps[1] > gaps[2], gaps
