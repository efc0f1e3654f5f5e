"""Every family with adapters in rows that are padded on either side, packed, from a cache, on one device and eight."""

import pytest

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
