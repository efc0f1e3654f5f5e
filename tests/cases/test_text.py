"""What the models of other people showed: templates, ids, end tokens, generation."""

import json

import numpy as np
import pytest
import tokenizers

from launch import generate as launcher
from molora_jax.config.resolve import resolve_template_args
from molora_jax.errors import InputError
from tests.cases.common import (
    CHATML,
    GOOD,
    PLAIN,
    SPECIALS,
    TOKENS,
    base_run,
    byte_inner,
    config,
    dataset,
    examples,
    folder,
    talk,
    tokenizer_folder,
    weights,
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MOLORA_CACHE", str(tmp_path / "cache"))


REFUSE = {
    "no system turn": "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
    "[INST] {{ m['content'] }} [/INST]{% elif m['role'] == 'assistant' %}{{ m['content'] + eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant turns') }}{% endif %}{% endfor %}",
    "turns in turn": "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('turns must alternate') }}{% endif %}[{{ m['role'] }}] {{ m['content'] }} {% endfor %}",
    "the user first": "{% if messages | length < 1 or messages[0]['role'] != 'user' %}"
    "{{ raise_exception('the first turn must be the user') }}{% endif %}"
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}",
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSE)
def test_only_the_users_own_conversations_are_rendered(tmp_path, name):
    """A template that refuses a system turn trains on data without one; ours is refused."""
    path = tokenizer_folder(tmp_path, template=REFUSE[name])
    assert len(examples(dataset(GOOD, path)[0])) > 20
    assert len(examples(dataset(PLAIN, path)[0])) > 20
    with pytest.raises(InputError, match=r"d\.jsonl, row 1"):
        dataset(GOOD, path, system="Be brief.")


def test_a_row_that_the_template_refuses_is_a_bad_row(tmp_path):
    bad = talk(("user", "x"), ("user", "y"), ("assistant", "z"))
    path = tokenizer_folder(tmp_path, template=REFUSE["turns in turn"])
    with pytest.raises(InputError, match=r"d\.jsonl, row 21: .*turns must alternate"):
        dataset([*GOOD[:20], bad, *GOOD[20:]], path)
    row = dataset([*GOOD[:20], bad, *GOOD[20:]], path, bad_rows="skip")[0].report()["tasks"]["d"]
    assert row["train"] + row["valid"] + row["test"] == 40 and row["bad_rows"] == 1
    with pytest.raises(InputError, match="no good one"):
        dataset([bad], path, bad_rows="skip")


BASE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}: {{ m['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}"
)
CHANGES = {
    "assistant turns": ("{{ m['content'] }}", "{% if m['role'] == 'assistant' %}ANSWER {% endif %}{{ m['content'] }}"),
    "trim": ("m['content'] }}", "m['content'] | trim }}"),
    "long conversations": ("{% for m", "{% if messages | length > 2 %}LONG {% endif %}{% for m"),
}  # fmt: skip


@pytest.mark.parametrize("seq_len", [64, 96])  # at 64, what the template puts before the answer does not fit
@pytest.mark.parametrize("name", CHANGES)
def test_the_cache_knows_every_part_of_the_template(tmp_path, name, seq_len):
    rows = [talk(("user", f"q{i}  "), ("assistant", "a"), ("user", "more"), ("assistant", "b")) for i in range(40)]
    dataset(rows, tokenizer_folder(tmp_path, template=BASE), seq_len=seq_len)
    data, tok = dataset(rows, tokenizer_folder(tmp_path, template=BASE.replace(*CHANGES[name])), seq_len=seq_len)
    chat = rows[1]["messages"][:3]
    prompt = tok.chat(chat, add_generation_prompt=True)
    contexts = {tok.decode(list(e.context_ids)): tok.decode(list(e.target_ids)) for e in examples(data)}
    assert contexts[prompt] == ("ANSWER b</s>" if name == "assistant turns" and seq_len == 96 else "b</s>")
    cut = data.report()["tasks"]["d"]["truncated"]
    assert (cut > 0) == (name == "assistant turns" and seq_len == 64)


@pytest.mark.parametrize(
    ("template", "first", "count"), [(None, 257, 1), ("{{ bos_token }}" + CHATML, 257, 1), (CHATML, 258, 0)]
)
def test_bos_once_where_the_tokenizer_or_the_template_says_so(tmp_path, template, first, count):
    inner = byte_inner()
    inner.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 257)])
    data, tok = dataset(PLAIN, tokenizer_folder(tmp_path, inner=inner, template=template))
    for example in examples(data):
        assert example.context_ids[0] == first and example.context_ids.count(257) == count
    prompt = tok.encode_chat([dict(role="user", content=examples(data)[0].prompt)], add_generation_prompt=True)
    assert prompt == list(examples(data)[0].context_ids)


def test_truncation_keeps_the_end(tmp_path):
    rows = [dict(prompt="x" * 300 + str(i), target=f"answer {i}") for i in range(30)]
    rows += [dict(prompt=f"p{i}", target="y" * 200 + str(i)) for i in range(30)]
    path = tokenizer_folder(tmp_path)
    data, tok = dataset(rows, path, overlong="truncate")
    found = examples(data)
    assert len(found) > 20
    for example in found:
        assert len(example.ids) - 1 <= 64 and tok.decode(list(example.context_ids)).endswith("assistant\n")
        assert tok.decode(list(example.target_ids)) == example.target + "</s>"
        assert example.num_targets == len(example.target_ids)
    assert data.report()["tasks"]["d"]["skipped"] == 30
    with pytest.raises(InputError, match="no training example that fits"):
        dataset(rows, path, overlong="skip")


def test_train_on_all(tmp_path):
    """The mask reaches the batches: every assistant turn has a loss, after truncation what is left of them."""
    rows = [talk(("user", f"q{i}"), ("assistant", "one"), ("user", "more"), ("assistant", "two")) for i in range(40)]
    path = tokenizer_folder(tmp_path, settings={**TOKENS, "eos_token": "<|im_end|>"})
    for train_on, words in (("last", ["two"]), ("all", ["one", "two"])):
        data, tok = dataset(rows, path, train_on=train_on, seq_len=128)
        wanted = "".join(word + "<|im_end|>" for word in words)
        batch = data.train.batch(0)
        weight = batch["loss_weight"] > 0
        for segment in range(1, batch["segment_ids"][0].max() + 1):
            here = weight[0] & (batch["segment_ids"][0] == segment)
            assert tok.decode(batch["targets"][0][here].tolist()) == wanted
        assert weight.sum(1).max() <= data.train.targets_per_row
        (held,) = data.heldout_batches(data.heldout("valid", 1), 1)
        assert tok.decode(held["targets"][held["loss_weight"] > 0].tolist()) == wanted
        assert tok.decode(list(data.heldout("valid", 1)[0].target_ids)) == "two<|im_end|>"
    cut, tok = dataset(rows, path, train_on="all", seq_len=38, overlong="truncate")
    whole = [e for e in examples(cut) if tok.decode(list(e.target_ids)) == "two<|im_end|>"]
    assert len(whole) == len(examples(cut)) > 20 and {e.num_targets for e in whole} <= {4, 5, 6, 7, 8}


def stepper(path, **files):
    """A model that after any token says <|im_end|> (259), and after that "x" for ever."""
    cfg = config(**files.pop("more", {}))
    arrays = weights(cfg)
    for name in arrays:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            arrays[name][:] = 0
    arrays["model.norm.weight"][:] = 1
    embed = np.zeros((288, 32), np.float32)
    embed[:, 0], embed[259], embed[259, :2], embed[87, 1] = 1, 0, 3, 10
    arrays["model.embed_tokens.weight"] = embed
    return base_run(folder(path, cfg=cfg, arrays=arrays, **files))


def generated(run, **options):
    seen, text = [], run.text
    run.text = lambda ids: seen.append(list(ids)) or text(ids)
    run.generate("hi", max_new_tokens=8, **options)
    return seen[0]


def test_every_end_token_ends_an_answer(tmp_path):
    only = dict(settings={})
    for name, files in {
        "a list": dict(generation_config={"eos_token_id": [260, 259]}),
        "generation_config": dict(generation_config={"eos_token_id": 259}, **only),
        "config": dict(more={"eos_token_id": [260, 259]}, **only),
        "tokenizer_config": dict(settings={"eos_token": "<|im_end|>"}),
    }.items():
        assert generated(stepper(tmp_path / name, **files)) == [259], name
    plain = byte_inner(SPECIALS[:3])
    plain.add_tokens(["<|im_end|>", "</s>"])  # not marked as special
    run = stepper(tmp_path / "plain", inner=plain, settings={"eos_token": "<|im_end|>"})
    assert generated(run) == [259] and run.text([87, 259]) == "x"
    neither = stepper(tmp_path / "neither")
    assert generated(neither) == [259] + [87] * 7
    assert generated(neither, stop="xxx") == [259] + [87] * 3
    assert neither.generate("hi", max_new_tokens=8, stop=["nothing", "xx"]) == ""
    assert neither.generate("hi", max_new_tokens=8, stop=["nothing"]) == "x" * 7


def test_a_conversation_is_answered(tmp_path, capsys):
    run = base_run(folder(tmp_path / "m", template="{{ tools | tojson if tools }}" + CHATML))
    turns = [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c")]
    turns = [dict(role=role, content=content) for role, content in turns]
    whole = run.tokenizer.encode(run.tokenizer.chat(turns, add_generation_prompt=True))
    assert run.prompt_ids(turns) == whole
    with run.config.unlocked():
        run.config.data.system = "Be brief."
    assert run.prompt_ids(turns) == whole
    assert run.prompt_ids(turns[1:]) == run.prompt_ids([dict(role="system", content="Be brief."), *turns[1:]])
    one = run.generate(turns, max_new_tokens=3)
    assert isinstance(one, str)
    assert run.generate([turns, "hi"], max_new_tokens=3) == [one, run.generate("hi", max_new_tokens=3)]
    parts = [dict(role="user", content=[dict(type="text", text="h"), dict(type="text", text="i")])]
    assert run.prompt_ids(parts) == run.prompt_ids([dict(role="user", content="hi")])  # as a row's are joined
    image = [dict(role="user", content=[dict(type="image", url="x")])]
    odd = image, [dict(role="owner", content="x")], [dict(role="user", content=3)]
    for bad in (turns[:3], [{"content": "x"}], [turns, 3], [[]], 3, " ", *odd):
        with pytest.raises(InputError, match="prompt"):
            run.generate(bad, max_new_tokens=3)
    with pytest.raises(InputError, match="stop"):
        run.generate("hi", stop=[""])
    file = tmp_path / "talk.json"
    for content in (turns, {"messages": turns, "tools": [{"name": "f"}]}):
        file.write_text(json.dumps(content))
        source = f"--config.base.source=dir:{tmp_path / 'm'}"
        launcher.run(["--base", source, f"--messages={file}", "--max_new_tokens=3", "--stop=q", "--stop=z"])
        tools = None if isinstance(content, list) else content["tools"]
        run.config.data.system = ""
        want = run.generate(turns, max_new_tokens=3, tools=tools, stop=["q", "z"])
        assert capsys.readouterr().out == want + "\n"


def test_what_training_refuses_generation_refuses(tmp_path, caplog):
    """Tools and turns that the template does not write; a field of an earlier turn is said."""
    path = tokenizer_folder(tmp_path / "m")
    with pytest.raises(InputError, match="got tools, of which"):
        dataset([dict(talk(("user", "a"), ("assistant", "b")), tools=[dict(name="f")])], path)
    run = base_run(folder(tmp_path / "m"))
    call = dict(role="assistant", content=None, tool_calls=[dict(function=dict(name="f"))])
    calls = [dict(role="user", content="hi"), call, dict(role="tool", content="5"), dict(role="user", content="so?")]
    with pytest.raises(InputError, match="^tools: got tools, of which the chat template writes nothing"):
        run.generate("hi", tools=[dict(name="f")])
    for odd in ("f(", [3], 3):
        with pytest.raises(InputError, match="^tools: got tools"):
            run.prompt_ids("hi", tools=odd)
    assert run.prompt_ids(calls) and "writes nothing of 'tool_calls' of the turns" in caplog.text
    source = f"--config.base.source=dir:{tmp_path / 'm'}"
    (tmp_path / "talk.json").write_text(json.dumps(dict(messages=calls, tools=[dict(name="f")])))
    with pytest.raises(InputError, match="--messages=.*talk.json: got tools, of which"):
        launcher.run(["--base", source, f"--messages={tmp_path / 'talk.json'}"])
    only = "{% for m in messages %}{% if m.role == 'user' %}[{{ m.content }}]{% endif %}"
    users = base_run(folder(tmp_path / "u", template=only + "{% endfor %}"))
    assert users.prompt_ids("hi")
    with pytest.raises(InputError, match="^prompt: got a turn of role 'assistant', of which"):
        users.prompt_ids(
            [dict(role="user", content="a"), dict(role="assistant", content="NO"), dict(role="user", content="c")]
        )
    with users.config.unlocked():
        users.config.data.system = "Be brief."
    with pytest.raises(InputError, match="^data.system: got 'Be brief.', of which"):
        users.prompt_ids("hi")
    with run.config.unlocked():
        run.config.data.raw = True
    with pytest.raises(InputError, match="^tools: got descriptions of tools; expected none: .*data.raw=True"):
        run.prompt_ids("hi", tools=[dict(name="f")])


BAD_FILES = {
    '[{"role": "user"': "invalid JSON",
    "3": "a JSON number",
    "[]": "no turn",
    "[3]": r"messages\[0\] of type number",
    '{"turns": []}': "unknown fields turns",
    '{"messages": [], "tools": 3}': "no turn",
    '{"messages": [{"role": "user", "content": "a"}], "tools": 3}': "tools of type number, '3'",
    '{"messages": [{"role": "user", "content": "a"}], "tools": [{}, "f"]}': "tools of type list with 'f'",
    '[{"role": "user", "content": "a", "content": "b"}]': "'content' twice",
    '[{"role": "user", "content": "a", "n": NaN}]': "NaN is not JSON",
    '[{"role": "user", "content": "\\ud800"}]': r"\[0\].content with half of a surrogate pair",
    '[{"role": "owner", "content": "a"}]': r"messages\[0\].role 'owner'",
    "[" * 9999: "invalid JSON",
    "\ud800": "not UTF-8",
}


@pytest.mark.parametrize(("content", "got"), BAD_FILES.items(), ids=range(len(BAD_FILES)))
def test_a_file_that_holds_no_conversation(tmp_path, content, got):
    (tmp_path / "talk.json").write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(InputError, match=f"^--messages=.*talk.json: got .*{got}"):
        launcher.run(["--base", f"--messages={tmp_path / 'talk.json'}"])
    for args in ([], ["--prompt=x", "--messages=y"], ["--messages=/nowhere/talk.json"], ["--prompt=x", "--stop="]):
        with pytest.raises(InputError):
            launcher.run(["--base", *args])


@pytest.mark.parametrize(
    ("text", "args"),
    [
        ("", {}),
        ("enable_thinking=false", {"enable_thinking": False}),
        (' a = [1, "b,c"] , d={"e": null},f="g=h"', {"a": [1, "b,c"], "d": {"e": None}, "f": "g=h"}),
    ],
)
def test_template_args(text, args):
    assert resolve_template_args(text) == args


BAD_ARGS = ["x", "x=", "x=yes", "x=1 2", "x=1,,y=2", "x=1,x=2", "messages=[]", "=1", "a b=1", "x=NaN", "x=[1"]


@pytest.mark.parametrize("text", [*BAD_ARGS, "x=" + "[" * 100_000], ids=[*BAD_ARGS, "deep"])
def test_template_args_that_are_none(text):
    with pytest.raises(InputError, match="data.template_args"):
        resolve_template_args(text)


def test_template_args_reach_training_and_generation(tmp_path):
    """The prompt of a run is the context that it was trained on."""
    think = "{% if not thinking %}<think></think>{% endif %}"
    template = CHATML.replace("assistant\n{%", "assistant\n" + think + "{%")
    said = "{% if m['role'] == 'assistant' %}" + think + "{% endif %}{{ m['content'] }}"
    template = template.replace("{{ m['content'] }}", said)
    path = folder(tmp_path, template=template)
    run = base_run(path)
    for text, end in (("thinking=false", "assistant\n<think></think>"), ("thinking=true", "assistant\n")):
        data, tok = dataset(PLAIN, path, template_args=text)
        example = examples(data)[0]
        with run.config.unlocked():
            run.config.data.template_args = text
        assert run.prompt_ids(example.prompt) == list(example.context_ids)
        assert tok.decode(list(example.context_ids)).endswith(end)
