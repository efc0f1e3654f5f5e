"""Every family, every reader: logits, loss and the gradient of every site's kernel against transformers."""

import pytest

from molora_jax.io.base import load_base
from tests.backbones import family_cases, parity


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MOLORA_CACHE", str(tmp_path / "cache"))


def check(name, source, dtype="float32"):
    for what, error in parity.errors(name, load_base(source, dtype=dtype)).items():
        assert error < parity.LIMITS[dtype], what


@pytest.mark.parametrize("reader", family_cases.READERS)
@pytest.mark.parametrize("name", family_cases.MAIN)
def test_a_family(tmp_path, name, reader):
    source = family_cases.write(tmp_path, reader, family_cases.MAIN[name])
    check(name, source)
    if (name, reader) == ("llama, untied", "folder"):  # of the others: the next test
        check(name, source, "bfloat16")


@pytest.mark.slow
@pytest.mark.parametrize("name", family_cases.MAIN)
def test_a_family_in_bfloat16(tmp_path, name):
    for reader in family_cases.READERS:
        check(name, family_cases.write(tmp_path, reader, family_cases.MAIN[name]), "bfloat16")


@pytest.mark.parametrize("name", family_cases.KINDS)
def test_a_kind(tmp_path, name):
    check(name, family_cases.write(tmp_path, "folder", family_cases.KINDS[name]))


@pytest.mark.parametrize("name", sorted(set(family_cases.IN_GGUF) - set(family_cases.MAIN)))
def test_a_kind_in_gguf(tmp_path, name):
    check(name, family_cases.write(tmp_path, "gguf", family_cases.KINDS[name]))


def test_the_table_of_the_docs_has_every_checkpoint():
    """Written by `python -m tests.backbones.parity --write`."""
    rows = [line for line in parity.DOCS.read_text().splitlines() if line.startswith("| ")]
    for name in family_cases.CASES:
        assert any(line.startswith(f"| {name} | folder |") for line in rows), name
    for name in parity.SECOND:
        assert any(line.startswith(f"| {parity.named(name)} | ") for line in rows), name
