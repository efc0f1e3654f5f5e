"""LoRA-FA, arXiv 2308.03303: items 1 and 2 of the baselines' list, and peft's optimizer as an option."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict

from molora_jax.adapters.lora_fa import LoraFA
from molora_jax.core import trees
from molora_jax.core.types import Site
from tests.acceptance.baselines import PEFT, logits, stacked
from tests.acceptance.blocks import ALL, gradient, model, noisy, output


def test_acceptance_1_the_start_changes_nothing_and_an_a_is_drawn_for_each_expert():
    made = model(ALL, 3, ("softmax_topk", dict(k=2)), adapter="lora_fa")
    leaves = LoraFA(rank=4).init_leaves(jax.random.key(0), Site("q", 20, 14, (0,), 3), 0)
    assert not leaves["B"].any() and np.abs(leaves["A"]).max() <= 20**-0.5
    assert np.abs(leaves["A"][0] - leaves["A"][1]).max() > 0.1
    trainable, fixed = (flatten_dict(x, sep="/") for x in trees.split(noisy(made), made.frozen_patterns()))
    assert {path.rpartition("/")[2] for path in trainable} == {"B", "W"}
    assert {path.rpartition("/")[2] for path in fixed} == {"A"}


def test_acceptance_2_pefts_logits():
    """LoRA's own in peft: freezing changes no value."""
    leaves = lambda site: {  # noqa: E731
        "A": stacked("lora", site, "lora_A.weight"), "B": stacked("lora", site, "lora_B.weight", lambda x: x.T[None]),
    }  # fmt: skip
    got = logits("lora_fa", ALL, leaves, rank=3, alpha=6.0, precondition=True)
    np.testing.assert_allclose(got, PEFT["lora/logits"], atol=1e-4)


def test_the_preconditioned_step_is_pefts():
    """Three steps of Adam on given gradients; eps 1e-6 as there."""
    adapter, A = LoraFA(rank=3, alpha=6.0, precondition=True), jnp.asarray(PEFT["lora_fa/A"])[None]
    B, adam = jnp.zeros((1, 3, 7)), optax.adam(1e-2, eps=1e-6)
    state = adam.init(B)

    @jax.jit
    def step(B, state, G):
        g = jax.jit(jax.grad(lambda B: jnp.sum(adapter.factors({"A": A, "B": B}, {}, None).B * G)))(B)
        updates, state = adam.update(g, state)
        return B + updates, state

    for i, G in enumerate(PEFT["lora_fa/gradient"]):
        B, state = step(B, state, G.T[None])
        np.testing.assert_allclose(B[0].T, PEFT[f"lora_fa/B/{i}"], rtol=1e-3, atol=1e-6)


def test_the_preconditioned_gradient_is_each_experts_own():
    plain, made = (
        model(("q",), 3, ("softmax_topk", dict(k=2)), adapter="lora_fa", precondition=p) for p in (False, True)
    )
    adapters = noisy(made)
    np.testing.assert_array_equal(output(made, adapters), output(plain, adapters))
    before, after = (gradient(m, adapters)["mix"]["000-000"]["q"]["B"][0] for m in (plain, made))
    A, s = np.asarray(adapters["mix"]["000-000"]["q"]["A"][0], np.float64), made.rules[0].adapter.scale()
    for e in range(3):
        wanted = np.linalg.inv(A[e] @ A[e].T + 1e-8 * np.eye(3)) @ before[e] / s**2
        np.testing.assert_allclose(after[e], wanted, rtol=1e-3, atol=1e-5 * np.abs(wanted).max())
