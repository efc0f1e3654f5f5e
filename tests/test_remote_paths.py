"""A URL that cannot be served is refused by name, before a folder called `gs:` is made or anything compiles."""

import importlib.util
import pathlib

import pytest

import molora_jax
from configs import common, mixlora
from launch import flags
from molora_jax import config as schema
from molora_jax.errors import InputError, local
from molora_jax.runs.workdir import Workdir
from molora_jax.stores import served
from molora_jax.training.loop import train

MIXLORA = str(pathlib.Path(__file__).parents[1] / "configs/mixlora.py")


@pytest.fixture
def no_client(monkeypatch):
    """As if the extra were not installed."""
    find, gone = importlib.util.find_spec, ("gcsfs", "s3fs")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name in gone else find(name, *a))
    monkeypatch.setattr("fsspec.registry", {})


@pytest.mark.parametrize(
    "field, value",
    [("base.source", "dir:gs://bucket/model"), ("data.tasks", "morph,jsonl:s3://bucket/rows.jsonl"),
     ("data.valid", "jsonl:GS://bucket/rows.jsonl"), ("train.init_from", "gs://bucket/run")],
)  # fmt: skip
def test_a_field_with_a_url_needs_the_extra(field, value, no_client):
    config, (group, name) = mixlora.get_config(), field.split(".")
    config[group][name] = value
    with pytest.raises(InputError, match=rf"{field}.*molora_jax\[stores\]"):
        schema.validate(config)


def test_a_workdir_or_a_run_with_a_url_needs_the_extra(tmp_path, monkeypatch, no_client):
    monkeypatch.chdir(tmp_path)
    for opened in (lambda: Workdir("gs://bucket/run"), lambda: train(mixlora.get_config(), "gs://bucket/run"),
                   lambda: molora_jax.load_run("s3://bucket/run@latest")):  # fmt: skip
        with pytest.raises(InputError, match=r"workdir.*bucket/run.*molora_jax\[stores\]"):
            opened()
    with pytest.raises(InputError, match="--workdir.*gs://b"):
        flags.parse("Test.", [("--workdir", dict(metavar="DIR"))], [f"--config={MIXLORA}", "--workdir=gs://b/run"])
    assert not list(tmp_path.iterdir())


def test_what_no_store_takes_is_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for field in ("base.source", "train.init_from"):
        config, (group, name) = mixlora.get_config(), field.split(".")
        config[group][name] = "dir:az://bucket/model"
        with pytest.raises(InputError, match=f"{field}.*az://bucket/model.*gs://BUCKET/NAME"):
            schema.validate(config)
    with pytest.raises(InputError, match="--out.*gs://bucket/out.*mounted"):
        flags.parse("Test.", [("--out", dict(metavar="DIR"))], [f"--config={MIXLORA}", "--out=gs://bucket/out"])
    average = flags.load(flags.ROOT / "configs/average.py")
    with pytest.raises(InputError, match="workdir.*gs://bucket/new.*mounted"):
        molora_jax.perform(average, "gs://bucket/new")
    assert not list(tmp_path.iterdir())


def test_ordinary_texts_are_not_urls():
    for text in ("C:/runs", "a:b", "runs/a", "jsonl:/data/rows.jsonl", "hf:org/name", ""):
        assert local("x", text) == served("x", text) == text
    config = common.get_config()
    config.data.system = "Answer like https://example.org, politely."
    schema.validate(config, need_rules=False)
