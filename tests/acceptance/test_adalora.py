"""AdaLoRA, arXiv 2303.10512, of the baselines' acceptance list (items 1, 2 and 8); the oracle is peft.

`tests/fixtures/make_adalora.py` has peft make `adalora.npz`: outputs, the regulariser, and 14 steps of its schedule.
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from molora_jax import sharding
from molora_jax.adapters.adalora import AdaLora
from molora_jax.core import trees
from molora_jax.core.types import Site
from molora_jax.errors import InputError
from molora_jax.losses.orthogonal import Orthogonal
from molora_jax.optim import adalora, lora_pro
from molora_jax.training.step import Knobs, make_gradient
from tests.acceptance import small
from tests.battery.cases import BATCH, TARGETS_PER_ROW, Case, changed, combination, method, random_adapters
from tests.engines.problems import mesh

PEFT = np.load(pathlib.Path(__file__).parents[1] / "fixtures" / "adalora.npz")
T, R, TARGET, ALPHA, RATE, DECAY = PEFT["settings"]
T, R, TARGET = int(T), int(R), int(TARGET)
NAMES = ("one", "two")


def leaves(name, suffix=""):
    """Of a layer, as one expert of one layer `[1, 1, ...]`."""
    found = {leaf: PEFT[f"{name}/{theirs}{suffix}"] for leaf, theirs in (("A", "A"), ("B", "B"), ("lam", "E"))}
    found["B"] = found["B"].T
    return {leaf: jnp.asarray(x)[None, None] for leaf, x in found.items()}


def tree(suffix=""):
    return {"all": {"000-000": {name: leaves(name, suffix) for name in NAMES}}}


def peft_like(**changes):
    options = dict(learning_rate=RATE, weight_decay=DECAY, decay="constant", target=TARGET, every=2,
                   initial_fraction=2 / T, final_fraction=3 / T)  # fmt: skip
    return adalora.AdaLoraOptimizer(**options | changes)


def test_acceptance_1_the_start_changes_nothing():
    site = Site("q", 7, 5, (0,), 3)
    made = AdaLora(rank=4).init_leaves(jax.random.key(0), site, 0)
    assert {k: v.shape for k, v in made.items()} == {"A": (3, 4, 7), "B": (3, 4, 5), "lam": (3, 4)}
    assert not np.any(AdaLora(rank=4).factors(made, {}, small.context()).B)
    wide = AdaLora(rank=50).init_leaves(jax.random.key(1), site, 0)
    assert np.std(wide["A"]) == pytest.approx(0.02, rel=0.1) and np.std(wide["B"]) == pytest.approx(0.02, rel=0.1)


def test_acceptance_2_outputs_and_the_regulariser_are_pefts():
    adapter = AdaLora(rank=R, alpha=float(ALPHA))
    assert adapter.scale() == ALPHA / (R + 1e-5)
    x = PEFT["x"]
    for name in NAMES:
        own = jax.tree.map(lambda v: v[0], leaves(name))
        f = jax.jit(lambda own: adapter.factors(own, {}, small.context()))(own)
        y = x @ PEFT[f"{name}/W"].T + adapter.scale() * (x @ f.A[0].T) @ f.B[0]
        x = np.tanh(y)
    np.testing.assert_allclose(y, PEFT["y"], rtol=1e-5, atol=1e-5)
    value, slope = jax.jit(jax.value_and_grad(Orthogonal().penalty))(tree(), {})
    assert float(value) == pytest.approx(float(PEFT["orthogonal"]), rel=1e-5)
    assert not any(np.any(slope["all"]["000-000"][name]["lam"]) for name in NAMES)


def test_acceptance_2_fourteen_steps_of_the_schedule_are_pefts():
    """AdamW with decay, sensitivities, the falling budget every other step, revivals, the choice that stays."""
    member = peft_like()
    optimizer = member.make(T, {})
    params = tree()
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    revived = 0
    for t in range(1, T + 1):
        old = params
        params, state = step(params, state, tree(f"_{t}"))
        for name in NAMES:
            own = params["all"]["000-000"][name]["lam"][0, 0]
            np.testing.assert_allclose(own, PEFT[f"{name}/lam_{t}"], rtol=1e-4, atol=1e-6, err_msg=f"{name} {t}")
            np.testing.assert_array_equal(own == 0, PEFT[f"{name}/lam_{t}"] == 0)
            revived += int(np.sum((own != 0) & (old["all"]["000-000"][name]["lam"][0, 0] == 0)))
    assert revived > 0, "what was set to 0 still has its gradient"
    for name in NAMES:
        for leaf, theirs in (("A", PEFT[f"{name}/A_end"]), ("B", PEFT[f"{name}/B_end"].T)):
            np.testing.assert_allclose(params["all"]["000-000"][name][leaf][0, 0], theirs, rtol=1e-4, atol=1e-5)


SHORT = dict(target=1, initial_fraction=0.0, final_fraction=0.95)  # of the 100 steps of a `Case`: settled at step 5


def mixture(**options):
    config = combination("adalora", "softmax_topk", "projection", "kaiming", **{"method.rules.mix.sites": "q,down"})
    return Case(changed(config, {"optim": dict(config.optim, name="adalora", **SHORT)}), **options)


@pytest.fixture(scope="module")
def routed():
    return mixture()


def test_acceptance_8_after_the_schedule_the_budget_is_met_exactly(routed):
    """Real steps of a mixture: triplets are ranked across sites, layers and experts."""
    case, member = routed, adalora.AdaLoraOptimizer(**SHORT)
    state, kept = case.start(), []
    for _ in range(7):
        state, metrics, _ = case.run(state)
        lam = [x for p, x in flatten_dict(jax.device_get(state.adapters), sep="/").items() if p.endswith("/lam")]
        kept.append([x != 0 for x in lam])
    total, matrices = sum(x.size for x in kept[0]), sum(x.size // x.shape[-1] for x in kept[0])
    fallen = member.fallen(100, [x.shape for x in kept[0]])
    assert fallen[5] == total - matrices
    count = [sum(x.sum() for x in one) for one in kept]
    assert count[4:] == [matrices] * 3 and count == sorted(count, reverse=True) and int(state.skipped) == 0
    for before, after in zip(kept[4], kept[6], strict=True):
        np.testing.assert_array_equal(before, after)
    per_expert = np.concatenate([x.sum(axis=-1).ravel() for x in kept[-1]])
    assert per_expert.min() < per_expert.max(), "one ranking for all, not a rank for each"


def test_acceptance_8_the_regulariser_is_zero_on_orthonormal_factors_and_so_is_its_slope():
    eye = lambda d: jnp.broadcast_to(jnp.eye(3, d), (2, 4, 3, d))  # noqa: E731
    own = {"all": {"000-001": {"q": {"A": eye(7), "B": eye(5), "lam": jnp.ones((2, 4, 3))}}}}
    value, slope = jax.value_and_grad(Orthogonal().penalty)(own, {})
    assert float(value) == 0.0 and not any(np.any(x) for x in jax.tree.leaves(slope))
    doubled = jax.tree.map(lambda x: 2 * x, own)  # ||4 I - I||_F = 3 sqrt 3
    assert float(Orthogonal().penalty(doubled, {})) == pytest.approx(3 * 3**0.5, rel=1e-6)


def test_the_budget_is_the_papers_for_any_number_of_steps():
    shapes = [(2, 3, 12), (1, 1, 12)]
    b0, bT = 7 * 12, 7 * 8
    for steps in (1, 2, 3, 10, 200, 1000):
        member = adalora.AdaLoraOptimizer()
        fallen = member.fallen(steps, shapes)
        first, end = int(0.1 * steps), steps - int(0.3 * steps)
        assert len(fallen) == steps + 1 and (fallen[: first + 1] == 0).all() and (fallen[end:] == b0 - bT).all()
        for t in range(first + 1, end):
            assert fallen[t] == b0 - int((b0 - bT) * (1 - (t - first) / (end - first)) ** 3 + bT)
    every = adalora.AdaLoraOptimizer(every=5).fallen(100, shapes)
    assert set(np.flatnonzero(every)) == set(range(15, 70, 5)) | set(range(70, 101))
    scores = [jnp.array([[0.0, 3.0], [0.0, 1.0]]), jnp.array([2.0, 0.0])]
    size = [jnp.array([[1.0, 0.0], [0.0, 9.0]]), jnp.array([0.0, 5.0])]
    gone = adalora.lowest(scores, size, 2)
    np.testing.assert_array_equal(gone[0], [[True, False], [True, False]])
    assert not gone[1].any(), "of equal scores the smaller |lam|"


def test_a_later_stage_keeps_the_choice():
    """A stage begins with a fresh state: scores are equal then, and what is 0 stays 0."""
    member = peft_like(decay="constant")
    optimizer = member.make(T, {})
    params = tree()
    params["all"]["000-000"]["one"]["lam"] = jnp.array([[[0.0, 0.5, 0.0, -0.5]]])
    params["all"]["000-000"]["two"]["lam"] = jnp.array([[[0.2, 0.0, 0.1, 0.0]]])
    state = optimizer.init(params)
    state = state._replace(step=state.step._replace(count=jnp.int32(12)))
    updates, _ = jax.jit(optimizer.update)(tree("_13"), state, params)
    after = optax.apply_updates(params, updates)
    for name in NAMES:
        old, new = (x["all"]["000-000"][name]["lam"] for x in (params, after))
        np.testing.assert_array_equal(new == 0, old == 0)


def test_runs_side_by_side_have_budgets_of_their_own():
    optimizer = peft_like().make(T, {})
    grads = [tree("_1"), tree("_2")]
    stack = lambda trees_: jax.tree.map(lambda *x: jnp.stack(x), *trees_)  # noqa: E731

    def two(params, g, h):
        state = optimizer.init(params)
        state = state._replace(step=state.step._replace(count=jnp.int32(10)))
        for one in (g, h):
            updates, state = optimizer.update(one, state, params)
            params = optax.apply_updates(params, updates)
        return params

    params = [tree(), jax.tree.map(lambda x: x + 0.1, tree())]
    both = jax.jit(jax.vmap(two))(stack(params), stack(grads), stack(grads[::-1]))
    for n in range(2):
        alone = jax.jit(two)(params[n], grads[n], grads[1 - n])
        for x, y in zip(jax.tree.leaves(both), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(x[n], y, rtol=1e-5, atol=1e-7)


def test_eight_devices_choose_as_one_does(routed):
    eight = mixture(mesh=mesh(data=2, fsdp=2, expert=2), engine="gather")
    adapters = random_adapters(routed.model, routed.params)
    states = [case.run(routed.start(adapters).replace(step=jnp.int32(3)))[0] for case in (routed, eight)]
    a, b = (flatten_dict(jax.device_get(s.adapters), sep="/") for s in states)
    for path, leaf in a.items():
        np.testing.assert_allclose(b[path], leaf, atol=1e-4, err_msg=path)
        if path.endswith("/lam"):
            np.testing.assert_array_equal(leaf == 0, b[path] == 0)
            assert np.any(leaf == 0)
    held = flatten_dict(states[1].opt[1].sensitivity, sep="/")
    assert held["mix/000-001/down/lam"].sharding.spec == sharding.P(None, "expert")


@pytest.mark.slow
def test_the_regulariser_is_added_to_a_steps_gradient_once_whatever_the_micro_steps():
    case = Case(method("adalora"))
    adapters = random_adapters(case.model, case.params)
    state, found = case.start(adapters), {}
    for accumulate, penalties in ((1, ()), (1, (("orthogonal", Orthogonal()),)), (4, (("orthogonal", Orthogonal()),))):
        gradient = make_gradient(case.model, frozen=case.frozen, accumulate=accumulate, constrain=lambda x: x,
                                 targets_per_row=TARGETS_PER_ROW, penalties=penalties)  # fmt: skip
        knobs = Knobs(jnp.int32(0), {}, {"orthogonal": jnp.float32(0.5)})
        found[accumulate, len(penalties)] = jax.jit(gradient)(state, case.params, BATCH, None, knobs)
    value, slope = jax.value_and_grad(Orthogonal().penalty)(adapters, {})
    assert float(found[4, 1][1]["aux"]["orthogonal"]) == pytest.approx(float(value), rel=1e-6)
    plain, once, micro = (flatten_dict(found[key][0], sep="/") for key in ((1, 0), (1, 1), (4, 1)))
    for path, own in flatten_dict(slope, sep="/").items():
        for other in (once, micro):
            np.testing.assert_allclose(other[path], plain[path] + 0.5 * own, rtol=1e-4, atol=2e-5)


def test_traps_what_is_no_triplet_is_refused_by_name():
    pair = {"all": {"000-000": {"q": {k: jnp.ones((1, 1, 3, 4)) for k in "AB"}}}}
    triplet = {"all": {"000-000": {"q": pair["all"]["000-000"]["q"] | {"lam": jnp.ones((1, 1, 3))}}}}
    for ask, words in (
        (lambda: adalora.AdaLoraOptimizer().make(9, {}).init(pair), "'adalora' where no A, B and lam train"),
        (lambda: adalora.AdaLoraOptimizer(target=5).make(9, {}).init(triplet), "target: got 5; .*at most .* 3 of all"),
        (lambda: adalora.AdaLoraOptimizer(initial_fraction=0.7).make(9, {}), "initial_fraction . final_fraction < 1"),
        (lambda: Orthogonal().penalty(pair, {}), "losses.orthogonal: got no A, B and lam"),
        (lambda: lora_pro.LoraPro().make(9, trees.pairs(Case(method("adalora")).model, triplet)).init(triplet),
         "no A and B of one product"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=words):
            ask()
