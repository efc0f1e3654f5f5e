"""The byte tokenizer, chat templates, and SmolLM2's ids against transformers (slow: it needs the package)."""

import json
import pathlib

import pytest
import tokenizers

from molora_jax.errors import InputError
from molora_jax.io import tokenizer
from molora_jax.io.base import load_base

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures"
TALK = [{"role": "user", "content": "Grüße\n"}, {"role": "assistant", "content": "東京 🎉"}]


def test_bytes_round_trip():
    tok = tokenizer.byte_tokenizer()
    for text in ("", " ", "a b\n\n\tc", "Grüße 東京 🎉", "".join(map(chr, range(256)))):
        ids = tok.encode(text)
        assert tok.decode(ids) == text
        assert len(ids) == len(text.encode())
        assert all(0 <= i < 256 for i in ids)
    assert (tok.vocab_size, tok.pad_id, tok.bos_id, tok.eos_id) == (260, 256, 257, 259)


def test_specials_of_a_rendered_chat_encode_to_their_ids():
    tok = tokenizer.byte_tokenizer()
    text = tok.chat(TALK, add_generation_prompt=True)
    assert (
        text == "<|im_start|>user\nGrüße\n<|im_end|>\n<|im_start|>assistant\n東京 🎉<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = tok.encode_chat(TALK, add_generation_prompt=True)
    assert ids.count(258) == 3
    assert ids.count(259) == 2
    assert tok.decode(ids) == text
    assert "<|im_" not in tok.decode(ids, skip_special_tokens=True)


def test_no_template_means_lines_of_role_and_content():
    tok = tokenizer.Tokenizer(tokenizer.byte_tokenizer().inner)
    assert tok.chat(TALK[:1], add_generation_prompt=True) == "user: Grüße\n\nassistant:"
    assert (tok.bos_id, tok.eos_id, tok.pad_id) == (None, None, 0)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% if %}", "TemplateSyntaxError"),
        ("{{ messages[0].role.nothing.more }}", "UndefinedError"),
        ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{% for i in range(10**9) %}x{% endfor %}", "OverflowError"),
    ],
)
def test_hostile_templates(template, message):
    tok = tokenizer.Tokenizer(tokenizer.byte_tokenizer().inner, template=template)
    with pytest.raises(InputError, match=message):
        tok.chat(TALK, add_generation_prompt=False)


def test_a_folder_with_named_templates_and_token_objects(tmp_path):
    inner = tokenizer.byte_tokenizer().inner
    inner.enable_padding(length=9)
    inner.save(str(tmp_path / "tokenizer.json"))
    config = {
        "eos_token": {"content": "<|im_end|>", "lstrip": False},
        "chat_template": [{"name": "tool", "template": "no"}, {"name": "default", "template": "{{ eos_token }}!"}],
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tok = tokenizer.from_folder(tmp_path)
    assert tok.encode("abc") == tokenizer.byte_tokenizer().encode("abc")  # the saved padding is off
    assert tok.chat(TALK, add_generation_prompt=False) == "<|im_end|>!"
    assert (tok.bos_id, tok.eos_id, tok.pad_id) == (None, 259, 259)
    (tmp_path / "chat_template.jinja").write_text("file")
    assert tokenizer.from_folder(tmp_path).chat(TALK, add_generation_prompt=False) == "file"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<nope>"}))
    with pytest.raises(InputError, match="bos_token: got '<nope>'"):
        tokenizer.from_folder(tmp_path)


def test_encode_adds_no_special_token():
    inner = tokenizer.byte_tokenizer().inner
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", 257)]
    )
    assert tokenizer.Tokenizer(inner, bos="<|bos|>").encode("a") == tokenizer.byte_tokenizer().encode("a")


@pytest.mark.slow
def test_smollm2_ids_equal_those_of_transformers():
    tok = load_base("pkg:smollm2-135m-instruct").tokenizer
    fixture = json.loads((FIXTURES / "smollm2_tokens.json").read_text())
    for case in fixture["texts"]:
        assert tok.encode(case["text"]) == case["ids"], case
        assert tok.decode(case["ids"]) == case["text"]
    for case in fixture["chats"]:
        assert tok.chat(case["messages"], add_generation_prompt=True) == case["text"]
        assert tok.encode_chat(case["messages"], add_generation_prompt=True) == case["ids"]
    assert (tok.vocab_size, tok.bos_id, tok.eos_id, tok.pad_id) == (49152, 1, 2, 2)
