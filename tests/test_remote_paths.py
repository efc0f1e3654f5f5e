"""A URL of an object store is refused by name, before a folder called `gs:` is made."""

import pathlib

import pytest

import molora_jax
from configs import common, mixlora
from launch import flags
from molora_jax import config as schema
from molora_jax.errors import InputError, local
from molora_jax.runs.workdir import Workdir

MIXLORA = str(pathlib.Path(__file__).parents[1] / "configs/mixlora.py")


@pytest.mark.parametrize(
    "field, value",
    [("base.source", "dir:gs://bucket/model"), ("data.tasks", "morph,jsonl:s3://bucket/rows.jsonl"),
     ("data.valid", "jsonl:GS://bucket/rows.jsonl"), ("train.init_from", "gs://bucket/run")],
)  # fmt: skip
def test_a_field_with_a_url_is_named(field, value):
    config, (group, name) = mixlora.get_config(), field.split(".")
    config[group][name] = value
    with pytest.raises(InputError, match=f"{field}.*mounted"):
        schema.validate(config)


def test_a_workdir_or_a_run_with_a_url_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="gs://bucket/run"):
        Workdir("gs://bucket/run")
    with pytest.raises(InputError, match="s3://bucket/run"):
        molora_jax.load_run("s3://bucket/run@latest")
    with pytest.raises(InputError, match="--workdir.*gs://b"):
        flags.parse("Test.", [("--workdir", dict(metavar="DIR"))], [f"--config={MIXLORA}", "--workdir=gs://b/run"])
    assert not list(tmp_path.iterdir())


def test_ordinary_texts_are_not_urls():
    for text in ("C:/runs", "a:b", "runs/a", "jsonl:/data/rows.jsonl", "hf:org/name", ""):
        assert local("x", text) == text
    config = common.get_config()
    config.data.system = "Answer like https://example.org, politely."
    schema.validate(config, need_rules=False)
