"""Every family with adapters in rows that are padded on either side, packed, from a cache, on one device and eight."""

import jax
import numpy as np
import pytest

from molora_jax.backbones.model import Model
from molora_jax.io.base import load_base
from tests.backbones import family_cases, in_rows, parity

QUICK = ("gemma3",)  # norms on both sides, a window and a rotation of its own in one layer; the others with --all
each = pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in family_cases.ADAPTED]
)


@pytest.fixture
def base(tmp_path, monkeypatch, name):
    monkeypatch.setenv("MOLORA_CACHE", str(tmp_path / "cache"))
    return load_base(family_cases.write(tmp_path / "m", "folder", family_cases.ALL[name]))


@each
def test_padded_and_packed_rows_with_adapters(base, name):
    found = in_rows.run(family_cases.ALL[name], base)
    for what, error in in_rows.errors(found, parity.wanted_adapted(name)).items():
        assert error < 1e-4, (what, error)


@each
def test_eight_devices(base, name):
    found = in_rows.run(family_cases.ALL[name], base, mesh=True)
    for what, error in in_rows.errors(found, parity.wanted_adapted(name)).items():
        assert error < 1e-4, (what, error)


@each
def test_cached_generation_equals_uncached(base, name):
    assert in_rows.cached(family_cases.ALL[name], base) < 1e-4


@pytest.mark.parametrize("name", ["rope dynamic, beyond the context", "phi3, longrope, long"])
def test_a_rotation_follows_the_length_of_its_own_text(base, name):
    """A text below the bound of 16 is what it is alone, also packed with one beyond it; that one likewise."""
    model, tokens = Model(base.config), family_cases.rows()[0]
    lengths = (9, 24)

    @jax.jit
    def hidden(params, tokens, segment_ids, positions):
        batch = dict(tokens=tokens, segment_ids=segment_ids, positions=positions)
        return model.hidden(params, {}, {}, batch)[0]

    text = np.zeros((3, 40), np.int32)
    segments, positions = np.zeros_like(text), np.zeros_like(text)
    for row, text_, start in ((0, 0, 0), (0, 1, 9), (1, 0, 0), (2, 1, 5)):  # packed, and each alone
        at = slice(start, start + lengths[text_])
        text[row, at], segments[row, at] = tokens[text_, : lengths[text_]], 1 + text_
        positions[row, at] = np.arange(lengths[text_])
    with jax.default_matmul_precision("highest"):
        found = np.asarray(hidden(base.params, text, segments, positions))
    np.testing.assert_allclose(found[0, :9], found[1, :9], atol=1e-5)
    np.testing.assert_allclose(found[0, 9:33], found[2, 5:29], atol=1e-5)
    longer = np.where(segments == 1, 2, segments)  # as one text: the short one turns as the long one does
    with jax.default_matmul_precision("highest"):
        other = np.asarray(hidden(base.params, text, longer, positions))
    assert np.abs(other[0, :9] - found[0, :9]).max() > 1e-3
