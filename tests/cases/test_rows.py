"""Rows that other people's files hold: used, refused by name or counted, never dropped without a word."""

import gzip
import json

import pytest

from configs.common import get_config
from molora_jax import data
from molora_jax.errors import InputError
from molora_jax.io.tokenizer import Tokenizer, byte_tokenizer

CHATML = byte_tokenizer()
WITH_TOOLS = Tokenizer(
    CHATML.inner, bos="<|bos|>", eos="<|im_end|>",
    template="{% if tools %}TOOLS {{ tools | tojson }} {% endif %}" + CHATML.template,
)  # fmt: skip
ALTERNATING = Tokenizer(
    CHATML.inner, bos="<|bos|>", eos="<|im_end|>",
    template="{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('turns must alternate') }}{% endif %}[{{ m['role'] }}] {{ m['content'] }}<|im_end|>"
    "{% endfor %}",
)  # fmt: skip


@pytest.fixture
def dataset(tmp_path, monkeypatch):
    monkeypatch.setenv("MOLORA_CACHE", str(tmp_path / "cache"))

    def dataset(rows, *, tokenizer=CHATML, **changes):
        raw = rows if isinstance(rows, bytes) else "\n".join(map(json.dumps, rows)).encode()
        (tmp_path / "d.jsonl").write_bytes(raw)
        config = get_config()
        config.data.update(dict(tasks=f"jsonl:{tmp_path}/d.jsonl", seq_len=64) | changes)
        return data.build(config.data, tokenizer=tokenizer, batch_size=4, seed=0)

    return dataset


def turns(*pairs):
    return dict(messages=[dict(role=role, content=content) for role, content in pairs])


def size(made):
    return sum(len(split.length) for split in made.splits.values())


GOOD = [turns(("user", f"q{i}"), ("assistant", f"a{i}")) for i in range(40)]


def test_a_conversation_that_the_template_refuses_is_a_bad_row(dataset):
    rows = GOOD[:20] + [turns(("user", "x"), ("user", "y"), ("assistant", "z"))] + GOOD[20:]
    with pytest.raises(InputError, match="d.jsonl, row 21: .*turns must alternate.*bad_rows"):
        dataset(rows, tokenizer=ALTERNATING)
    made = dataset(rows, tokenizer=ALTERNATING, bad_rows="skip")
    row = made.report()["tasks"]["d"]
    assert size(made) == row["train"] + row["valid"] + row["test"] == 40 and row["bad_rows"] == 1
    with pytest.raises(InputError, match="1 bad rows and no good one.*row 1: .*turns must alternate"):
        dataset(rows[20:21], tokenizer=ALTERNATING, bad_rows="skip")


Q, A = dict(role="user", content="qNN"), dict(role="assistant", content="a")


@pytest.mark.parametrize(
    ("row", "word"),
    [
        (dict(system="BRIEF", prompt="pNN", target="t"), "BRIEF"),
        (dict(system="BRIEF", messages=[Q, A]), "BRIEF"),
        (dict(history=[["EARLIER", "b"]], prompt="pNN", target="t"), "EARLIER"),
        (dict(prompt="pNN", input="CONTEXT", target="t"), "CONTEXT"),
        (dict(instruction="pNN", input="CONTEXT", output="t"), "CONTEXT"),
        (dict(tools=[dict(name="LOOKUP")], messages=[Q, A]), "LOOKUP"),
        (dict(tools=json.dumps([dict(name="LOOKUP")]), prompt="pNN", target="t"), "LOOKUP"),
        (dict(prompt=[dict(role="system", content="BRIEF"), Q], completion=[A]), "BRIEF"),
    ],
)
def test_a_field_that_changes_the_question_is_used(dataset, row, word):
    made = dataset([json.loads(json.dumps(row).replace("NN", str(i))) for i in range(30)], tokenizer=WITH_TOOLS)
    split = made.splits["train"]
    for i in range(len(split.length)):
        assert word in CHATML.decode(split.example(i).context_ids)


@pytest.mark.parametrize(
    ("row", "got"),
    [
        (dict(messages=[Q, dict(A, tool_calls=[dict(function=dict(name="f"))])]), "'tool_calls' of the answer"),
        (dict(messages=[Q, dict(A, reasoning_content="BECAUSE")]), "'reasoning_content' of the answer"),
        (dict(messages=[Q, dict(A, weight=0)]), "weight 0"),
        (dict(messages=[dict(Q, content=[dict(type="image_url", image_url="x")]), A]), "'image_url'"),
        (dict(prompt="pNN", target="t", context="x"), "'context'"),
    ],
)
def test_a_field_that_nothing_uses_is_refused(dataset, row, got):
    with pytest.raises(InputError) as error:
        dataset([json.loads(json.dumps(row).replace("NN", str(i))) for i in range(30)], tokenizer=WITH_TOOLS)
    assert got in str(error.value) and "d.jsonl" in str(error.value)


@pytest.mark.parametrize(
    "context",
    [
        [dict(role="system", content=""), Q],
        [dict(role="user", content=[dict(type="text", text="q")])],
        [dict(role="developer", content="s"), Q],
        [
            Q,
            dict(role="assistant", content=None, tool_calls=[dict(function=dict(name="f"))]),
            dict(role="tool", content="5"),
        ],
    ],
    ids=["empty system", "text parts", "developer", "tool turns"],
)
def test_chat_rows_in_the_wild_are_taken(dataset, context):
    assert size(dataset([dict(messages=[*context, dict(A, content=f"a{i}")]) for i in range(40)])) == 40


def test_odd_bytes(dataset):
    rows = [dict(prompt=f"p{i}", target=f"{i}") for i in range(60)]
    lines = [json.dumps(row).encode() for row in rows]
    assert size(dataset(b"\xef\xbb\xbf" + b"\r\n\r\n".join(lines))) == 60
    odd = [json.dumps(dict(row, prompt=row["prompt"] + "\u2028x\x85y"), ensure_ascii=False).encode() for row in rows]
    assert size(dataset(b"\n".join(odd))) == 60
    pairs = [b'{"prompt": "%d \\ud83d\\ude00 \\u0000 \xf0\x9f\x98\x80", "target": "t"}' % i for i in range(60)]
    assert size(dataset(b"\n".join(pairs))) == 60
    with pytest.raises(InputError, match="row 1.*surrogate"):
        dataset(b'{"prompt": "\\ud83d", "target": "t"}')
    for raw in (gzip.compress(lines[0]), json.dumps(rows[0]).encode("utf-16")):
        with pytest.raises(InputError, match="d.jsonl"):
            dataset(raw)


def test_truncation_keeps_the_end(dataset):
    rows = [dict(prompt="x" * 300 + str(i), target=f"answer {i}") for i in range(30)]
    rows += [dict(prompt=f"p{i}", target="y" * 200 + str(i)) for i in range(30)]
    made = dataset(rows, overlong="truncate")
    examples = [made.splits["train"].example(i) for i in range(len(made.splits["train"].length))]
    assert len(examples) > 20 and made.report()["tasks"]["d"]["skipped"] == 30
    for example in examples:
        assert len(example.context_ids) + len(example.target_ids) - 1 <= 64
        assert CHATML.decode(example.target_ids) == example.target + "<|im_end|>"
        assert CHATML.decode(example.context_ids).endswith("assistant\n")
    with pytest.raises(InputError, match="no training example that fits"):
        dataset(rows)
