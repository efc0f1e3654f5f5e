"""A folder's files, however it is read or handed on: the same tokenizer; and links that lead nowhere."""

import fnmatch
import json
import shutil
import sys
import types

import pytest

from molora_jax.errors import InputError
from molora_jax.io import huggingface, model_files
from molora_jax.io.base import load_base
from molora_jax.io.model_files import TOOL_TEMPLATE
from tests.io import tiny_files
from tests.stores.fake import FakeGS

CONFIG = tiny_files.llama_config()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """With every file that is read, each of which says something of its own, and others of no use."""
    monkeypatch.setenv("MOLORA_CACHE", str(tmp_path / "cache"))
    made = tiny_files.write_hf_folder(tmp_path / "model", CONFIG, tiny_files.hf_tensors(CONFIG))
    (made / TOOL_TEMPLATE).parent.mkdir()
    config = json.loads((made / "tokenizer_config.json").read_text())
    texts = {
        "tokenizer_config.json": dict(config, chat_template="no", extra_special_tokens=dict(image_token="<|bos|>")),
        "special_tokens_map.json": dict(unk_token="<|im_start|>"), "added_tokens.json": {"<more>": 260},
        "generation_config.json": dict(eos_token_id=[259, 258]), "chat_template.json": {},
        "chat_template.jinja": "{{ image_token }}{{ messages[0].content }}",
        TOOL_TEMPLATE: "{{ tools | length }} tools",
        "onnx/config.json": {}, "README.md": "", "pytorch_model.bin": "",
    }  # fmt: skip
    for name, value in texts.items():
        (made / name).parent.mkdir(exist_ok=True)
        (made / name).write_text(value if isinstance(value, str) else json.dumps(value))
    return made


def test_every_file_counts(folder):
    tok = load_base(f"dir:{folder}").tokenizer
    talk = [dict(role="user", content="<more>")]
    assert tok.chat(talk, add_generation_prompt=True) == "<|bos|><more>"
    assert tok.chat(talk, add_generation_prompt=True, tools=[{}]) == "1 tools"
    assert tok.encode("<more>") == [260] and tok.end_ids == (259, 258) and tok.specials["unk_token"] == "<|im_start|>"
    unread = {"config.json", "tokenizer.json", "chat_template.json"}
    for name in set(model_files.TEXTS) - unread:
        text = (folder / name).read_bytes()
        (folder / name).unlink()
        assert load_base(f"dir:{folder}").tokenizer.digest() != tok.digest(), name
        (folder / name).write_bytes(text)


@pytest.mark.parametrize("way", ["written", "hub", "store"])
def test_the_same_tokenizer_however_it_is_handed_on(folder, tmp_path, monkeypatch, way):
    base, target = load_base(f"dir:{folder}"), tmp_path / "again"
    if way == "written":
        target.mkdir()
        huggingface.write_base(target, base)
        again = load_base(f"dir:{target}")
    elif way == "hub":

        def snapshot_download(repository, *, revision, allow_patterns):
            for path in (path for path in folder.rglob("*") if path.is_file()):
                name = path.relative_to(folder).as_posix()
                if any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                    (target / name).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(path, target / name)
            return str(target)

        monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=snapshot_download))
        again = load_base("hf:org/name")
    else:
        store = FakeGS.install(monkeypatch)
        for i, path in enumerate(path for path in folder.rglob("*") if path.is_file()):
            store.objects[f"bucket/model/{path.relative_to(folder).as_posix()}"] = (path.read_bytes(), i)
        again = load_base("dir:gs://bucket/model")
        target = again.folder
    assert again.tokenizer.digest() == base.tokenizer.digest()
    found = {path.relative_to(target).as_posix() for path in target.rglob("[!.]*") if path.is_file()}
    assert found == {*model_files.TEXTS, model_files.WEIGHTS}


@pytest.mark.parametrize("name", [*model_files.TEXTS, model_files.WEIGHTS, model_files.INDEX])
def test_a_link_to_nothing_is_no_missing_file(folder, tmp_path, name):
    if name == model_files.INDEX:
        (folder / model_files.WEIGHTS).unlink()
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to("../blobs/gone")
    with pytest.raises(InputError, match=rf"{name}: got a link to a file that does not exist"):
        if name == "chat_template.json":  # nobody reads it here
            huggingface.write_base(tmp_path, load_base(f"dir:{folder}"))
        load_base(f"dir:{folder}")


def test_a_folder_that_is_a_link_to_nothing(folder):
    shutil.rmtree((folder / TOOL_TEMPLATE).parent)
    (folder / TOOL_TEMPLATE).parent.symlink_to("../gone")
    with pytest.raises(InputError, match=TOOL_TEMPLATE):
        load_base(f"dir:{folder}")
