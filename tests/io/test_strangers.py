"""Weight files and caches that are hostile, damaged or shared: a named error, or the right numbers."""

import json
import os
import socket
import subprocess
import sys
import types

import numpy as np
import pytest
import safetensors.numpy

from configs.common import get_config
from launch.generate import read_messages
from molora_jax import data
from molora_jax.errors import InputError
from molora_jax.io import fetch, gguf, parts, tensors
from molora_jax.io.base import load_base
from molora_jax.io.tokenizer import byte_tokenizer
from tests.io import tiny_files

CONFIG = tiny_files.llama_config()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MOLORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path):
    return tiny_files.write_hf_folder(tmp_path / "model", CONFIG, tiny_files.hf_tensors(CONFIG))


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(tiny_files.llama_gguf()[0])
    return path


def safetensors_file(path, header: str, data=bytes(64)):
    raw = header.encode("utf-8", "surrogatepass")
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return path


def entry(begin, end):
    return json.dumps({"dtype": "F32", "shape": [(end - begin) // 4], "data_offsets": [begin, end]})


@pytest.mark.parametrize(
    "header, message",
    [
        (f'{{"a": {entry(0, 16)}, "b": {entry(8, 24)}}}', "tensor b: got bytes of tensor a"),
        (f'{{"b": {entry(0, 64)}, "a": {entry(4, 4)}, "c": {entry(0, 0)}}}', None),
        (f'{{"a": {entry(0, 16)}, "a": {entry(16, 32)}}}', "two entries named a"),
        (f'{{"a": {entry(0, 16)}, "b": {entry(24, 64)}}}', "tensor b: got 8 bytes of no tensor before it"),
        (f'{{"a": {entry(8, 64)}}}', "tensor a: got 8 bytes of no tensor before it"),
        (f'{{"a": {entry(0, 48)}}}', "got 16 bytes behind the last tensor"),
        ("{}", "got 64 bytes behind the last tensor"),
        (f'{{"__metadata__": [1], "a": {entry(0, 64)}}}', r"__metadata__: got \[1\]"),
        (f'{{"__metadata__": {{"a": 1}}, "a": {entry(0, 64)}}}', "__metadata__: got"),
        (f'{{"a": {entry(0, 64)[:-1]}, "x": NaN}}}}', "no JSON object"),
        ('{"a": ' * 2000 + "1" + "}" * 2000, "no JSON object"),
        ('{"\\ud800": 1}', r"tensor \\ud800: got an entry without dtype"),
        ('{"a\\u0000b": {"dtype": "\\ud800", "shape": [1], "data_offsets": [0, 4]}}', r"dtype '\\+ud800'"),
    ],
)
def test_safetensors_headers(tmp_path, header, message):
    path = safetensors_file(tmp_path / "x.safetensors", header)
    if message is None:
        assert set(tensors.read(path)) == {"a", "b", "c"}
        return
    with pytest.raises(safetensors.SafetensorError):  # the official reader
        safetensors.numpy.load_file(path)
    with pytest.raises(InputError, match=message) as error:
        tensors.read(path)
    str(error.value).encode()  # it can be printed


@pytest.mark.parametrize(
    "name", ["a\0.safetensors", "\ud800.safetensors", "..", "", "/etc/x.safetensors", "a\\b.safetensors",
             "c:x.safetensors", "sub/x.safetensors", "x.bin", "a\n.safetensors", 3, None],
)  # fmt: skip
def test_an_index_names_files_of_its_folder(folder, name):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    with pytest.raises(InputError, match="weight_map: got") as error:
        load_base(f"dir:{folder}")
    str(error.value).encode()


@pytest.mark.parametrize(
    "text, message",
    [
        ("[" * 100_000, "index.json: got no JSON"),
        ('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "a twice"),
        ('{"weight_map": {}}', "weight_map"),
        ("[]", "weight_map"),
        ('{"weight_map": {"a": "x.safetensors"}}', r"x\.safetensors: got No such file"),
    ],
)
def test_an_index_that_is_broken(folder, text, message):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(InputError, match=message):
        load_base(f"dir:{folder}")


def test_an_index_that_names_another_shard(folder):
    values = tiny_files.hf_tensors(CONFIG)
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    safetensors.numpy.save_file({"x": np.ones(1, np.float32)}, folder / "b.safetensors")
    places = dict.fromkeys(values, "a.safetensors") | {"model.norm.weight": "b.safetensors", "x": "b.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    with pytest.raises(InputError, match=r"model\.norm\.weight: got it lies in a\.safetensors.*a tensor of b"):
        load_base(f"dir:{folder}")


@pytest.mark.parametrize(
    "text, message",
    [
        ("[" * 100_000, "config.json: got no JSON"),
        ('{"model_type": "\\ud800"}', "model_type"),
        (json.dumps({**CONFIG, "sliding_window": None, "alibi": json.loads("[" * 400 + "]" * 400)}), "alibi"),
        (json.dumps({**CONFIG, "hidden_size": float("inf")}), "hidden_size"),
    ],
)
def test_configs_of_strangers(folder, text, message):
    (folder / "config.json").write_text(text)
    with pytest.raises(InputError, match=message) as error:
        load_base(f"dir:{folder}")
    str(error.value).encode()


@pytest.mark.parametrize(
    "metadata, message",
    [
        ({"general.architecture": [1, 2]}, "general.architecture"),
        ({"llama.expert_count": [1, 2]}, "expert_count"),
        ({"llama.rope.scaling.type": [1, 2]}, "rope.scaling.type"),
        ({"llama.rope.scaling.factor": -4.0}, "rope.scaling.factor"),
        ({"llama.attention.head_count": [4, 4]}, "head_count"),
        ({"tokenizer.ggml.pre": [1, 2]}, "tokenizer.ggml.pre"),
        ({"tokenizer.ggml.model": [1, 2]}, "tokenizer.ggml.model"),
        ({"tokenizer.ggml.token_type": 3}, "token_type"),
        ({"split.count": "two"}, "split.count"),
    ],
)
def test_gguf_metadata_of_another_kind(model, metadata, message):
    model.write_bytes(tiny_files.llama_gguf(metadata=metadata)[0])
    with pytest.raises(InputError, match=message):
        load_base(f"gguf:{model}")


def test_gguf_tensors_that_share_bytes_and_keys_that_come_twice(tmp_path):
    content = tiny_files.gguf_bytes({"a.a": 1, "a.b": 2}, {n: ((32,), "F32", bytes(128)) for n in "vw"})
    at = content.index(tiny_files.gguf_string("w")) + 9 + 4 + 8 + 4
    path = tmp_path / "t.gguf"
    path.write_bytes(content[:at] + (64).to_bytes(8, "little") + content[at + 8 :])
    with pytest.raises(InputError, match="tensor w: got bytes of tensor v"):
        gguf.read(path)
    path.write_bytes(content.replace(b"a.b", b"a.a"))
    with pytest.raises(InputError, match=r"'a\.a' a second time"):
        gguf.read(path)


def test_every_file_of_a_converted_base_is_under_a_digest(cache, model):
    load_base(f"gguf:{model}")
    (converted,) = (cache / "converted").iterdir()
    names = {path.name for path in converted.iterdir()}
    texts = {"config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    assert names == {*texts, "model.safetensors", "molora.json"}
    rng = np.random.default_rng(0)
    for name in sorted(names):
        path = converted / name
        whole = path.read_bytes()
        for at in rng.integers(0, len(whole), 6):
            damaged = bytearray(whole)
            damaged[at] ^= 1 << int(rng.integers(0, 7))
            path.write_bytes(damaged)
            with pytest.raises(InputError, match="damaged: delete|Fetch the file again|safetensors"):
                load_base(f"gguf:{model}")
        path.unlink()
        with pytest.raises(InputError, match=r"damaged: delete|No such file"):
            load_base(f"gguf:{model}")
        path.write_bytes(whole)
    for extra in ("chat_template.jinja", "special_tokens_map.json", "model.safetensors.index.json"):
        (converted / extra).write_text("{}")
        with pytest.raises(InputError, match=f"{extra}.*damaged"):
            load_base(f"gguf:{model}")
        (converted / extra).unlink()
    load_base(f"gguf:{model}")


def test_a_remembered_digest_is_not_believed_when_its_note_is_damaged(cache, model):
    right = load_base(f"gguf:{model}").digest
    (note,) = (cache / "digests").iterdir()
    whole = note.read_bytes()
    for at in range(0, len(whole), 9):
        note.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert fetch.remembered_sha256(model) == right


def test_a_cache_is_shared_as_the_umask_says(cache, model):
    before = os.umask(0o002)
    try:
        load_base(f"gguf:{model}")
    finally:
        os.umask(before)
    for path in cache.rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o775 if path.is_dir() else 0o664), path


def test_what_a_killed_process_left_is_swept_at_once(cache, model):
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    dead = parts.temporary(cache / "converted").name.replace(f"-{os.getpid()}-", f"-{gone.stdout.strip()}-")
    mine, elsewhere = parts.temporary(cache / "converted").name, ".part-ffffffffffff-1-00"
    for name in (dead, mine, elsewhere):
        (cache / "converted" / name).mkdir(parents=True)
    load_base(f"gguf:{model}")
    left = {path.name for path in (cache / "converted").glob(".part-*")}
    assert left == {mine, elsewhere}


@pytest.mark.parametrize("commit", ["a" * 40, "snapshot"])
def test_the_hub_gives_one_copy_of_the_weights(tmp_path, monkeypatch, commit):
    """`snapshot_download` as it is: patterns over the repository's names decide what arrives."""
    import fnmatch

    values = tiny_files.hf_tensors(CONFIG)
    whole = tiny_files.write_hf_folder(tmp_path / "whole", CONFIG, values)
    (whole / "model.safetensors").unlink()
    names = sorted(values)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, held in shards.items():
        safetensors.numpy.save_file({name: values[name] for name in held}, whole / file)
    places = {name: file for file, held in shards.items() for name in held}
    (whole / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    more = (
        "pytorch_model.bin",
        "consolidated.safetensors",
        "onnx/model.safetensors",
        "onnx/config.json",
        "tf_model.h5",
    )
    for name in more:
        (whole / name).parent.mkdir(exist_ok=True)
        (whole / name).write_text("{}")
    calls = []

    def snapshot_download(repository, *, revision, allow_patterns):
        calls.append(revision)
        for path in whole.rglob("*"):
            name = path.relative_to(whole).as_posix()
            fits = lambda patterns, name=name: any(fnmatch.fnmatch(name, pattern) for pattern in patterns)  # noqa: E731
            if path.is_file() and fits(allow_patterns):
                target = tmp_path / commit / name
                target.parent.mkdir(exist_ok=True)
                target.write_bytes(path.read_bytes())
        return str(tmp_path / commit)

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=snapshot_download))
    base = load_base("hf:org/name@main")
    np.testing.assert_array_equal(base.params["embed"], values["model.embed_tokens.weight"])
    got = {path.relative_to(tmp_path / commit).as_posix() for path in (tmp_path / commit).rglob("*")}
    texts = {"config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    assert got == {*shards, *texts, "model.safetensors.index.json"}
    assert calls == ["main", commit if len(commit) == 40 else "main"]


def special(path, kind):
    """Something at `path` that is no plain file."""
    path.unlink(missing_ok=True)
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        socket.socket(socket.AF_UNIX).bind(str(path))
    return path


@pytest.mark.parametrize("kind", ["FIFO", "directory", "device", "socket"])
def test_what_is_no_plain_file_is_refused_and_not_waited_for(folder, tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)  # a socket's path is short
    path = special(tmp_path / "x.gguf", kind)
    config = get_config().data
    config.tasks = f"jsonl:{path}"
    for opens in (
        lambda: load_base(f"gguf:{path}"),
        lambda: data.build(config, tokenizer=byte_tokenizer(), batch_size=1, seed=0),
        lambda: read_messages(path),
    ):
        with pytest.raises(InputError, match=f"x.gguf: got a {kind}, not a plain file"):
            opens()
    for name in ("chat_template.jinja", "generation_config.json", "tokenizer.json", "model.safetensors", "config.json"):
        kept = (folder / name).read_bytes() if (folder / name).exists() else None
        special(folder / name, kind if kind != "socket" else "FIFO")
        with pytest.raises(InputError, match=f"{name}: got a .*, not a plain file"):
            load_base(f"dir:{folder}")
        (folder / name).rmdir() if kind == "directory" else (folder / name).unlink()
        if kept is not None:
            (folder / name).write_bytes(kept)
    load_base(f"dir:{folder}")


def test_json_files_with_a_byte_order_mark(folder, tmp_path):
    (folder / "chat_template.jinja").write_text("[{{ messages[0].content }}]")
    before = load_base(f"dir:{folder}")
    for name in ("config.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        (folder / name).write_bytes(b"\xef\xbb\xbf" + (folder / name).read_bytes())
    after = load_base(f"dir:{folder}")
    assert after.config == before.config and after.tokenizer.digest() == before.tokenizer.digest()
    talk = [dict(role="user", content="hi")]
    (tmp_path / "talk.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(talk).encode())
    assert read_messages(tmp_path / "talk.json") == (talk, None)
