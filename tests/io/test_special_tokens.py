"""Special tokens that stand beside tokenizer.json: transformers' ids, and what is refused."""

import json
import pathlib

import pytest

from molora_jax.errors import InputError
from molora_jax.io import tokenizer
from tests.fixtures import token_folders

EXPECTED = json.loads((pathlib.Path(__file__).parents[1] / "fixtures" / "special_tokens.json").read_text())["cases"]


@pytest.mark.parametrize("name", token_folders.CASES)
def test_ids_and_tokens_equal_those_of_transformers(tmp_path, name):
    expected = EXPECTED[name]
    tok = tokenizer.from_folder(token_folders.write(tmp_path, name))
    added = {
        str(i): [t.content, t.lstrip, t.rstrip, t.single_word, t.normalized, t.special]
        for i, t in tok.inner.get_added_tokens_decoder().items()
    }
    assert added == expected["added"]
    assert [tok.encode(text) for text in token_folders.TEXTS] == expected["texts"]
    assert tok.encode_chat(token_folders.TALK, add_generation_prompt=True) == expected["chat"]
    assert (tok.eos_id, tok.pad_id, tok.specials) == (expected["eos"], expected["pad"], expected["named"])


def changed(folder, name="all_added", **files):
    token_folders.write(folder, name)
    for file, value in files.items():
        path = folder / f"{file}.json"
        known = json.loads(path.read_text()) if file == "tokenizer_config" else {}
        path.write_text(json.dumps(known | value))
    return folder


TOKEN = dict(content="<x>", special=True)
WRONG = {
    "another id": (dict(added_tokens_decoder={"300": TOKEN}), "added_tokens_decoder: '<x>': got the id 300"),
    "a decoder that is none": (dict(added_tokens_decoder=[TOKEN]), "added_tokens_decoder: got"),
    "a name for an id": (dict(added_tokens_decoder={"x": TOKEN}), "added_tokens_decoder: got"),
    "no content": (dict(added_tokens_decoder={"261": dict(special=True)}), "added_tokens_decoder: 261: got"),
    "a flag that is none": (dict(added_tokens_decoder={"261": TOKEN | dict(lstrip="no")}), "added_tokens_decoder: 261"),
    "a number for a token": (dict(additional_special_tokens=[7]), "additional_special_tokens: got 7"),
    "a text for a list": (dict(extra_special_tokens="<x>"), "extra_special_tokens: got '<x>'"),
    "a number for a name's token": (dict(extra_special_tokens=dict(image_token=7)), "image_token: got 7"),
    "half a surrogate pair": (dict(unk_token="\ud800"), "unk_token: got .*Unicode"),
    "a number for unk": (dict(unk_token=7), "unk_token: got 7"),
    "an end that is nowhere": (dict(eos_token="<nope>"), "eos_token: got '<nope>'"),
    "split specials": (dict(split_special_tokens=True), "split_special_tokens: got true"),
    "another space": (dict(add_prefix_space=True), "add_prefix_space: got true"),
    "a word for a flag": (dict(add_prefix_space="no"), "add_prefix_space: got 'no'"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_refused(tmp_path, name):
    settings, message = WRONG[name]
    with pytest.raises(InputError, match=message):
        tokenizer.from_folder(changed(tmp_path, tokenizer_config=settings))


@pytest.mark.parametrize(
    "value", [{"<x>": 300}, {"<x>": "261"}, {"<x>": True}, {"<x>": 261, "<y>": 261}, {"</s>": 261}]
)
def test_a_wrong_id_in_the_older_file(tmp_path, value):
    with pytest.raises(InputError, match=r"added_tokens\.json: "):
        tokenizer.from_folder(changed(tmp_path, added_tokens=value))


def test_nothing_said_twice_changes_the_digest(tmp_path):
    plain = tokenizer.from_folder(changed(tmp_path / "a")).digest()
    said = json.loads((tmp_path / "a" / "tokenizer.json").read_text())["added_tokens"]
    config = dict(
        added_tokens_decoder={str(token.pop("id")): token for token in said}, split_special_tokens=False,
        additional_special_tokens=["<|im_start|>"], add_prefix_space=False,
    )  # fmt: skip
    beside = dict(special_tokens_map=dict(eos_token="</s>"), added_tokens={"<pad>": 256})
    assert tokenizer.from_folder(changed(tmp_path / "b", tokenizer_config=config)).digest() == plain
    assert tokenizer.from_folder(changed(tmp_path / "c", **beside)).digest() == plain
