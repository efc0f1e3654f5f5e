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


def broken(change):
    content = json.loads(tokenizer.byte_tokenizer().inner.to_str())
    change(content)
    return json.dumps(content)


def model(**changes):
    return lambda content: content["model"].update(changes)


def part(name, **fields):
    return lambda content: content.update({name: fields})


LETTERS = {"a": 0, "b": 1, "ab": 2, "é": 3, "aé": 4}
LOAD = {  # what the package panics at, aborts at or hangs at while it reads
    "no tokenizer": lambda content: content.clear(),
    "a merge shorter than its prefix": model(vocab=LETTERS, merges=[["a", "b"]], continuing_subword_prefix="####"),
    "a prefix that cuts a character": model(vocab=LETTERS, merges=[["a", "é"]], continuing_subword_prefix="#"),
    "a huge id": model(vocab={"a": 2**31}, merges=[]),
    "a broken normalizer": part("normalizer", type="Precompiled", precompiled_charsmap="AAAA"),
    "nested too deep": lambda content: content.update(normalizer=json.loads("[" * 500 + "]" * 500)),
}
USE = {  # what it panics at while it encodes
    "pieces of no length": part("pre_tokenizer", type="FixedLength", length=0),
    "an empty pattern": part("normalizer", type="Replace", pattern={"String": ""}, content="xx"),
    "a normalizer that reads outside": part("normalizer", type="Precompiled", precompiled_charsmap="BAAAAP////8="),
    "an unknown token": model(vocab={"a": 0}, merges=[], unk_token="zzz"),
}


@pytest.mark.parametrize("name", LOAD)
def test_a_file_that_the_package_cannot_read_is_an_error(tmp_path, name):
    (tmp_path / "tokenizer.json").write_text(broken(LOAD[name]))
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("name", USE)
def test_a_panic_while_encoding_is_an_error(tmp_path, name):
    (tmp_path / "tokenizer.json").write_text(broken(USE[name]))
    with pytest.raises(InputError):
        tokenizer.from_folder(tmp_path).encode("a b")


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        tokenizer.from_folder(tmp_path)
    with pytest.raises(InputError, match="valid Unicode"):
        tokenizer.byte_tokenizer().encode("\ud800")


def folder(path, settings=None, **files):
    path.mkdir(exist_ok=True)
    tokenizer.byte_tokenizer().inner.save(str(path / "tokenizer.json"))
    for name, value in {"tokenizer_config": settings, **files}.items():
        if value is not None:
            (path / f"{name}.json").write_text(json.dumps(value))
    return path


def test_every_end_token_of_all_three_files(tmp_path):
    three = dict(generation_config={"eos_token_id": [259, 258]}, config={"eos_token_id": 256})
    ends = folder(tmp_path, dict(eos_token="<|bos|>"), **three)
    tok = tokenizer.from_folder(ends)
    assert (tok.eos_id, tok.end_ids) == (257, (257, 259, 258, 256))
    only_ids = folder(
        tmp_path / "ids", generation_config={"eos_token_id": 259, "bos_token_id": 257, "pad_token_id": -1}
    )
    tok = tokenizer.from_folder(only_ids)
    assert (tok.eos_id, tok.end_ids, tok.bos_id, tok.pad_id, tok.bos, tok.eos) == (259, (259,), 257, 259, None, None)
    map_only = folder(tmp_path / "map", special_tokens_map={"eos_token": {"content": "<|im_end|>"}})
    assert tokenizer.from_folder(map_only).end_ids == (259,)
    for bad in ("259", [259, "x"], True, -1, 2.5):
        with pytest.raises(InputError, match=r"generation_config.json: eos_token_id"):
            tokenizer.from_folder(folder(tmp_path / "bad", generation_config={"eos_token_id": bad}))


def test_bos_where_the_tokenizer_says_so(tmp_path):
    specials = [("<|bos|>", 257), ("<|pad|>", 256)]
    adds = tokenizers.processors.TemplateProcessing(single="<|bos|> $A <|pad|>", special_tokens=specials)
    settings = dict(bos_token="<|bos|>", eos_token="<|im_end|>")
    for saved, config, prefix in (
        (adds, {}, (257,)), (adds, {"add_bos_token": False}, ()),
        (None, {}, ()), (None, {"add_bos_token": True}, (257,)),
    ):  # fmt: skip
        path = folder(tmp_path, settings | config)
        inner = tokenizer.byte_tokenizer().inner
        if saved is not None:
            inner.post_processor = saved
        inner.save(str(path / "tokenizer.json"))
        tok = tokenizer.from_folder(path)
        assert tok.prefix_ids == prefix
        assert tok.encode_plain("a") == [*prefix, *tok.encode("a")] and tok.encode_plain("<|bos|>a").count(257) == 1
        assert tok.encode_chat(TALK, add_generation_prompt=True)[:1] == list(prefix or tok.encode("u"))
    with pytest.raises(InputError, match="add_bos_token"):
        tokenizer.from_folder(folder(tmp_path, dict(add_bos_token=True)))


def test_the_digest_knows_all_that_makes_ids(tmp_path):
    def digest(settings=(), change=lambda inner: None, **files):
        known = dict(bos_token="<|bos|>", eos_token="<|im_end|>", chat_template="a")
        path = folder(tmp_path, known | dict(settings), **files)
        inner = tokenizer.byte_tokenizer().inner
        change(inner)
        inner.save(str(path / "tokenizer.json"))
        return tokenizer.from_folder(path).digest()

    one = digest()
    assert one == digest()
    others = [
        digest(dict(chat_template="b")), digest(dict(eos_token="<|im_start|>")), digest(dict(bos_token="<|pad|>")),
        digest(dict(add_bos_token=True)), digest(dict(unk_token="<|pad|>")), digest(dict(pad_token="<|bos|>")),
        digest(generation_config={"eos_token_id": [258]}), digest(change=lambda inner: inner.add_tokens(["xy"])),
        digest(dict(chat_template=[dict(name="default", template="a"), dict(name="tool_use", template="t")])),
    ]  # fmt: skip
    assert len({one, *others}) == 1 + len(others)


def test_a_template_for_tools(tmp_path):
    named = [dict(name="default", template="plain"), dict(name="tool_use", template="{{ tools | length }} tools")]
    tok = tokenizer.from_folder(folder(tmp_path, dict(chat_template=named)))
    assert tok.chat(TALK, add_generation_prompt=True) == "plain"
    assert tok.chat(TALK, add_generation_prompt=True, tools=[{"name": "f"}]) == "1 tools"
    with pytest.raises(InputError, match="one named default"):
        tokenizer.from_folder(folder(tmp_path, dict(chat_template=named[1:])))
    assert tok.chat(TALK, add_generation_prompt=True, x=1) == "plain"


def test_arguments_of_the_template():
    tok = tokenizer.Tokenizer(tokenizer.byte_tokenizer().inner, template="{{ thinking }} {{ eos_token is defined }}")
    assert tok.chat(TALK, add_generation_prompt=True, thinking=False) == "False False"


def test_a_byte_order_mark_before_the_json(tmp_path):
    inner = tokenizer.byte_tokenizer().inner
    (tmp_path / "tokenizer.json").write_bytes(b"\xef\xbb\xbf" + inner.to_str().encode())
    assert tokenizer.from_folder(tmp_path).encode("cat") == inner.encode("cat").ids
