"""The experiment of eight routed methods: rows are configs, languages say what they mean, the problem can be solved."""

import jax
import numpy as np
import pytest

from configs import common
from experiments.routed import __main__ as routed
from experiments.routed import fly, languages, mix, skills, small
from molora_jax import config as schema
from molora_jax.backbones.compile import compile_model
from molora_jax.backbones.families import TINY
from molora_jax.routers import BiasedTopK


@pytest.mark.parametrize("name", mix.ROWS)
def test_a_row_is_a_config(name):
    adapter, experts, router, losses, _ = mix.ROWS[name]
    made = small.config_of("random:tiny", small.NEW, 2)
    made.method.rules = small.rules(
        experts=str(experts), router=router, adapter=common.adapter(**{"name": "lora", "dropout": 0.0} | adapter)
    )
    made.losses = losses
    schema.validate(made)
    (rule,) = compile_model(made, TINY).rules
    assert rule.projections == ("q", "down") and max(rule.experts) == int(experts)


def test_every_method_has_a_row():
    claims = {name.partition(":")[0] for name in mix.ROWS} | {"goat"}
    assert {"hydralora", "adamole", "ld_mole", "comol", "goat"} <= claims
    assert set(routed.PARTS) == {"mix", "fly", "languages", "skills"}


def test_the_languages_are_ways_to_write_digits():
    digits = (3, 0, 9)
    said = [languages.LANGUAGES[name](digits) for name in ("comma", "semi", "dash")]
    assert said == ["d,a,j", "g;d;c", "t-k-n"]
    rows = languages.rows(languages.LANGUAGES["dash"], 0, 50)
    back = ["".join(str("klmnopqrst".index(c)) for c in reversed(row["prompt"].split("-"))) for row in rows]
    assert back == [row["target"] for row in rows]


def test_the_skills_are_solved_by_their_own_maps():
    """The answer of experts that are the skills, chosen by the tags, is the target: gates of 1, so divided out."""
    given = skills.problem()
    C, V, tags = (np.asarray(v, np.float64) for v in given)
    x, tag, y = skills.batch(jax.random.key(0), given)
    on = np.asarray(tag @ tags.T) / 4
    np.testing.assert_allclose(np.sort(on, axis=1)[:, -3:], 1, atol=1e-5)
    want = x @ C + np.einsum("bd,sdo,bs->bo", x, V, on)
    np.testing.assert_allclose(y, want, atol=1e-4)
    U, S, Vt = np.linalg.svd(V)
    p = dict(W=10 * tags, A=np.swapaxes(U[:, :, :2] * S[:, None, :2], 1, 2), B=3 * Vt[:, :2],
             SA=np.linalg.svd(C)[0].T @ np.eye(24), SB=np.linalg.svd(C)[0].T @ C)  # fmt: skip
    p = {name: np.asarray(v, np.float32) for name, v in p.items()}
    found = skills.answer(p, x, tag, BiasedTopK(k=3))
    np.testing.assert_allclose(found, y, atol=1e-3, err_msg="each of three gates is a third")


def test_gini_and_the_answer_of_chosen_ranks():
    assert fly.gini([3, 3, 3]) == 0 and fly.gini([0, 0, 0, 8]) == pytest.approx(0.75)
    router = fly.ROWS["abs, u = 0"][2]
    rng = np.random.default_rng(0)
    p = {"A": rng.standard_normal((fly.R, fly.D)), "B": rng.standard_normal((fly.R, fly.OUT))}
    x = rng.standard_normal((5, fly.D))
    h = x @ p["A"].T
    keep = np.argsort(np.argsort(-np.abs(h), axis=1), axis=1) < fly.K
    p = {name: np.asarray(v, np.float32) for name, v in p.items()}
    y, sums = fly.answer(p, np.asarray(x, np.float32), router, np.zeros(fly.R, np.float32))
    np.testing.assert_allclose(y, (keep * h) @ p["B"], rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(sums["count"], keep.sum(0))


def test_told():
    value = {"NLL": {"a": 1.0, "b": 2.0}, "Gini": None, "trained": 1200}
    assert routed.told(value) == "NLL 1.5000 (1.000, 2.000), trained 1,200"
