"""FFA-LoRA (ICLR 2024): what the paper promises, a test each, by the numbers of the acceptance list.

8 (clients side by side are a loop over clients) is in `tests/regimes/test_federated.py`.
"""

import dataclasses
import importlib
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from molora_jax import config as config_lib
from molora_jax.backbones.compile import compile_model
from molora_jax.catalogue.organised import ORGANISED
from molora_jax.core import accountant, trees
from molora_jax.core.privacy import Private
from molora_jax.objectives import OBJECTIVES
from molora_jax.optim import OPTIMIZERS
from molora_jax.training.step import TrainState, make_gradient, make_step
from tests.acceptance.helpers import SMALL, S, base, batch, randomised, rules_config
from tests.battery.cases import fresh_adapters
from tests.regimes import small

ONE = dataclasses.replace(SMALL, layers=1)
FED = dict(name="federated", clients=3, local_steps=2, split="iid")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return small.write(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def ffa(data, tmp_path_factory):
    """FFA-LoRA with DP noise, two rounds of three clients; a step after every turn."""
    workdir = tmp_path_factory.mktemp("ffa")
    small.start(small.config(data, regime=FED | small.DP, freeze="*/A"), workdir)
    return workdir


def products(tree, weights):
    """`(mean(B) mean(A), mean(B A))` of clients' `A [N, L, E, R, D]`, `B [N, L, E, R, O]`."""
    A, B = (tree[f"adapters/all/000-003/q/{leaf}"].astype(np.float64) for leaf in "AB")
    mean = lambda x: np.tensordot(weights, x, 1)  # noqa: E731
    return np.einsum("lerd,lero->ledo", mean(A), mean(B)), mean(np.einsum("nlerd,nlero->nledo", A, B))


def gap(workdir):
    of_means, of_products = products(small.arrays(workdir, 9, "clients"), np.ones(3) / 3)
    return np.abs(of_means - of_products).max() / np.abs(of_products).max()


def test_1_the_mean_of_the_factors_is_the_mean_of_the_products(ffa):
    assert gap(ffa) < 1e-6


@pytest.mark.slow
def test_1_and_it_is_not_where_A_trains(data, tmp_path):
    small.start(small.config(data, regime=FED, optim="adamw"), tmp_path)
    assert gap(tmp_path) > 1e-3
    assert any(path.endswith("/A") for path in small.digests(tmp_path, 12)["opt"])


def test_1_by_an_amount_of_order_one_where_clients_went_their_own_ways():
    rng = np.random.default_rng(0)
    A, B = rng.standard_normal((3, 1, 1, 4, 8)), rng.standard_normal((3, 1, 1, 4, 8))
    tree = {"adapters/all/000-003/q/A": A, "adapters/all/000-003/q/B": B}
    of_means, of_products = products(tree, np.ones(3) / 3)
    assert np.abs(of_means - of_products).max() > 0.3 * np.abs(of_products).max()
    of_means, of_products = products(tree | {"adapters/all/000-003/q/A": np.stack([A[0]] * 3)}, np.ones(3) / 3)
    np.testing.assert_allclose(of_means, of_products, atol=1e-12)


def test_2_A_is_the_same_everywhere_and_has_neither_state_nor_traffic(ffa):
    start, path = small.arrays(ffa, 0), "all/000-003/q/A"
    for step in (3, 6, 9, 12):
        clients = small.arrays(ffa, step, "clients")[f"adapters/{path}"]
        for k in range(3):
            np.testing.assert_array_equal(clients[k], start[path])
        np.testing.assert_array_equal(small.arrays(ffa, step)[path], start[path])
    moved = small.arrays(ffa, 12)["all/000-003/q/B"]
    assert np.abs(moved).max() > 0
    assert not any(path.endswith("/A") for path in small.digests(ffa, 12)["opt"])
    sent = [row["bytes_up"] for row in small.rows(ffa) if "bytes_up" in row]
    head = sum(x.size for x in small.arrays(ffa, 12, "modules").values())
    assert sent == [4 * (moved.size + head)] * 2


def trajectory(optim, alpha, rate, steps=3):
    """`s B A` after some steps with A frozen."""
    rules = dict(all=dict(sites="q,v", layers="all", experts="1", load=(), down="once", shrink=False,
                          adapter=dict(name="lora", rank=4, alpha=alpha, dropout=0.0, init="kaiming")))  # fmt: skip
    model = compile_model(rules_config(rules), ONE, max_segments=3)
    member = OPTIMIZERS[optim](learning_rate=rate, decay="constant", warmup=0)
    frozen, params = ("*/A",), base(ONE)
    adapters = fresh_adapters(model, jax.random.key(3), params)
    optimizer = member.make(10, {})
    step = jax.jit(make_step(model, optimizer, member.schedule(10), clip=0.0, frozen=frozen, accumulate=1,
                             targets_per_row=6, constrain=lambda x: x))  # fmt: skip
    state = TrainState(jnp.int32(0), jnp.int32(0), adapters, optimizer.init(trees.split(adapters, frozen)[0]), {})
    for i in range(steps):
        state, _ = step(state, params, batch(i))
    leaves = flatten_dict(jax.device_get(state.adapters), sep="/")
    scale = alpha / 4
    return {
        p[:-1]: scale * np.einsum("lerd,lero->ledo", leaves[p[:-1] + "A"], b) for p, b in leaves.items() if p[-1] == "B"
    }


@pytest.mark.parametrize(
    "optim, rate, same", [("sgd", 0.5, True), pytest.param("adamw", 1e-3, False, marks=pytest.mark.slow)]
)
def test_3_alpha_and_the_rate_are_one_number_under_sgd_and_not_under_adam(optim, rate, same):
    c = 4.0
    one, other = trajectory(optim, 8.0, rate), trajectory(optim, 8.0 * c, rate / c**2)
    size = max(np.abs(x).max() for x in one.values())
    gap = max(np.abs(one[path] - other[path]).max() for path in one)
    assert size > 1e-5 and (gap < 1e-5 * max(size, 1.0) and gap < 1e-3 * size if same else gap > 0.1 * size), optim


# ---- DP ------------------------------------------------------------------------------------------------------------


def singles(rows=4):
    """One example a row; each with three targets, so that a mean over examples is a mean over tokens."""
    out = batch(0, rows)
    first = out["segment_ids"] == 1
    return {n: np.where(first, x, 0).astype(x.dtype) for n, x in out.items()}


def gradients(each, rows, accumulate=1):
    rules = dict(all=dict(sites="q,v", layers="all", experts="1", load=(), down="once", shrink=False,
                          adapter=dict(name="lora", rank=4, alpha=8.0, dropout=0.0, init="kaiming")))  # fmt: skip
    model = compile_model(rules_config(rules), ONE, max_segments=3)
    adapters = randomised(fresh_adapters(model, jax.random.key(3), base(ONE)))
    state = TrainState(jnp.int32(0), jnp.int32(0), adapters, (), {})
    options = dict(frozen=("*/A",), accumulate=accumulate, targets_per_row=6, constrain=lambda x: x)
    gradient = jax.jit(make_gradient(model, objective=OBJECTIVES["lm"](), each=each, **options))
    return jax.device_get(gradient(state, base(ONE), rows))


@dataclasses.dataclass(frozen=True)
class Kept(Private):
    """Keeps the clipped gradients apart, for the test to look at."""

    def clipped(self, grads, there):
        one = jax.vmap(lambda g: Private.clipped(self, jax.tree.map(lambda x: x[None], g), jnp.ones(1, bool))[0])
        return one(grads), super().clipped(grads, there)[1]


def test_4_every_examples_gradient_is_clipped_as_one_vector():
    rows = singles()
    free, _ = gradients(Kept(np.inf, 0.0, 1.0), rows)
    norms = np.sqrt(sum((x.astype(np.float64) ** 2).reshape(4, -1).sum(1) for x in jax.tree.leaves(free)))
    C = float(np.median(norms))
    tight = jax.device_get(Kept(C, 0.0, 1.0).clipped(free, np.ones(4, bool))[0])
    new = np.sqrt(sum((x.astype(np.float64) ** 2).reshape(4, -1).sum(1) for x in jax.tree.leaves(tight)))
    np.testing.assert_allclose(new, np.minimum(norms, C), rtol=1e-5)
    assert len(jax.tree.leaves(free)) == 2
    for path, leaf in flatten_dict(tight, sep="/").items():  # one factor for all leaves of an example
        ratio = leaf.reshape(4, -1) / flatten_dict(free, sep="/")[path].reshape(4, -1)
        np.testing.assert_allclose(ratio, np.broadcast_to(np.minimum(1, C / norms)[:, None], ratio.shape), rtol=1e-4)


@pytest.mark.parametrize("accumulate", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_4_without_clip_and_noise_it_is_sgd(accumulate):
    rows = singles()
    plain, told = gradients(None, rows)
    private, out = gradients(Private(np.inf, 0.0, 4.0), rows, accumulate)
    for path, leaf in flatten_dict(plain, sep="/").items():
        np.testing.assert_allclose(flatten_dict(private, sep="/")[path], leaf, rtol=2e-5, atol=1e-8)
    assert out["objective"] == pytest.approx(float(told["objective"]), rel=1e-5) and out["metrics"]["examples"] == 4


@pytest.mark.slow
def test_4_rows_that_the_sample_left_empty_add_nothing():
    rows = singles()
    some = {n: x.copy() for n, x in rows.items()}
    for name in ("segment_ids", "loss_weight"):
        some[name][3] = 0
    three = {n: x[:3] for n, x in rows.items()}
    for a, b in zip(*(jax.tree.leaves(gradients(Private(0.1, 0.0, 4.0), r)[0]) for r in (some, three)), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-9)


def test_5_noise_has_the_stated_spread_and_is_drawn_once_a_step_and_client():
    C, sigma, b = 0.5, 1.3, 7.0
    zero = {"a": jnp.zeros((100, 100)), "b": jnp.zeros(2000)}
    noised = jax.jit(Private(C, sigma, b).noised)
    draws = [jax.device_get(noised(zero, jax.random.key(i))) for i in range(2)]
    flat = np.concatenate([x.ravel() for x in jax.tree.leaves(draws[0])])
    assert flat.std() == pytest.approx(sigma * C / b, rel=0.03) and abs(flat.mean()) < 4 * sigma * C / b / 109
    assert np.abs(np.corrcoef(draws[0]["b"], draws[1]["b"])[0, 1]) < 0.1
    assert np.abs(np.corrcoef(draws[0]["a"].ravel()[:2000], draws[0]["b"])[0, 1]) < 0.1


def test_5_clients_and_steps_have_noise_of_their_own(ffa):
    """Far larger than the gradient (the step is 0.3 sigma C / b times a normal), so that it is what the leaves show."""
    path = "adapters/all/000-003/q/B"
    first = small.arrays(ffa, 3, "clients")[path].reshape(3, -1)
    then = small.arrays(ffa, 6)["all/000-003/q/B"].ravel()
    corr = np.corrcoef(first)
    assert np.abs(corr[np.triu_indices(3, 1)]).max() < 0.9 and np.abs(np.corrcoef(first[0], then)[0, 1]) < 0.95
    assert first[0].std() > 0.5 * 0.3 * 0.7 * 0.5 / 4


CASES = json.loads((pathlib.Path(__file__).parents[1] / "fixtures" / "accountant.json").read_text())


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c['q']:.4f}-{c['sigma']}-{c['steps']}")
def test_6_the_accountant_is_that_of_a_library_to_1_percent(case):
    """dp-accounting's RDP accountant (tests/fixtures/make_accountant.py); at whole orders the same number."""
    ours = accountant.epsilon(case["q"], case["sigma"], case["steps"], case["delta"])
    assert ours == pytest.approx(case["epsilon"], rel=0.01)
    for order, wanted in case["rdp"].items():
        assert accountant.rdp(case["q"], case["sigma"], float(order)) == pytest.approx(wanted, rel=1e-6)


def test_6_the_first_triple_of_the_literature():
    """Abadi et al. 2016, section 3.2: q = 0.01, sigma = 4, 10,000 steps, delta 1e-5: 1.26 by their conversion."""
    theirs = min(10_000 * accountant.rdp(0.01, 4.0, a) + np.log(1e5) / (a - 1) for a in accountant.ORDERS)
    assert theirs == pytest.approx(1.26, rel=0.01)
    sigma = accountant.noise_for(3.0, 0.02, 200, 1e-5)
    assert 2.98 < accountant.epsilon(0.02, sigma, 200, 1e-5) <= 3.0


def test_6_samples_do_not_overflow():
    places = accountant.most_drawn(400, 0.05, 1e-9)
    draws = np.random.default_rng(0).binomial(400, 0.05, 200_000)
    assert draws.max() <= places < 60 and accountant.most_drawn(400, 0.05, 0.5) in (19, 20)


def test_7_half_of_loras_bytes_for_square_matrices_and_the_formulas():
    for name, row in ORGANISED.items():
        made = importlib.import_module(row.config.removesuffix(".py").replace("/", ".")).get_config()
        model = compile_model(made, SMALL)
        shapes = jax.eval_shape(model.init_adapters, jax.random.key(0), base())
        stages = [tuple(p for p in stage.freeze.split(",") if p) for stage in made.schedule.values()]
        trained = {path: leaf for stage in stages for path, leaf in trees.flatten_dict(
            trees.split(shapes, stage)[0], sep="/").items()}  # fmt: skip
        assert trees.count(trained) == row.params(SMALL), name
    square = dataclasses.replace(SMALL, heads=2, kv_heads=2, head_dim=SMALL.width // 2)
    assert 2 * ORGANISED["ffa_lora"].params(square) == ORGANISED["fedit"].params(square)


def test_7_the_shipped_config_freezes_A_and_spends_what_it_says():
    made = importlib.import_module("configs.ffa_lora").get_config()
    assert made.schedule.s00.freeze == "*/A" and made.optim.name == "sgd" and made.train.clip == 0.0
    assert made.regime.dp_epsilon == 6.0 and made.regime.dp_clip > 0 and S
    fedit = importlib.import_module("configs.fedit").get_config()
    assert not fedit.schedule.s00.freeze and fedit.regime.name == "federated"


# ---- routed experts ------------------------------------------------------------------------------------------------


def routed(data, adapter, freeze, **regime):
    """Four experts at q, two of them a token, by three clients."""
    made = small.config(data, regime=FED | dict(average="equal") | regime, freeze=freeze, steps=6)
    with made.unlocked():
        made.method.rules.all.update(experts="4", router=dict(name="softmax_topk", k=2, share="site"))
        made.method.rules.all.adapter.name = adapter
    config_lib.validate(made)
    return made


@pytest.mark.parametrize(
    ("adapter", "shape", "freeze", "dp"),
    [
        ("lora_shared_a", (4, 1), "*/A", {}),
        pytest.param("lora_shared_a", (4, 1), "*/A,*/router/*", small.DP, marks=pytest.mark.slow),
        pytest.param("lora", (4, 4), "*/A", small.DP, marks=pytest.mark.slow),
    ],
)
def test_routed_A_stays_and_every_experts_average_is_exact(data, tmp_path, adapter, shape, freeze, dp):
    """A for all experts or one each, as it began on all clients; B of every expert, routers and head are sent."""
    small.start(routed(data, adapter, freeze, **dp), tmp_path)
    begun, path = small.arrays(tmp_path, 0), "all/000-003/q"
    clients, mean = small.arrays(tmp_path, 3, "clients"), small.arrays(tmp_path, 3)
    assert begun[f"{path}/A"].shape[:2] == shape and mean[f"{path}/B"].shape[:2] == (4, 4)
    for k in range(3):
        np.testing.assert_array_equal(clients[f"adapters/{path}/A"][k], begun[f"{path}/A"])
    spread = {name: np.broadcast_to(x, (3, 4, 4, *x.shape[3:])) if name.endswith("q/A") else x
              for name, x in clients.items()}  # fmt: skip
    _, of_products = products(spread, np.ones(3) / 3)
    A, B = (np.broadcast_to(mean[f"{path}/{leaf}"], (4, 4, *mean[f"{path}/{leaf}"].shape[2:])) for leaf in "AB")
    saved = np.einsum("lerd,lero->ledo", A.astype(np.float64), B)
    np.testing.assert_allclose(saved, of_products, atol=1e-6 * np.abs(of_products).max())
    scale = np.abs(of_products).max(axis=(-1, -2))
    assert (scale > 0).all(), "every expert of every layer moved"
    trains = "router" not in freeze
    router = "all/000-003/router/q/W"
    assert np.array_equal(small.arrays(tmp_path, 6)[router], begun[router]) != trains, (
        "from B = 0 the second step moves it"
    )
    head = sum(x.size for x in small.arrays(tmp_path, 6, "modules").values())
    sent = mean[f"{path}/B"].size + head + trains * mean[router].size
    assert [row["bytes_up"] for row in small.rows(tmp_path) if "bytes_up" in row][0] == 4 * sent
