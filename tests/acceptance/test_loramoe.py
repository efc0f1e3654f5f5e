"""LoRAMoE: the acceptance list of its specification, item by item (the numbers are the list's)."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from molora_jax import sharding
from molora_jax.errors import InputError
from molora_jax.losses import LOSSES
from molora_jax.routers import ROUTERS
from tests.acceptance import small

LOSS = LOSSES["localized_balance"]
DENSE = ROUTERS["softmax_topk"](k=0)
TASKS = ("other", "facts")


def decide(z):
    """`z [M, S, E]` logits -> the dense decision, one example a row."""
    return small.routed(DENSE, {"W": jnp.eye(z.shape[-1])}, {}, z, context(z))[0]


def context(z, **changes):
    """The first half of the examples is of type "facts" (world), the other of "other"."""
    M, S, _ = z.shape
    tasks = jnp.broadcast_to((jnp.arange(M) < M // 2).astype(jnp.int32)[:, None], (M, S))
    return small.context(M, S, tasks=TASKS, task_ids=tasks, **changes)


def value(z, changes=(), **options):
    loss, ctx = LOSS(world="facts", **options), context(z, **dict(changes))
    decision = small.routed(DENSE, {"W": jnp.eye(z.shape[-1])}, {}, z, ctx)[0]
    return small.loss_value(loss, decision, ctx)


def expected(Q, world, delta, variant, invert=False):
    """By the formula, entry by entry, in float64. `Q [M, E]`."""
    M, E = Q.shape
    Z = [
        Q[m, n] * (1 + delta if (world[m] == (n < E // 2)) != invert else 1 - delta) for m in range(M) for n in range(E)
    ]
    var = np.var(Z, ddof=1)
    return var / (np.mean(Z) ** 2 + 1e-10) if variant == "code" else var / np.mean(Z)


def random_logits(M=4, S=5, E=6, seed=0):
    return jax.device_put(np.float32(np.random.default_rng(seed).standard_normal((M, S, E))))


def test_acceptance_1_equal_gates_are_the_average_of_the_experts():
    leaves, x = small.factors(6, 4), jax.device_put(np.float32(np.random.default_rng(0).standard_normal((7, 16))))
    gates = decide(jnp.zeros((1, 7, 6))).gates[0]
    each = [small.change(small.lora(4, 32.0), small.factors(6, 4), jnp.eye(6)[jnp.full(7, e)], x) for e in range(6)]
    np.testing.assert_allclose(small.change(small.lora(4, 32.0), leaves, gates, x), np.mean(each, axis=0), atol=1e-5)


def test_acceptance_2_one_expert_is_plain_lora():
    leaves, x = small.factors(1, 4), jax.device_put(np.float32(np.random.default_rng(0).standard_normal((7, 16))))
    gates = decide(jnp.ones((1, 7, 1))).gates[0]
    want = 32.0 / 4 * (x @ leaves["A"][0].T) @ leaves["B"][0]
    np.testing.assert_allclose(small.change(small.lora(4, 32.0), leaves, gates, x), want, rtol=1e-4, atol=1e-4)


def test_acceptance_3_the_stacked_form_is_the_loop():
    leaves, x = small.factors(6, 4), jax.device_put(np.float32(np.random.default_rng(0).standard_normal((7, 16))))
    gates = decide(random_logits(1, 7)).gates[0]
    A, B = np.concatenate(leaves["A"]), np.concatenate(leaves["B"])  # [E R, D]
    stacked = (np.repeat(gates, 4, axis=1) * (x @ A.T)) @ B * 8
    loop = sum(8 * gates[:, e : e + 1] * ((x @ leaves["A"][e].T) @ leaves["B"][e]) for e in range(6))
    got = small.change(small.lora(4, 32.0), leaves, gates, x)
    np.testing.assert_allclose(got, loop, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(got, stacked, rtol=1e-4, atol=1e-4)
    assert decide(random_logits()).selected.all()


def test_acceptance_4_equal_Q():
    z, M, E = jnp.zeros((4, 5, 6)), 4, 6
    np.testing.assert_allclose(value(z, delta=0.0), 0, atol=1e-10)
    for d in (0.1, 0.3):
        np.testing.assert_allclose(value(z, delta=d), d**2 * M * E / (M * E - 1), rtol=1e-5)


def test_acceptance_4_one_entry_is_0_and_random_Q_follows_the_formula():
    world = np.arange(4) < 2
    for variant in ("code", "paper"):
        for invert in (False, True):
            z = random_logits()
            Q = np.asarray(jax.nn.softmax(z)).sum(1)
            got = value(z, delta=0.2, variant=variant, invert_type=invert)
            np.testing.assert_allclose(got, expected(Q.astype(np.float64), world, 0.2, variant, invert), rtol=1e-5)
    spread = LOSS()._spread(jnp.ones((1, 1, 1)), jnp.ones((1, 1, 1)), jnp.ones((1, 1)))
    assert float(spread) == 0


@pytest.mark.parametrize("variant", ["code", "paper"])
@pytest.mark.parametrize("invert", [False, True])
def test_acceptance_5_the_minimum_is_Q_proportional_to_one_over_I(variant, invert):
    """And so the direction: an example's matching half of the experts gets the lower gates, whatever the names say."""
    d, E, start = 0.3, 6, random_logits(4, 1)
    optimizer = optax.adam(0.05)

    @jax.jit
    def descend(z):
        def step(loop, _):
            z, state = loop
            g = jax.grad(lambda z: value(z, delta=d, variant=variant, invert_type=invert))(z)
            updates, state = optimizer.update(g, state)
            return (z + updates, state), None

        return jax.lax.scan(step, (z, optimizer.init(z)), None, length=600)[0][0]

    z = descend(start)
    assert float(value(z, delta=d, variant=variant, invert_type=invert)) < 1e-5
    gates = jax.nn.softmax(z)[:, 0]
    low, high = (1 - d) / E, (1 + d) / E  # 0.117 and 0.217
    first = np.where((np.arange(4) < 2)[:, None] != invert, low, high)  # the first half matches the world examples
    np.testing.assert_allclose(gates[:, :3], np.broadcast_to(first, (4, 3)), atol=2e-3)
    np.testing.assert_allclose(gates[:, 3:], np.broadcast_to(low + high - first, (4, 3)), atol=2e-3)


def test_acceptance_6_scale_invariance_of_the_code_variant_only():
    Q = jax.device_put(np.float32(np.random.default_rng(0).uniform(1, 2, (2, 2, 6))))
    factor, tokens = jnp.where(jnp.arange(6) < 3, 1.1, 0.9) * jnp.ones_like(Q), jnp.ones((2, 2))
    for variant, power in (("code", 0), ("paper", 1)):
        loss = LOSS(variant=variant)
        one, ten = (loss._spread(c * Q, factor, tokens) for c in (1.0, 10.0))
        np.testing.assert_allclose(ten, one * 10**power, rtol=1e-5)


def step_gradient(weight, remove=False):
    model, params, adapters, state = small.build("loramoe", losses__localized_balance__weight=weight)
    data = small.batch()

    def loss(a):
        nll, stats = small.lm_loss(model, params, a, state, data)
        member = dict(model.losses)["localized_balance"]
        sums = {r: {s: {k: v["losses"]["localized_balance"] for k, v in sc.items()} for s, sc in seg.items()}
                for r, seg in stats.items()}  # fmt: skip
        return nll if remove else nll + member.weight * member.value(sums)

    return jax.jit(jax.grad(loss))(adapters)


def test_acceptance_7_weight_0_is_the_plain_dense_mixture():
    off, none, on = step_gradient(0.0), step_gradient(0.0, remove=True), step_gradient(0.1)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), off, none)
    for site in ("gate", "up", "down"):
        leaf = lambda g, site=site: np.asarray(g["ffn"]["000-001"]["router"][site]["W"])  # noqa: E731
        assert np.abs(leaf(on) - leaf(off)).max() > 1e-4


def test_acceptance_8_the_variance_is_of_the_global_batch():
    model, params, adapters, state = small.build("loramoe")
    data, member = small.batch(), dict(model.losses)["localized_balance"]

    def loss(a, data):
        stats = small.lm_loss(model, params, a, state, data)[1]["ffn"]
        return member.value({"ffn": {s: {k: v["losses"]["localized_balance"] for k, v in scopes.items()}
                                     for s, scopes in stats.items()}})  # fmt: skip

    one = jax.jit(jax.value_and_grad(loss))
    mesh = sharding.make_mesh(dict(data=2, fsdp=1, expert=1, tensor=1), jax.devices()[:2])
    split = sharding.put_batch(data, mesh, small.B)
    two = jax.jit(jax.value_and_grad(loss), out_shardings=sharding.replicated(mesh))
    (v1, g1), (v2, g2) = one(adapters, data), two(adapters, split)
    np.testing.assert_allclose(v1, v2, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), g1, g2)
    halves = [loss(adapters, {n: x[rows] for n, x in data.items()}) for rows in (slice(0, 2), slice(2, 4))]
    assert abs(np.mean(halves) / v1 - 1) > 1e-3, "the mean over devices is another value"


def test_padding_and_absent_examples_are_no_entries():
    z = random_logits()
    padded = jnp.concatenate([z, 7 + random_logits(4, 3, seed=1)], axis=1)
    segment = jnp.concatenate([jnp.ones((4, 5), jnp.int32), jnp.zeros((4, 3), jnp.int32)], axis=1)
    changes = dict(segment_ids=segment, valid=segment > 0, max_segments=3)
    np.testing.assert_allclose(value(padded, changes), value(z), rtol=1e-5)


def test_per_token_takes_out_unequal_lengths():
    """Equal gates and delta 0: only the lengths, 2 and 8, differ."""
    segment = jnp.array([[1] * 2 + [0] * 6, [1] * 8], jnp.int32)
    changes = dict(segment_ids=segment, valid=segment > 0)
    z = jnp.zeros((2, 8, 6))
    assert float(value(z, changes, delta=0.0)) > 0.3
    np.testing.assert_allclose(value(z, changes, delta=0.0, per_token=True), 0, atol=1e-8)


def test_an_unknown_task_is_named():
    with pytest.raises(InputError, match="world.*'facts'"):
        small.config("loramoe", losses__localized_balance__world="facts")
