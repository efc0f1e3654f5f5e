"""The surveys' checklist: the acceptance list of its specification, and every gate and loss against float64 numpy.

The oracles are written from the papers' formulas (docs/surveys.md names them), with loops where a loop is plainer.
B rows, S positions, D width, E experts, K active.
"""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common
from molora_jax import config as schema
from molora_jax.backbones.compile import compile_model
from molora_jax.backbones.families import TINY, TINY_BERT
from molora_jax.core import routing
from molora_jax.core.types import Site
from molora_jax.engines import common as trips
from molora_jax.errors import InputError
from molora_jax.losses import LOSSES
from molora_jax.losses.diversity import squared_cosines
from molora_jax.routers import ROUTERS
from molora_jax.routers.sinkhorn import balanced
from tests.acceptance import small
from tests.battery.cases import Case, changed, mesh8
from tests.battery.checks import same_step

B, S, D, E = 2, 9, 12, 6
SITE = Site("q", D, D, (0,), E)
VALID = np.array([[1] * 7 + [0] * 2, [1] * 9], bool)
SEGMENTS = np.array([[1, 1, 1, 2, 2, 2, 2, 0, 0], [1] * 5 + [2] * 4])
X = np.random.default_rng(0).standard_normal((B, S, D)).astype(np.float32)


def context(**changes):
    base = small.context(B, S, valid=jnp.asarray(VALID), segment_ids=jnp.asarray(SEGMENTS), max_segments=2, site=SITE)
    tasks = jnp.asarray(SEGMENTS % 2)
    tokens = jnp.asarray(np.arange(B * S).reshape(B, S) * 7)
    return base.replace(**{"task_ids": tasks, "tokens": tokens, "tasked": True, "tasks": ("a", "b")} | changes)


def made(name, seed=1, **options):
    """`(router, leaves as float64, decision function)`; every leaf away from its start."""
    router = ROUTERS[name](**options)
    rng = np.random.default_rng(seed)
    leaves = {k: np.asarray(v) + 0.7 * rng.standard_normal(v.shape)
              for k, v in router.init_leaves(jax.random.key(0), SITE, 0).items()}  # fmt: skip
    leaves = {k: np.asarray(np.float32(v), np.float64) for k, v in leaves.items()}

    def decide(ctx=None, x=X, leaves=leaves):
        ctx = context() if ctx is None else ctx
        ctx = ctx if ctx.state else ctx.replace(state=router.init_state(SITE))
        return small.routed(router, {k: jnp.asarray(v, jnp.float32) for k, v in leaves.items()}, {}, x, ctx)

    return router, leaves, decide


def softmax(z):
    e = np.exp(z - z.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def top(score, k):
    """Mask of the k largest of the last axis, the lower index of a tie."""
    return np.argsort(np.argsort(-score, axis=-1, kind="stable"), axis=-1, kind="stable") < k


def product(W):
    return np.einsum("bsd,ed->bse", np.asarray(X, np.float64), W)


def same(decision, gates, selected=None):
    """The decision is this one, padding taken out."""
    valid = VALID[..., None]
    np.testing.assert_allclose(decision.gates, np.where(valid, gates, 0), atol=2e-6)
    np.testing.assert_array_equal(decision.selected, valid & (gates != 0 if selected is None else selected))
    assert not np.any(np.asarray(decision.gates)[~VALID])


# gates


def test_acceptance_3_a_softmax_after_top_k_is_the_renormalised_one_before():
    """G2, G3: to 1e-6; raw gates are the probabilities themselves."""
    _, p, decide = made("softmax_topk", k=2)
    z = product(p["W"])
    keep = top(z, 2)
    after = softmax(np.where(keep, z, -np.inf))
    np.testing.assert_allclose(decide()[0].gates, np.where(VALID[..., None], after, 0), atol=1e-6)
    same(made("softmax_topk", k=2, renormalise=False)[2]()[0], np.where(keep, softmax(z), 0))
    same(made("softmax_topk", k=0)[2]()[0], softmax(z))  # G1


SCORES = {
    "sigmoid": lambda z: 1 / (1 + np.exp(-z)),
    "softmax": softmax,
    "sqrt_softplus": lambda z: np.sqrt(np.log1p(np.exp(z))),
}


@pytest.mark.parametrize("score", SCORES)
def test_acceptance_3_a_bias_changes_the_choice_and_not_the_gates_formula(score):
    """G4: the gate is s over the sum of the chosen s, times the scale, whatever b."""
    b = np.linspace(-0.6, 0.6, E)
    _, p, decide = made("biased_topk", k=2, score=score, renormalise=True, scale=2.5)
    s = SCORES[score](product(p["W"]))
    for bias in (0 * b, b):
        keep = top(s + bias, 2)
        want = np.where(keep, 2.5 * s / np.where(keep, s, 0).sum(-1, keepdims=True), 0)
        same(decide(context(state={"b": jnp.asarray(bias, jnp.float32)}))[0], want)
    assert (top(s, 2) != top(s + b, 2)).any()


def by_noise(p, key, k, noise=1.0, learned=True):
    """`(H, gates, P)` of noisy top-k in float64, with the draws that the router makes."""
    z = product(p["W"])
    sigma = np.full(z.shape, 1 / E)
    if learned:
        sigma = np.log1p(np.exp(product(p["W_noise"]))) + 1e-2
    H = z + noise * sigma * np.asarray(jax.random.normal(key, z.shape), np.float64)
    P = np.zeros(z.shape)
    for at in itertools.product(range(B), range(S), range(E)):
        others = np.sort(np.delete(H[at[:2]], at[2]))[::-1]
        P[at] = 0.5 * (1 + math.erf((z[at] - others[k - 1]) / (noise * sigma[at]) / math.sqrt(2)))
    return H, softmax(np.where(top(H, k), H, -np.inf)), P


@pytest.mark.parametrize("learned", [True, False])
def test_noisy_top_k_in_training_and_how_probable_its_choices_were(learned):
    """G5, and V-MoE's fixed noise."""
    _, p, decide = made("noisy_topk", k=2, learned=learned)
    ctx = context(train=True, key=jax.random.key(5))
    _, gates, P = by_noise(p, ctx.keyed(8), 2, learned=learned)
    found = decide(ctx)[0]
    same(found, gates)
    np.testing.assert_allclose(found.reach, P, atol=1e-5)


def test_acceptance_3_without_noise_it_is_top_k():
    """G5 with noise 0 in training, and with any noise outside it: no draw is made."""
    _, p, decide = made("noisy_topk", k=2)
    keep = top(product(p["W"]), 2)
    want = softmax(np.where(keep, product(p["W"]), -np.inf))
    same(decide()[0], want)
    _, p, still = made("noisy_topk", k=2, noise=0.0)
    want = softmax(np.where(top(product(p["W"]), 2), product(p["W"]), -np.inf))
    same(still(context(train=True))[0], want)


def test_switch_jitter_and_gshards_second_expert():
    """G6: the input times U(1 - e, 1 + e); the second is used with the probability min(1, 2 g_2)."""
    _, p, decide = made("softmax_topk", k=1, renormalise=False, jitter=1e-2)
    ctx = context(train=True, key=jax.random.key(2))
    noise = np.asarray(jax.random.uniform(ctx.keyed(7), X.shape, minval=0.99, maxval=1.01), np.float64)
    z = np.einsum("bsd,ed->bse", X * noise, p["W"])
    same(decide(ctx)[0], np.where(top(z, 1), softmax(z), 0))

    _, p, decide = made("softmax_topk", k=2, drop_last=1.0)
    z = product(p["W"])
    keep, first = top(z, 2), top(z, 1)
    g = np.where(keep, softmax(z), 0) / np.where(keep, softmax(z), 0).sum(-1, keepdims=True)
    same(decide()[0], g)  # both, outside training
    drawn = [decide(context(train=True, key=jax.random.key(i)))[0] for i in range(400)]
    both = np.mean([np.asarray(d.selected).sum(-1) == 2 for d in drawn], axis=0)
    wanted = np.minimum(1, 2 * np.where(keep & ~first, g, 0).sum(-1))
    np.testing.assert_allclose(both[VALID], wanted[VALID], atol=0.11)  # 4.4 standard deviations at one half
    np.testing.assert_allclose(drawn[0].gates, np.where(np.asarray(drawn[0].selected), g, 0), atol=2e-6)


def test_logits_that_are_no_product():
    """G7 the cosine with its temperature, G10 the MLP and the attention over experts."""
    _, p, decide = made("nonlinear_topk", form="cosine", hidden=5, k=2)
    h = product(p["V"])
    unit = lambda v: v / np.linalg.norm(v, axis=-1, keepdims=True)  # noqa: E731
    z = np.einsum("bsh,eh->bse", unit(h), unit(p["W"])) / max(np.exp(p["log_tau"]), 0.01)
    keep = top(z, 2)
    same(decide()[0], softmax(np.where(keep, z, -np.inf)))
    longer = p | {"W": 3 * p["W"], "V": 0.5 * p["V"]}
    np.testing.assert_allclose(decide(leaves=longer)[0].gates, decide()[0].gates, atol=1e-6, err_msg="lengths")

    _, p, decide = made("nonlinear_topk", form="mlp", hidden=5, k=2)
    z = np.einsum("bsh,eh->bse", np.maximum(product(p["V"]) + p["b"], 0), p["W"]) + p["c"]
    same(decide()[0], softmax(np.where(top(z, 2), z, -np.inf)))

    _, p, decide = made("nonlinear_topk", form="attention", k=2)
    q, k, v = (product(p[name]) for name in ("W", "V", "U"))
    z = np.einsum("bsef,bsf->bse", softmax(q[..., :, None] * k[..., None, :]), v)
    same(decide()[0], softmax(np.where(top(z, 2), z, -np.inf)))


def by_codes(p, k, experts, gamma=1.0):
    """`(gates, mean entropy)` of DSelect-k."""
    m = max((experts - 1).bit_length(), 1)
    t = product(p["Z"]).reshape(B, S, k, m)
    step = np.clip(-2 * t**3 / gamma**3 + 3 * t / (2 * gamma) + 0.5, 0, 1)
    step = np.where(t <= -gamma / 2, 0, np.where(t >= gamma / 2, 1, step))
    r = np.ones((B, S, k, experts))
    for e, j in itertools.product(range(experts), range(m)):
        r[..., e] *= step[..., j] if e >> j & 1 else 1 - step[..., j]
    r /= np.maximum(r.sum(-1, keepdims=True), 1e-30)
    entropy = -(r * np.log(np.where(r > 0, r, 1))).sum(-1)
    return (softmax(product(p["W"]))[..., None] * r).sum(-2), entropy.mean(-1)


def test_dselect_k_is_smooth_and_of_k_experts_in_the_end():
    """G8, E no power of two; scaled up every selector is one expert."""
    _, p, decide = made("dselect_k", k=2)
    p = p | {"Z": 0.15 * p["Z"]}
    gates, entropy = by_codes(p, 2, E)
    decision = decide(leaves=p)[0]
    np.testing.assert_allclose(decision.gates, np.where(VALID[..., None], gates, 0), atol=2e-6)
    np.testing.assert_allclose(decision.cost, entropy, atol=2e-5)
    hard = decide(leaves=p | {"Z": 1e4 * p["Z"]})[0]
    assert (np.asarray(hard.selected).sum(-1) <= 2).all() and float(jnp.abs(hard.cost).max()) == 0
    grad = jax.jit(jax.grad(lambda Z: decide(leaves=p | {"Z": Z})[0].gates[..., 0].sum()))(
        jnp.asarray(p["Z"], jnp.float32)
    )
    assert np.abs(grad).max() > 1e-3


def test_null_experts_take_choices_and_do_nothing():
    """G9: 0 to K experts a token; gates over the true ones."""
    _, p, decide = made("null_experts", k=3, null=4)
    every = np.concatenate([product(p["W"]), product(p["W_null"])], axis=-1)
    keep, own = top(every, 3)[..., :E], softmax(every)[..., :E]
    raw = np.where(keep, own, 0)
    total = raw.sum(-1, keepdims=True)
    found = decide()[0]
    same(found, raw / np.where(total > 0, total, 1), keep)
    np.testing.assert_allclose(found.cost, 3 * own.sum(-1), rtol=1e-5)
    same(made("null_experts", k=3, null=4, renormalise=False)[2]()[0], raw, keep)
    many = decide(x=np.random.default_rng(3).standard_normal((B, S, D)).astype(np.float32) * 9)[0]
    counts = {int(n) for d in (found, many) for n in np.asarray(d.selected)[VALID].sum(-1)}
    assert {1, 2} <= counts <= {0, 1, 2, 3}


@pytest.mark.parametrize("by", ["max", "top2", "share"])
def test_group_limited_top_k(by):
    """G11 by a loop over tokens: DeepSeek-V2's, V3's and Megatron's group scores."""
    k = 2  # of one group of three: Megatron's share is 2 / 1
    _, p, decide = made("biased_topk", k=k, score="sigmoid", groups=2, keep_groups=1, group_score=by)
    s, keep = 1 / (1 + np.exp(-product(p["W"]))), np.zeros((B, S, E), bool)
    best = {"max": 1, "top2": 2, "share": k}[by]
    for at in itertools.product(range(B), range(S)):
        groups = [sorted(s[at][3 * g : 3 * g + 3])[::-1][:best] for g in range(2)]
        kept = sorted(range(2), key=lambda g: -sum(groups[g]))[:1]
        inside = [e for e in range(E) if e // 3 in kept]
        keep[at][sorted(inside, key=lambda e: -s[at][e])[:k]] = True
    same(decide()[0], np.where(keep, s, 0))
    assert (keep != top(s, 2)).any(), "the limit binds somewhere"


def test_groups_that_do_not_fit_are_refused_before_anything_is_compiled():
    for options, field in ((dict(groups=4), "groups"), (dict(groups=3, keep_groups=1, k=4), "keep_groups")):
        with pytest.raises(InputError, match=rf"router\.{field}"):
            compile_model(config("biased_topk", experts="6", **options), TINY)
    with pytest.raises(InputError, match=r"router\.tasks.*at least 9"):
        compile_model(config("task_gate", tasks=3), TINY)


def config(router, experts="4", source="random:tiny", **options):
    made = common.get_config()
    made.base.source = source
    made.method.rules = dict(
        mix=common.rule("q,o", experts=experts, adapter=common.adapter(rank=4, dropout=0.0),
                        router=dict(name=router, **options))
    )  # fmt: skip
    schema.validate(made)
    return made


def test_gates_of_tasks_and_of_sentences():
    """G12: a gate a task on the input (MMoE) or on the task alone; a pooled one a sentence (mean and max)."""
    _, p, decide = made("task_gate", tasks=3)
    z = np.einsum("bsd,ned->bsne", np.asarray(X, np.float64), p["W"])
    own = np.take_along_axis(z, (SEGMENTS % 2)[..., None, None], axis=2)[:, :, 0]
    same(decide()[0], softmax(own))
    same(decide(context(tasked=False))[0], softmax(z[:, :, :2].mean(axis=2)))  # of the run's two tasks
    _, p, decide = made("task_gate", on="id", k=2, tasks=3)
    c = p["c"][SEGMENTS % 2]
    same(decide()[0], softmax(np.where(top(c, 2), c, -np.inf)))
    for pool in ("mean", "max"):
        _, p, decide = made("sequence_gate", hard="never", pool=pool)
        z, want = product(p["W"]), np.zeros((B, S, E))
        for row, segment in itertools.product(range(B), (1, 2)):
            here = SEGMENTS[row] == segment
            want[row, here] = softmax(getattr(z[row, here], pool)(axis=0))
        same(decide()[0], want)


def test_prototypes_take_the_best_of_each_group():
    """G13: two independent top-1 routers over halves; five experts have groups of 3 and 2."""
    _, p, decide = made("prototypes", groups=2)
    z = product(p["W"])
    halves = [np.where(top(z[..., at], 1), softmax(z[..., at]), 0) for at in (slice(0, 3), slice(3, 6))]
    found = decide()[0]
    same(found, np.concatenate(halves, axis=-1))
    np.testing.assert_allclose(np.asarray(found.probs).sum(-1), 1, rtol=1e-6)
    five = jnp.arange(E) < 5
    parts = [softmax(z[..., at]) for at in (slice(0, 3), slice(3, 5))]
    same(decide(context(allowed=five))[0],
         np.concatenate([*(np.where(top(q, 1), q, 0) for q in parts), np.zeros((B, S, 1))], axis=-1))  # fmt: skip


def by_sinkhorn(z, iterations=20000):
    """Balanced `[T, E]` in float64: rows of 1, columns of T / E."""
    M = np.exp(z)
    for _ in range(iterations):
        M = M / M.sum(axis=1, keepdims=True)
        M = M * (len(M) / M.shape[1] / M.sum(axis=0))
        if np.abs(M.sum(axis=1) - 1).max() < 1e-12:
            break
    return M


def test_acceptance_5_sinkhorn_marginals():
    """G14: rows of 1 and columns of T / E within 1e-3, padding without a row; the choice in training is of them."""
    z = 2 * np.random.default_rng(4).standard_normal((64, E))
    there = np.arange(64) < 50
    Q = np.asarray(balanced(jnp.asarray(z, jnp.float32), jnp.asarray(there)[:, None], 100))
    np.testing.assert_allclose(Q.sum(1), there.astype(float), atol=1e-3)
    np.testing.assert_allclose(Q.sum(0), np.full(E, 50 / E), rtol=1e-3)
    np.testing.assert_allclose(Q[there], by_sinkhorn(z[there]), atol=1e-3)
    for values, value in (("softmax", softmax), ("sigmoid", SCORES["sigmoid"])):
        _, p, decide = made("sinkhorn", k=1, values=values)
        z, keep = product(p["W"]), np.zeros((B, S, E), bool)
        keep[VALID] = top(by_sinkhorn(z[VALID]), 1)
        same(decide(context(train=True))[0], np.where(keep, value(z), 0), keep)
        same(decide()[0], np.where(top(z, 1), value(z), 0))
        assert (keep != top(z, 1))[VALID].any(), "balance moved a choice"


def test_sinkhorn_in_use_reads_no_other_token():
    _, _, decide = made("sinkhorn", k=2)
    other = X.copy()
    other[:, 3:] = 5.0
    np.testing.assert_array_equal(decide()[0].gates[:, :3], decide(x=other)[0].gates[:, :3])


def test_relu_gates_and_their_controlled_cost():
    """G15, L12: f from the batch's counts, lambda by the sign of active - K; the straight-through gate of top-1."""
    router, p, decide = made("relu", k=2, start=0.3, factor=1.5)
    g = np.maximum(product(p["W"]), 0)
    decision, _, sums = decide()
    same(decision, g)
    f = E / 2 * (g[VALID] > 0).mean(axis=0)
    np.testing.assert_allclose(np.asarray(decision.cost)[VALID], 0.3 * (g * f).sum(-1)[VALID], rtol=1e-5)
    active = (g[VALID] > 0).sum(-1).mean()
    assert active > 2
    np.testing.assert_allclose(router.update({"lambda": jnp.float32(0.3)}, sums)["lambda"], 0.45, rtol=1e-6)
    few = {"count": jnp.ones(E), "tokens": jnp.float32(16)}
    np.testing.assert_allclose(router.update({"lambda": jnp.float32(0.3)}, few)["lambda"], 0.2, rtol=1e-6)

    _, p, decide = made("top1", straight_through=True)
    logits = lambda p: decide(leaves=p)[0].gates  # noqa: E731
    same(decide()[0], top(product(p["W"]) + p["b"], 1).astype(float))
    probe = np.random.default_rng(2).standard_normal((B, S, E))
    grad = jax.jit(jax.grad(lambda b: jnp.sum(logits(p | {"b": b}) * probe)))(jnp.asarray(p["b"], jnp.float32))
    z, steps = product(p["W"]), []
    for e in range(E):
        change = [np.where(top(z + p["b"], 1), softmax(z + p["b"] + s * np.eye(E)[e]), 0) for s in (1e-6, -1e-6)]
        steps.append((((change[0] - change[1]) * probe)[VALID]).sum() / 2e-6)
    np.testing.assert_allclose(grad, steps, rtol=1e-3, atol=1e-5)


def test_acceptance_5_hash_routing_is_independent_of_x():
    """G16: by token, task and both; random in training alone; a prompt without a task mixes all alike."""
    _, _, decide = made("fixed")
    one, other = decide()[0], decide(x=-3 * X)[0]
    np.testing.assert_array_equal(one.gates, other.gates)
    ids = jnp.arange(60_000).reshape(B, -1)
    wide = context(tokens=ids, valid=jnp.ones(ids.shape, bool), segment_ids=jnp.ones_like(ids))
    share = np.asarray(decide(wide, x=np.zeros((*ids.shape, D), np.float32))[0].gates).mean(axis=(0, 1))
    np.testing.assert_allclose(share, 1 / E, atol=0.006)
    alike = decide(context(tokens=jnp.full((B, S), 9)))[0].gates
    assert (np.asarray(alike).max(axis=(0, 1)) > 0).sum() == 1, "one token, one expert"
    task = made("fixed", by="task")[2]
    same(task()[0], np.eye(E)[SEGMENTS % 2])
    same(task(context(tasked=False))[0], np.full((B, S, E), 1 / E))
    group = np.asarray(made("fixed", by="task_token", groups=2)[2]()[0].gates)
    assert set(np.flatnonzero(group[(SEGMENTS % 2 == 1) & VALID].sum(0))) <= {3, 4, 5}
    assert set(np.flatnonzero(group[(SEGMENTS % 2 == 0) & VALID].sum(0))) <= {0, 1, 2}
    thor = made("fixed", by="none", random=1.0)[2]
    same(thor()[0], np.full((B, S, E), 1 / E))
    drawn = np.stack([thor(context(train=True, key=jax.random.key(i)))[0].gates for i in range(60)])
    assert (drawn[:, VALID].max(-1) == 1).all()
    np.testing.assert_allclose(drawn[:, VALID].mean(axis=(0, 1)), 1 / E, atol=0.06)


def test_acceptance_5_expert_choice_loads_exactly_c():
    """G17: every expert takes ceil(n k / E) tokens of each example, its best ones."""
    _, p, decide = made("expert_choice", k=2.0)
    probs, keep = softmax(product(p["W"])), np.zeros((B, S, E), bool)
    for row, segment, e in itertools.product(range(B), (1, 2), range(E)):
        here = np.flatnonzero(SEGMENTS[row] == segment)
        c = math.ceil(len(here) * 2 / E)
        keep[row, here[np.argsort(-probs[row, here, e], kind="stable")[:c]], e] = True
    found = decide()[0]
    same(found, np.where(keep, probs, 0))
    for row, segment in itertools.product(range(B), (1, 2)):
        n = (SEGMENTS[row] == segment).sum()
        loads = np.asarray(found.selected)[row][SEGMENTS[row] == segment].sum(0)
        assert (loads == math.ceil(n * 2 / E)).all()


def test_expert_choice_is_refused_where_the_base_predicts_the_next_token():
    with pytest.raises(InputError, match="depends on no later token") as error:
        compile_model(config("expert_choice"), TINY)
    assert error.value.where == "method.rules.mix.router.name"
    assert compile_model(config("expert_choice", source="random:tiny-bert"), TINY_BERT).rules[0].router.k == 2.0


def test_acceptance_6_merging_equal_experts_is_the_single_expert():
    """G19: gates of a whole example are one merged B A, and equal experts are one."""
    leaves, x = small.factors(4, 3), np.random.default_rng(0).standard_normal((10, 16)).astype(np.float32)
    adapter, w = small.lora(3, 6.0), np.array([0.4, 0.3, 0.2, 0.1], np.float32)
    alike = jax.tree.map(lambda v: jnp.broadcast_to(v[:1], v.shape), leaves)
    A, Bs = (np.asarray(leaves[n], np.float64) for n in "AB")
    merged = np.einsum("e,erd,ero->do", w, A, Bs)
    gates = jnp.broadcast_to(jnp.asarray(w), (10, 4))
    np.testing.assert_allclose(small.change(adapter, leaves, gates, x), 2 * x @ merged, rtol=1e-4, atol=1e-4)
    single = np.einsum("rd,ro->do", A[0], Bs[0])
    np.testing.assert_allclose(small.change(adapter, alike, gates, x), 2 * x @ single, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("capacity", [0.5, 1.0, 4 / 1])
def test_acceptance_7_capacity_drops_as_brute_force_says_the_first_tokens_first(capacity):
    """C slots a peer, by position; capacity >= E / K never drops."""
    T, K, experts, peers = 24, 2, 8, 4
    rng = np.random.default_rng(0)
    idx = np.stack([rng.permutation(5)[:K] for _ in range(T)])  # three experts that nobody wants
    rows = trips.rows_to_a_peer(T, K, experts, peers, capacity)
    plan = trips.make_plan(jnp.asarray(idx, jnp.int32), experts, peers, rows, padded=True)
    left, kept = dict.fromkeys(range(peers), max(1, int(capacity * T * K / peers + 0.5))), np.zeros((T, K), bool)
    for t, k in itertools.product(range(T), range(K)):
        peer = idx[t, k] // (experts // peers)
        kept[t, k] = left[peer] > 0
        left[peer] -= 1
    np.testing.assert_array_equal(plan.kept, kept)
    assert int(plan.dropped) == (~kept).sum() and (capacity >= experts / K) == (not (~kept).any())


# losses


def value(loss, logits, gates=None, ctx=None, **fields):
    """Of one router: `logits [B, S, E]`, gates the softmax of the K = 2 largest."""
    return _value(loss, jnp.asarray(logits, jnp.float32), gates, context() if ctx is None else ctx, fields)


@functools.partial(jax.jit, static_argnums=0)
def _value(loss, logits, gates, ctx, fields):
    probs = routing.softmax(logits, ctx.allowed)
    selected = routing.top_k(probs, 2)
    gates = jnp.where(selected, probs, 0.0) if gates is None else gates
    decision = routing.finish(gates, selected, logits, probs, ctx, k_max=E).replace(**fields)
    return loss.value({"r": {"s": {"q": jax.tree.map(lambda x: x[None], loss.stats(decision, ctx))}}})


def cv2(total):
    return total.var() / (total.mean() ** 2 + 1e-10)


Z = 1.5 * np.random.default_rng(8).standard_normal((B, S, E))


def test_importance_and_load():
    """L1, L2 and L9: padding of any size does not count; V-MoE's loss is half of each."""
    p = softmax(Z)
    g = np.where(top(p, 2), p, 0)
    np.testing.assert_allclose(value(LOSSES["importance"](), Z), cv2(g[VALID].sum(0)), rtol=1e-5)
    wild = np.where(VALID[..., None], Z, 40.0)
    np.testing.assert_allclose(value(LOSSES["importance"](), wild), cv2(g[VALID].sum(0)), rtol=1e-5)
    sample = g[VALID].sum(0).var(ddof=1) / g[VALID].sum(0).mean() ** 2
    np.testing.assert_allclose(value(LOSSES["importance"](variance="sample"), Z), sample, rtol=1e-5)
    P = np.random.default_rng(1).random((B, S, E))
    np.testing.assert_allclose(value(LOSSES["load"](), Z, reach=jnp.asarray(P)), cv2(P[VALID].sum(0)), rtol=1e-4)
    assert float(value(LOSSES["load"](), Z)) == 0, "a router without noise says nothing of it"


def test_acceptance_4_gradients_of_importance_and_load_are_those_of_differences():
    """Through the gates (L1), and through P, the noise and the threshold (L2), with the draws held."""
    _, p, decide = made("noisy_topk", k=2)
    ctx = context(train=True, key=jax.random.key(5))
    for name in ("importance", "load"):
        loss = LOSSES[name]()

        def of(W, loss=loss):
            decision = decide(ctx, leaves=p | {"W": W})[0]
            return loss.value({"r": {"s": {"q": jax.tree.map(lambda x: x[None], loss.stats(decision, ctx))}}})

        def oracle(W, name=name):
            _, gates, P = by_noise(p | {"W": W}, ctx.keyed(8), 2)
            return cv2((gates if name == "importance" else P)[VALID].sum(0))

        grad, at = np.asarray(jax.jit(jax.grad(of))(p["W"].astype(np.float32))), np.random.default_rng(0)
        assert np.abs(grad).max() > 1e-3
        for _ in range(3):
            way = at.standard_normal(p["W"].shape)
            step = (oracle(p["W"] + 1e-6 * way) - oracle(p["W"] - 1e-6 * way)) / 2e-6
            np.testing.assert_allclose((grad * way).sum(), step, rtol=2e-3, atol=1e-4)


def test_acceptance_4_load_biases_add_no_gradient():
    """L7: the choice is a constant; b is state, and no leaf."""
    router, p, decide = made("biased_topk", k=2, bias_rate=1e-3)
    assert set(p) == {"W"}
    total = lambda b: decide(context(state={"b": b}))[0].gates.sum()  # noqa: E731
    grad = jax.jit(jax.grad(total))(np.linspace(-1, 1, E, dtype=np.float32))
    assert not np.asarray(grad).any()
    sums = {"count": jnp.array([9.0, 3.0, 6.0, 6.0, 6.0, 6.0])}
    np.testing.assert_allclose(router.update({"b": jnp.zeros(E)}, sums)["b"], [-1e-3, 1e-3, 0, 0, 0, 0], atol=1e-9)


def test_quantile_balancing_reads_each_experts_own_column():
    """L7: b is minus the (1 - K/E)-quantile of a column, within a bin; with it every expert has its share above 0."""
    router, _, _ = made("biased_topk", k=2, score="sigmoid", bias="quantile", bias_rate=1.0)
    x = np.random.default_rng(6).standard_normal((1, 3000, D)).astype(np.float32)
    W = np.random.default_rng(7).standard_normal((E, D)) / 3 + np.linspace(-0.3, 0.3, E)[:, None]
    ctx = small.context(1, 3000, site=SITE, state={"b": jnp.zeros(E)})
    ctx = ctx.replace(valid=jnp.arange(3000)[None] < 2000)
    sums = small.routed(router, {"W": W.astype(np.float32)}, {}, x, ctx)[2]
    b = np.asarray(router.update({"b": jnp.zeros(E)}, sums)["b"])
    s = 1 / (1 + np.exp(-np.asarray(x[0, :2000], np.float64) @ W.T))
    np.testing.assert_allclose(b, -np.quantile(s, 1 - 2 / E, axis=0), atol=1 / 256 + 1e-3)
    with pytest.raises(InputError, match=r"router\.bias.*no upper end"):
        config("biased_topk", k=2, score="sqrt_softplus", bias="quantile")


def test_mutual_information_of_tokens_and_of_tasks():
    """L5, both forms."""
    p, tasks = softmax(Z)[VALID], (SEGMENTS % 2)[VALID]
    H = lambda q: -(q * np.log(q)).sum(-1)  # noqa: E731
    np.testing.assert_allclose(value(LOSSES["mutual_information"](), Z), -(H(p.mean(0)) - H(p).mean()), rtol=1e-4)
    joint = np.stack([p[tasks == i].sum(0) for i in range(2)]) / len(p)
    mi = (joint * np.log(joint / joint.sum(0) / joint.sum(1, keepdims=True))).sum()
    np.testing.assert_allclose(value(LOSSES["mutual_information"](between="task"), Z), -mi, rtol=1e-3)


def test_entropy_of_the_mean_is_held_above_tau():
    """L10: LIMoE's global loss, beside its local one (`entropy`)."""
    P = softmax(Z)[VALID].mean(0)
    H = -(P * np.log(P)).sum()
    np.testing.assert_allclose(value(LOSSES["mean_entropy"](), Z), np.log(E) - H, rtol=1e-4)
    assert float(value(LOSSES["mean_entropy"](tau=0.9 * H / np.log(E)), Z)) == 0


def test_device_and_communication_balance():
    """L6: groups of two experts; communication counts a token once a group, over M groups at most."""
    p, T = softmax(Z)[VALID], VALID.sum()
    keep = top(softmax(Z), 2)[VALID]
    sent = np.stack([keep[:, 2 * g : 2 * g + 2].any(1).sum() for g in range(3)])
    P = p.mean(0).reshape(3, 2).sum(1)
    loss = functools.partial(LOSSES["device_balance"], groups=3, counts="devices")
    np.testing.assert_allclose(value(loss(limit=2), Z), (3 / (2 * T) * sent * P).sum(), rtol=1e-5)
    np.testing.assert_allclose(value(loss(), Z), (3 / sent.sum() * sent * P).sum(), rtol=1e-5)
    f = keep.sum(0).reshape(3, 2).sum(1) * E / keep.sum() / 2
    np.testing.assert_allclose(value(LOSSES["device_balance"](groups=3), Z), (f * P).sum(), rtol=1e-5)


def test_what_routers_charge_as_it_is_and_held_to_a_target():
    """L12."""
    cost = np.random.default_rng(3).random((B, S)) * 4
    np.testing.assert_allclose(value(LOSSES["router_cost"](), Z, cost=jnp.asarray(cost)), cost[VALID].mean(), rtol=1e-5)
    held = value(LOSSES["router_cost"](target=3.0), Z, cost=jnp.asarray(cost))
    np.testing.assert_allclose(held, (cost[VALID].mean() - 3) ** 2, rtol=1e-5)
    assert float(value(LOSSES["router_cost"](target=3.0), Z)) == 0, "a router that charges nothing is left out"


def test_diversity_is_the_mean_squared_cosine_of_weight_changes():
    """L11, from the products B A themselves; one A for all experts too."""
    penalty = jax.jit(lambda tree: LOSSES["diversity"]().penalty(tree, {}))
    for shared in (False, True):
        rng = np.random.default_rng(1)
        A, Bs = rng.standard_normal((2, 1 if shared else 4, 3, 7)), rng.standard_normal((2, 4, 3, 5))
        whole = np.einsum("lerd,lero->ledo", np.broadcast_to(A, (2, 4, 3, 7)), Bs).reshape(2, 4, -1)
        unit = whole / np.linalg.norm(whole, axis=-1, keepdims=True)
        pairs = [(unit[:, e] * unit[:, f]).sum(-1) ** 2 for e, f in itertools.combinations(range(4), 2)]
        found = jax.jit(squared_cosines)(A.astype(np.float32), Bs.astype(np.float32))
        np.testing.assert_allclose(found.mean(), np.mean(pairs), rtol=1e-4)
        leaves = {"r": {"000-001": {"q": {"A": jnp.asarray(A, jnp.float32), "B": jnp.asarray(Bs, jnp.float32)}}}}
        np.testing.assert_allclose(penalty(leaves), np.mean(pairs), rtol=1e-4)
    still = {"r": {"000-001": {"q": {"A": jnp.ones((2, 4, 3, 7)), "B": jnp.zeros((2, 4, 3, 5))}}}}
    slope = jax.jit(jax.grad(penalty))(still)
    assert all(not np.asarray(v).any() for v in jax.tree.leaves(slope)), "B = 0: no slope, and no NaN"
    alone = {"r": {"s": {"q": {"A": jnp.ones((2, 1, 3, 7)), "B": jnp.ones((2, 1, 3, 5))}}}}
    with pytest.raises(InputError, match="trained A and B of several experts"):
        LOSSES["diversity"]().penalty(alone, {})


def test_acceptance_2_uniform_and_one_hot_routing():
    """L1 = L2 = 0, L3 = 1, L4 = (log E)^2, L5 = 0, L6 = 1 where all is alike; L5 = -log E where balanced and sure."""
    T = 2 * E
    picked = np.zeros((1, T, E), bool)
    for t in range(T):
        picked[0, t, [t % E, (t + 3) % E]] = True
    uniform, zeros = np.full((1, T, E), 1 / E, np.float32), np.zeros((1, T, E), np.float32)
    ctx = small.context(1, T, tasks=("a",))

    @functools.partial(jax.jit, static_argnums=0)
    def found(loss, probs, z, selected):
        made = routing.finish(jnp.where(selected, 0.5, 0.0), selected, z, probs, ctx, k_max=2).replace(reach=probs)
        return loss.value({"r": {"s": {"q": jax.tree.map(lambda x: x[None], loss.stats(made, ctx))}}})

    def of(loss, probs=uniform, selected=picked):
        return float(found(loss, probs, zeros, selected))

    wanted = dict(importance=0, load=0, balance=1, z_loss=np.log(E) ** 2, mutual_information=0, mean_entropy=0)
    for name, value in wanted.items():
        assert of(LOSSES[name]()) == pytest.approx(value, abs=1e-6), name
    assert of(LOSSES["device_balance"](groups=3)) == pytest.approx(1, abs=1e-6)
    assert of(LOSSES["device_balance"](groups=3, counts="devices", limit=2)) == pytest.approx(1, abs=1e-6)
    hot = np.eye(E, dtype=np.float32)[np.arange(T) % E][None]
    assert of(LOSSES["mutual_information"](), probs=hot) == pytest.approx(-np.log(E), abs=1e-6)
    pair = np.zeros((1, T, E), bool)
    pair[..., :2] = True
    assert of(LOSSES["importance"](), selected=pair) == pytest.approx(E / 2 - 1, rel=1e-5)  # all to K of E


MANY = dict(  # what is of the whole batch: noise, a load, balanced choices, histograms
    q=dict(name="noisy_topk", k=2), k=dict(name="relu", k=1, start=0.1), v=dict(name="sinkhorn", k=1),
    o=dict(name="biased_topk", k=2, score="sigmoid", bias="quantile", bias_rate=0.5, groups=2, keep_groups=1),
)  # fmt: skip
REST = dict(
    q=dict(name="task_gate"), k=dict(name="nonlinear_topk"), v=dict(name="prototypes"),
    o=dict(name="controlled_threshold"), gate=dict(name="fixed"), up=dict(name="null_experts"),
    down=dict(name="dselect_k"),
)  # fmt: skip


def many(routers):
    made = common.get_config()
    made.method.rules = {
        site: common.rule(site, experts="4", adapter=common.adapter(rank=4, dropout=0.0), router=router)
        for site, router in routers.items()
    }
    losses = dict(
        importance=dict(weight=0.1), mutual_information=dict(between="task"),
        mean_entropy=dict(weight=0.1), router_cost=dict(weight=1.0), z_loss=dict(weight=1e-3),
        device_balance=dict(groups=2, counts="devices"), balance=common.balance(),
    )  # fmt: skip
    if "noisy_topk" in {router["name"] for router in routers.values()}:  # which alone has a load
        losses["load"] = dict(weight=0.1)
    made.losses = losses
    return changed(made, {"base.source": "random:tiny", "optim.warmup": 0})


@pytest.mark.parametrize(
    "routers, keep_state", [(MANY, {"k", "o"}), pytest.param(REST, {"o"}, marks=pytest.mark.slow)], ids=["many", "rest"]
)
def test_acceptance_8_gates_losses_and_state_are_equal_on_1_and_8_devices(routers, keep_state):
    """Training noise, balanced choices and statistics are of the whole batch; state moves once a step."""
    one, eight = Case(many(routers)), Case(many(routers), mesh=mesh8())
    before = jax.device_get(one.start().router_state)
    after, metrics, gradients = one.run(one.start())
    after8, metrics8, gradients8 = eight.run(one.start())
    same_step(metrics, gradients, metrics8, gradients8, atol=2e-7)  # mutual information: entropies near 1, subtracted
    assert {"aux/router_cost", "aux/mean_entropy"} <= metrics.keys()
    assert routers is REST or float(metrics["aux/load"]) > 0
    moved, moved8 = (jax.device_get(s.router_state) for s in (after, after8))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), moved, moved8)
    assert set(moved) == keep_state
    for rule in moved:
        pairs = zip(*map(jax.tree.leaves, (before[rule], moved[rule])), strict=True)
        assert any((np.asarray(a) != b).any() for a, b in pairs)


def test_a_decision_counts_no_padding():
    """What stands at padding changes neither a choice elsewhere nor what leaves a router as sums."""
    wild = np.where(VALID[..., None], X, 50.0).astype(np.float32)
    for name in ("noisy_topk", "nonlinear_topk", "dselect_k", "null_experts", "prototypes", "sinkhorn", "relu", "fixed",
                 "task_gate", "expert_choice", "controlled_threshold"):  # fmt: skip
        decide = made(name)[2]
        for ctx in (context(), context(train=True, key=jax.random.key(1))):
            (a, _, sums), (b, _, others) = decide(ctx), decide(ctx, x=wild)
            np.testing.assert_allclose(a.gates, b.gates, atol=1e-6, err_msg=name)
            jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), sums, others)


def test_a_threshold_that_a_controller_leads():
    """L12: experts above tau and the best one; tau moves by the error and its change, and stays in [0, 1]."""
    router, p, decide = made("controlled_threshold", k=2.0, kp=0.1, ki=0.05)
    probs, state = softmax(product(p["W"])), {"tau": jnp.float32(0.3), "error": jnp.float32(0.5)}
    keep = (probs >= 0.3) | top(probs, 1)
    decision, _, sums = decide(context(state=state))
    same(decision, np.where(keep, probs, 0) / np.where(keep, probs, 0).sum(-1, keepdims=True))
    error = keep[VALID].sum(-1).mean() - 2
    new = router.update(state, sums)
    np.testing.assert_allclose(new["tau"], 0.3 + 0.1 * (error - 0.5) + 0.05 * error, rtol=1e-5)
    np.testing.assert_allclose(new["error"], error, rtol=1e-5)
    x = np.random.default_rng(5).standard_normal((B, S, D)).astype(np.float32)
    state = router.init_state(SITE)
    for _ in range(60):
        sums = decide(context(state=state), x=x)[2]
        state = router.update(state, sums)
    assert abs(float(sums["count"].sum() / sums["tokens"]) - 2) < 0.3
