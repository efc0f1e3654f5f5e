"""MoLA (arXiv 2402.08562): its acceptance list."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from launch import flags
from molora_jax.backbones.compile import compile_model
from molora_jax.backbones.llama import Llama
from molora_jax.catalogue.methods import METHODS
from molora_jax.core import routing
from molora_jax.core.trees import count
from molora_jax.core.types import Context
from molora_jax.evaluation.redundancy import expert_redundancy
from molora_jax.losses.balance import Balance
from tests.acceptance.blocks import ALL, ONE, VALID, edit, gradient, model, noisy, output
from tests.battery import reference
from tests.battery.cases import BATCH, DEEP, ROOT, base

LLAMA2_7B = Llama(
    family="llama", layers=32, width=4096, ffn_width=11008, heads=32, kv_heads=32, head_dim=128, vocab=32000,
    context=4096, rope_base=10000.0, norm_eps=1e-5, tied=False,
)  # fmt: skip
SHAPES = ("2|4|6|8", "8|6|4|2", "2|8|8|2", "8|2|2|8", "5|5|5|5")  # digits run from low to high layers


def test_acceptance_1_one_expert_is_plain_lora():
    mixture, plain = model(ALL, 1, ("softmax_topk", dict(k=1))), model(ALL, 1)
    adapters = noisy(mixture)
    alone = edit(adapters)
    del alone["mix"]["000-000"]["router"]
    np.testing.assert_allclose(output(mixture, adapters), output(plain, alone), atol=1e-6)


def test_acceptance_2_all_experts_at_equal_logits_are_the_mean_of_their_deltas():
    mixture, one = model(("up",), 4, ("softmax_topk", dict(k=4))), model(("up",), 1, rank=12)
    adapters = edit(noisy(mixture), W=lambda x, s: 0 * x)
    leaves = adapters["mix"]["000-000"]["up"]
    # the mean of four rank-3 products is one of rank 12, at alpha / 12 instead of alpha / 3: the same factor 1/4
    wide = {leaf: leaves[leaf].reshape(1, 1, 12, -1) for leaf in ("A", "B")}
    np.testing.assert_allclose(output(mixture, adapters), output(one, {"mix": {"000-000": {"up": wide}}}), atol=1e-5)


def parameters(decoder, experts):
    config = flags.load(ROOT / METHODS["mola"].config)
    config.method.rules.all.experts = experts
    made = compile_model(config, decoder)
    params = {"blocks": {}}
    for path, leaf in decoder.shapes().items():
        if path.endswith("/kernel"):
            kernel = jax.ShapeDtypeStruct(leaf.shape, jnp.float32)
            params["blocks"][path.split("/")[1]] = {"kernel": kernel}
    return count(jax.eval_shape(made.init_adapters, jax.random.key(0), params))


@pytest.mark.parametrize("experts", SHAPES)
def test_acceptance_3_equal_sums_have_equal_counts(experts):
    assert parameters(LLAMA2_7B, experts) == 105_635_840
    assert METHODS["mola"].params(LLAMA2_7B) == 105_635_840


def test_acceptance_3_other_sums_scale_with_them():
    assert parameters(LLAMA2_7B, "4|4|4|4") * 20 == 105_635_840 * 16
    assert parameters(LLAMA2_7B, "8|8|8|8") * 20 == 105_635_840 * 32


@pytest.mark.parametrize("sites", [ALL, ("ffn",)], ids=["projection", "ffn"])
def test_acceptance_4_padded_experts_change_nothing(sites):
    """Three experts, and the same three among five of which two are shut out: outputs, gradients, loss with N = 3."""
    router = ("softmax_topk", dict(k=2))
    small, wide = model(sites, 3, router), model(sites, 5, router)
    loss = ("balance", Balance(weight=1.0, over="layer", reduce="sum"))
    small, wide = (dataclasses.replace(m, losses=(loss,)) for m in (small, wide))
    adapters = noisy(wide)
    cut = lambda x, s: x[:, :3]  # noqa: E731
    few = edit(adapters, A=cut, B=cut, W=cut)
    shut = dict(BATCH, allowed=jnp.arange(5) < 3)
    np.testing.assert_allclose(output(small, few), output(wide, adapters, shut), atol=1e-6)
    probe = np.random.default_rng(2).standard_normal((*VALID.shape, ONE.width)).astype(np.float32) * VALID[..., None]

    def objective(m, a, b):
        hidden, stats, _, _ = m.hidden(base(ONE), a, {}, b)
        sums = {"mix": {s: {k: v["losses"]["balance"] for k, v in sc.items()} for s, sc in stats["mix"].items()}}
        value = m.losses[0][1].value(sums)
        return (hidden * probe).sum() + value, value

    (_, a), g_small = jax.jit(jax.value_and_grad(lambda x: objective(small, x, BATCH), has_aux=True))(few)
    (_, b), g_wide = jax.jit(jax.value_and_grad(lambda x: objective(wide, x, shut), has_aux=True))(adapters)
    np.testing.assert_allclose(a, b, rtol=1e-6)
    largest = max(np.abs(x).max() for x in jax.tree.leaves(g_small))
    check = lambda x, y: np.testing.assert_allclose(y[:, :3], x, rtol=1e-5, atol=1e-6 * largest)  # noqa: E731
    jax.tree.map(check, g_small, g_wide)
    assert all(not np.any(x[:, 3:]) for x in jax.tree.leaves(g_wide)), "padded experts get no gradient"


def test_acceptance_5_selected_weights_sum_to_one_and_modules_choose_apart():
    mixture = model(ALL, 4, ("softmax_topk", dict(k=2)))
    adapters = noisy(mixture)
    gates = mixture.hidden(base(ONE), adapters, {}, BATCH, collect=True)[3]["mix"]["000-000"]
    assert set(gates) == set(ALL)
    for g in gates.values():
        np.testing.assert_allclose(np.asarray(g)[0][VALID].sum(-1), 1.0, atol=1e-6)
        assert ((np.asarray(g)[0][VALID] > 0).sum(-1) == 2).all()
    q, k = (np.asarray(gates[s])[0][VALID] > 0 for s in "qk")
    assert (q != k).any(axis=-1).mean() > 0.2, "q and k read the same input through routers of their own"


def test_acceptance_6_layer_loss_is_one_at_uniform_and_n_over_k_at_collapse():
    """Joined over a layer's modules, with the layer's own N, summed over layers."""
    T, K = 48, 2
    loss = Balance(over="layer", reduce="sum")
    value = jax.jit(loss.value)
    ids = jnp.ones((1, T), jnp.int32)
    ctx = Context(ids > 0, *[ids] * 4, max_segments=1)

    @jax.jit
    def stats(z, selected):
        probs = jax.nn.softmax(z, axis=-1)
        made = routing.finish(probs, selected, z, probs, ctx, k_max=K)
        return jax.tree.map(lambda x: x[None], loss.stats(made, ctx))

    def layer(N, collapsed):
        spread = (np.arange(T)[:, None] + np.arange(K)) % N
        chosen = np.zeros((T, K), int) + np.arange(K) if collapsed else spread
        selected = (np.eye(N)[chosen] > 0).any(axis=1)[None]
        return dict.fromkeys(ALL, stats(np.float32(50 * selected * collapsed), selected))

    for N in (2, 4, 8):
        assert float(value({"all": {"000-000": layer(N, False)}})) == pytest.approx(1.0)
        assert float(value({"all": {"000-000": layer(N, True)}})) == pytest.approx(N / K)
    both = {"all": {"000-000": layer(4, True), "001-001": layer(8, True)}}
    assert float(value(both)) == pytest.approx(4 / K + 8 / K)


def test_acceptance_7_redundancy_of_experts():
    mixture = model(("q", "down"), (2, 4, 4, 1), ("softmax_topk", dict(k=1)), decoder=DEEP)
    assert [s.name for s in mixture.segments] == ["000-000", "001-002", "003-003"]
    adapters = noisy(mixture)
    measured = expert_redundancy(adapters)["mix"]
    assert set(measured) == {0, 1, 2}, "one expert has no pair"
    assert set(measured[1]) == {"q/A", "q/B", "down/A", "down/B"}
    B = adapters["mix"]["001-002"]["down"]["B"][1]
    pairs = [np.linalg.norm(B[i] - B[j]) for i in range(4) for j in range(i)]
    np.testing.assert_allclose(measured[2]["down/B"], np.mean(pairs), rtol=1e-6)

    same = lambda x, s: np.broadcast_to(x[:, :1], x.shape)  # noqa: E731
    equal = expert_redundancy(edit(adapters, "001-002", A=same, B=same))["mix"]
    assert all(v == 0 for layer in equal.values() for v in layer.values())
    shuffled = expert_redundancy(edit(adapters, "001-002", A=lambda x, s: x[:, [2, 0, 3, 1]]))["mix"]
    np.testing.assert_allclose(shuffled[1]["q/A"], measured[1]["q/A"], rtol=1e-12)
    grown = expert_redundancy(edit(adapters, "001-002", B=lambda x, s: 2 * x))["mix"]
    np.testing.assert_allclose(grown[1]["q/B"], 2 * measured[1]["q/B"], rtol=1e-12)


def test_trap_a_router_a_block_is_another_method():
    """Shared over the attention sub-block, q and k cannot choose apart: that is not MoLA."""
    one = model(("q", "k"), 4, ("softmax_topk", dict(k=2, share="attn")))
    own = model(("q", "k"), 4, ("softmax_topk", dict(k=2)))
    assert one.rules[0].scopes == ("attn",) and own.rules[0].scopes == ("q", "k")
    assert flags.load(ROOT / METHODS["mola"].config).method.rules.all.router.share == "site"


def test_regrouped_layers_with_other_counts_equal_the_naive_form():
    """2-4-6-8 in four segments, value and gradients by layer."""
    mixture = model(ALL, (2, 3, 4, 5), ("softmax_topk", dict(k=2)), decoder=DEEP)
    adapters = noisy(mixture)
    wanted, _ = reference.forward(np, mixture, *map(reference.as_float64, (base(DEEP), adapters)), BATCH)
    np.testing.assert_allclose(output(mixture, adapters), wanted[VALID], rtol=1e-5, atol=2e-5)
    assert {name: g["q"]["A"].shape[1] for name, g in gradient(mixture, adapters)["mix"].items()} == {
        "000-000": 2, "001-001": 3, "002-002": 4, "003-003": 5
    }  # fmt: skip
