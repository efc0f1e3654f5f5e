"""experiments/library: each reader's loop runs, is short, and what it measured is what the page says."""

import ast
import inspect
import json
import pathlib

import jax
import numpy as np
import pytest

import molora_jax as mj
from experiments.library import digits, minilm, sentiment
from experiments.library.vit import ViT

FOLDER = pathlib.Path(digits.__file__).parent


def test_loops_are_short_and_the_models_know_nothing_of_the_library():
    for loop in (digits.adapt, sentiment.fit):
        assert len(inspect.getsource(loop).splitlines()) <= 40
    assert "molora" not in (FOLDER / "vit.py").read_text().split('"""', 2)[2]
    imports = [n for n in ast.walk(ast.parse((FOLDER / "minilm.py").read_text())) if isinstance(n, ast.ImportFrom)]
    assert not any("backbones" in n.module for n in imports)


def test_a_vision_transformer_with_experts_learns_other_views():
    images, labels = digits.load()
    assert images.shape == (1797, 8, 8) and set(labels) == set(range(10))
    model = ViT(width=16, layers=1)
    params = digits.pretrain(model, images[:512], labels[:512], steps=2)
    seen, view = digits.views(images[:64])
    routed = mj.attach(model, digits.RULES)
    variables, losses = digits.adapt(routed, params, seen, np.tile(labels[:64], 4), steps=12)
    assert losses[-3:].mean() < losses[:3].mean()
    assert variables["params"] is params
    accuracy, shares = digits.measure(routed, variables, seen, np.tile(labels[:64], 4), view)
    assert len(accuracy) == 4 and np.allclose(np.sum(shares["layers_0"], axis=1), 1, atol=1e-5)


def test_a_linen_minilm_equals_our_backbone_and_trains():
    from molora_jax.backbones.model import Model
    from molora_jax.io.base import load_base

    model, params, tokenizer = minilm.weights("random:tiny-bert")
    base = load_base("random:tiny-bert")
    tokens, mask = minilm.tokenize(tokenizer, ["good", "a bad day"], 12)
    positions = np.broadcast_to(np.arange(12, dtype=np.int32), tokens.shape)
    hidden, *_ = Model(base.config).hidden(
        base.params, {}, {}, dict(tokens=tokens, segment_ids=mask.astype(np.int32), positions=positions)
    )
    expected = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
    np.testing.assert_allclose(jax.jit(model.apply)({"params": params}, tokens, mask), expected, atol=1e-4)
    found = sentiment.run(12, "random:tiny-bert", size=32, most=400)
    assert np.mean(found["losses"][-3:]) < found["losses"][0]
    assert np.allclose(np.sum(found["use"], axis=-1), 2, atol=1e-5), "k = 2 of the tokens that are no padding"


@pytest.mark.slow
def test_minilm_from_its_package_equals_transformers():
    model, params, tokenizer = minilm.weights()
    wanted = json.loads((FOLDER.parents[1] / "tests" / "fixtures" / "minilm.json").read_text())
    tokens, mask = minilm.tokenize(tokenizer, [row["text"] for row in wanted["rows"]], 16)
    with jax.default_matmul_precision("highest"):
        mean = np.asarray(model.apply({"params": params}, tokens, mask))
    for row, ids, got in zip(wanted["rows"], tokens, mean, strict=True):
        assert ids[: len(row["ids"])].tolist() == row["ids"]
        np.testing.assert_allclose(got[:8], row["mean"], atol=1e-4)


@pytest.mark.pictures
@pytest.mark.slow
def test_the_runs_of_the_page(tmp_path):
    """Shorter runs reach most of what the page says."""
    found = digits.run(steps=150, base_steps=150)
    assert np.mean(found["after"]) > np.mean(found["before"]) + 0.3
    assert digits.draw(found, tmp_path / "digits.png").stat().st_size > 10_000
    found = sentiment.run(60)
    assert found["accuracy"] > found["majority"] + 0.25
    assert sentiment.draw(found, tmp_path / "sentiment.png").stat().st_size > 10_000
