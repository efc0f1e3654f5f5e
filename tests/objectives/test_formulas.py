"""Each objective against its formula in float64 numpy: value, and the slope along random directions.

The model is a stand-in whose hidden states are the parameters: what is tested is how they become a loss.
"""

import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from molora_jax.errors import InputError
from molora_jax.objectives import OBJECTIVES, Forward, Frozen, compile_objective, vocabulary
from molora_jax.objectives.lm import lm as lm_loss

B, S, D, V, C, M = 4, 9, 5, 7, 3, 6
LENGTHS = [(4, 3), (5, 4), (6, 2), (3, 4)]  # two examples a row; in a pair of rows they belong together
RNG = np.random.default_rng(0)
HIDDEN, TEACHER = RNG.standard_normal((2, B, S, D))
TABLE, TABLE2 = RNG.standard_normal((2, D, V))


def batch(kind="text"):
    out = {name: np.zeros((B, S), np.int32) for name in ("tokens", "targets", "segment_ids", "positions")}
    out["loss_weight"] = np.zeros((B, S), np.float32)
    out["targets"][:] = RNG.integers(0, V, (B, S))
    for row, lengths in enumerate(LENGTHS):
        at = 0
        for segment, n in enumerate(lengths, start=1):
            out["segment_ids"][row, at : at + n] = segment
            answer = 1 if kind == "label" else 2
            out["loss_weight"][row, at + n - answer : at + n] = 1.0
            if kind == "label":
                out["targets"][row, at + n - 1] = (row + segment) % C
            at += n
    return out


class Stand(types.SimpleNamespace):
    """A model whose logits are `hidden @ table`; frozen passes give `TEACHER`."""

    max_segments = 2
    config = types.SimpleNamespace(vocab=V, head=lambda params: {"table": params["table"]})

    def logits(self, params, hidden):
        return hidden @ params["table"]

    def hidden(self, params, *_, **__):
        return (params["hidden"],)


def forward(hidden):
    return Forward(Stand(), {"table": jnp.asarray(TABLE)}, lambda batch: hidden, M)


FROZEN = Frozen({"table": TABLE2, "hidden": TEACHER}, {}, {}, Stand())


def examples(rows):
    """`(row, positions)` of each example."""
    for row in range(B):
        for segment in (1, 2):
            yield row, np.flatnonzero(rows["segment_ids"][row] == segment)


def log_softmax(x):
    return x - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True)) - x.max(-1, keepdims=True)


def answer_logp(hidden, table, rows, row, at):
    at = at[rows["loss_weight"][row, at] > 0]
    return sum(log_softmax(hidden[row, t] @ table)[rows["targets"][row, t]] for t in at)


def lm(hidden, heads, rows, _):
    answers = [answer_logp(hidden, TABLE, rows, row, at) for row, at in examples(rows)]
    return -sum(answers) / rows["loss_weight"].sum()


def classify(hidden, heads, rows, options):
    out = []
    for row, at in examples(rows):
        h = hidden[row, at].mean(0) if options["pooling"] == "mean" else hidden[row, at[-1]]
        out.append(-log_softmax(h @ heads["kernel"] + heads["bias"])[rows["targets"][row, at[-1]]])
    return np.mean(out)


def preference(hidden, heads, rows, options):
    s = {}
    for row, at in examples(rows):
        if options.get("form", "reward") == "reward":
            value = hidden[row, at[-1]] @ heads["kernel"]
        else:
            value = answer_logp(hidden, TABLE, rows, row, at)
            if options.get("reference", "none") != "none":
                value -= answer_logp(TEACHER, TABLE2, rows, row, at)
            value *= options.get("beta", 0.1)
        s[row, rows["segment_ids"][row, at[0]]] = value
    return np.mean([np.log1p(np.exp(s[row + 1, g] - s[row, g])) for row in (0, 2) for g in (1, 2)])


def distill(hidden, heads, rows, options):
    T, total = options["temperature"], 0.0
    for row, t in zip(*np.nonzero(rows["loss_weight"]), strict=True):
        p, q = (log_softmax(h[row, t] @ table / T) for h, table in ((TEACHER, TABLE2), (hidden, TABLE)))
        total += np.sum(np.exp(p) * (p - q))
    return T * T * total / rows["loss_weight"].sum()


CASES = [
    ("lm", {}, lm),
    ("classify", {"pooling": "last"}, classify),
    ("classify", {"pooling": "mean"}, classify),
    ("preference", {}, preference),
    ("preference", {"form": "dpo", "beta": 0.3}, preference),
    ("preference", {"form": "dpo", "beta": 0.3, "reference": "base"}, preference),
    ("distill", {"teacher": "x", "temperature": 1.0}, distill),
    ("distill", {"teacher": "x", "temperature": 2.5}, distill),
]


@pytest.mark.parametrize(
    "name, options, formula", CASES, ids=["-".join([n, *map(str, o.values())]) for n, o, _ in CASES]
)
def test_value_and_slope_are_the_formulas(name, options, formula):
    objective = compile_objective({"name": name, **options})
    rows = batch("label" if name == "classify" else "text")
    heads = {k: RNG.standard_normal(v.shape) for k, v in objective.init_heads(jax.random.key(0), D, C).items()}
    fixed = dict.fromkeys(objective.frozen(), FROZEN)

    def loss(hidden, heads):
        return objective.loss(forward(hidden), heads, fixed, rows, objective.norm(rows))[0]

    with jax.enable_x64(True):
        value, (slope, head_slopes) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(jnp.asarray(HIDDEN), heads)
        np.testing.assert_allclose(value, formula(HIDDEN, heads, rows, options), rtol=1e-6)
        for _ in range(3):
            way, e = RNG.standard_normal(HIDDEN.shape), 1e-5
            ways = {k: RNG.standard_normal(v.shape) for k, v in heads.items()}
            up, down = (
                formula(HIDDEN + s * way, {k: heads[k] + s * ways[k] for k in heads}, rows, options) for s in (e, -e)
            )
            want = (up - down) / (2 * e)
            got = np.sum(slope * way) + sum(np.sum(head_slopes[k] * ways[k]) for k in heads)
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-7)
        # held out: the same value, an example at a time
        score = jax.jit(lambda hidden, heads: objective.score(forward(hidden), heads, fixed, rows))
        nll, weight, right, where = jax.device_get(score(jnp.asarray(HIDDEN), heads))
        assert nll.shape == weight.shape == right.shape == where.shape
        if name != "distill":
            np.testing.assert_allclose(np.sum(nll * weight) / np.sum(weight), value, rtol=1e-6)
        assert set(np.unique(right)) <= {0, 0.5, 1}


@pytest.mark.parametrize("positions", [1, 4])
@pytest.mark.parametrize(
    "name, options", [(n, o) for n, o, f in CASES if f is not classify and (o or n == "lm")], ids=str
)
def test_chunks_of_the_vocabularys_distribution_change_nothing(monkeypatch, name, options, positions):
    """Value, slope of the hidden states, slope of a head that trains; 4 does not divide M."""
    objective = compile_objective({"name": name, **options})
    rows, fixed = batch(), dict.fromkeys(objective.frozen(), FROZEN)
    heads = {k: RNG.standard_normal(v.shape) for k, v in objective.init_heads(jax.random.key(0), D, C).items()}

    def loss(hidden, table):
        given = Forward(Stand(), {"table": table}, lambda batch: hidden, M)
        return objective.loss(given, heads, fixed, rows, objective.norm(rows))[0]

    with jax.enable_x64(True):
        point = jnp.asarray(HIDDEN), jnp.asarray(TABLE)
        want = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(*point)
        monkeypatch.setattr(vocabulary, "CHUNK_BYTES", 4 * B * V * positions)
        assert vocabulary.count(B, M, V) == -(-M // positions)
        got = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(*point)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14), got, want)
        np.testing.assert_allclose(jax.jit(jax.grad(loss))(*point), want[1][0], rtol=1e-12, atol=1e-14)  # a frozen head


def test_no_array_of_all_logits_is_kept(monkeypatch):
    monkeypatch.setattr(vocabulary, "CHUNK_BYTES", 4 * B * V * 2)
    rows = batch()

    def loss(hidden):
        return lm_loss(Stand(), {"table": jnp.asarray(TABLE, jnp.float32)}, hidden, rows, M)

    def arrays():
        text = jax.jit(jax.grad(loss)).lower(jnp.asarray(HIDDEN, jnp.float32)).as_text()
        return {shape for shape in re.findall(r"tensor<([0-9x]+)xf32>", text) if shape.endswith(f"x{V}")}

    assert f"{B}x2x{V}" in arrays() and f"{B}x{M}x{V}" not in arrays() and f"3x{B}x2x{V}" not in arrays()


def test_an_untrained_model_against_itself_is_a_draw():
    rows, objective = batch(), compile_objective({"name": "preference", "form": "dpo", "reference": "base"})
    same = Frozen({"table": jnp.asarray(TABLE), "hidden": jnp.asarray(HIDDEN)}, {}, {}, Stand())
    given = forward(jnp.asarray(HIDDEN)), {}, {"reference": same}, rows
    nll, weight, right, _ = objective.score(*given)
    np.testing.assert_allclose(nll[weight > 0], np.log(2), rtol=1e-6)
    assert (right[weight > 0] == 0.5).all() and weight.sum() == 4, "two rows of two pairs"


def test_options_that_exclude_each_other():
    with pytest.raises(InputError, match=r"objective\.reference.*reward"):
        compile_objective({"name": "preference", "reference": "base"})
    with pytest.raises(InputError, match=r"objective\.teacher"):
        compile_objective({"name": "distill"})
    assert {name: OBJECTIVES[name].UNIT for name in OBJECTIVES} == {
        "lm": 1,
        "classify": 1,
        "preference": 2,
        "distill": 1,
        "reward_experts": 2,
    }
