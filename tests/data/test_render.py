"""Ids, loss masks and borders of conversations against transformers (`tests/fixtures/make_chat_masks.py`)."""

import functools
import json
import pathlib

import pytest

from molora_jax.data.example import Example
from molora_jax.data.render import Ids, Refused, encode_examples
from molora_jax.io.tokenizer import Tokenizer
from tests.fixtures import chats

ROWS = json.loads((pathlib.Path(__file__).parents[1] / "fixtures" / "chat_masks.json").read_text())["rows"]
NAMES = [(tokenizer, template) for tokenizer in chats.TOKENIZERS for template in chats.TEMPLATES]
inner = functools.lru_cache(lambda name: chats.TOKENIZERS[name]())


def tokenizer(name, template, *, tagged=True, **changes):
    text, eos, _ = chats.TEMPLATES[template]
    fields = dict(bos="<s>", eos=eos, add_bos=False, template=text if tagged else chats.untagged(text))
    return Tokenizer(inner(name), **fields | changes)


def example(turns, **more):
    return Example("t", turns[0]["content"], turns[-1]["content"], "g", turns=tuple(turns), **more)


def encode(tok, turns, *, train_on="last", args=None, system="", **more):
    (out,) = encode_examples(tok, [example(turns, **more)], train_on=train_on, template_args=args, system=system)
    return out


def expected(row, eos_id):
    """(ids, mask, mask of the last answer, context): up to the last end token."""
    keep = len(row["ids"]) - row["ids"][::-1].index(eos_id)
    mask = [int(m) for m in row["mask"][:keep]]
    run = len(mask) - mask[::-1].index(1)
    begin = run - (mask[:run][::-1] + [0]).index(0)
    last = [m * (i >= begin) for i, m in enumerate(mask)]
    return row["ids"][:keep], mask, last, row["context"]


@pytest.mark.parametrize("tagged", [True, False])
@pytest.mark.parametrize(("name", "template"), NAMES)
def test_ids_and_masks_are_those_of_transformers(name, template, tagged):
    tok = tokenizer(name, template, tagged=tagged)
    rows = [row for row in ROWS if row["case"][:2] == [name, template]]
    assert len(rows) >= 4
    for row in rows:
        _, _, talk, args = row["case"]
        ids, mask, last, context = expected(row, tok.eos_id)
        if args and not tagged:  # nobody says that a think block, which the prompt holds, is the model's
            mask = last = [m * (i >= context) for i, m in enumerate(mask)]
        got = encode(tok, chats.turns(talk), train_on="all", args=args)
        assert isinstance(got, Ids), (talk, got)
        assert (got.ids, got.context) == (ids, context), talk
        assert got.loss_mask == mask, talk
        assert encode(tok, chats.turns(talk), args=args) == Ids(ids, last, context, got.lead), talk


def test_fixture_covers_every_combination():
    assert [row["case"] for row in ROWS] == [list(case) for case in chats.cases()]


CHATML = chats.untagged(chats.TEMPLATES["chatml"][0])


@pytest.mark.parametrize("end", ["<|im_end|>", "</s>"])
def test_where_the_answer_ends(end):
    """At the end token that the template writes, else right behind the text, with one of ours."""
    tok = tokenizer("bytes", "chatml", tagged=False, eos=end)
    for answer in ("yes", "s", "im_end", "end", "a <|im_end|> b", "<|im_end|>", "<|", "x</s>y"):
        got = encode(tok, [dict(role="user", content="q"), dict(role="assistant", content=answer)])
        assert tok.decode(got.ids[got.context :]) == answer + end, answer
        assert tok.decode(got.ids[: got.context]) == "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
        assert sum(got.loss_mask) == len(got.ids) - got.context and got.ids[-1] == tok.eos_id


def test_weights_choose_turns():
    turns = chats.turns("three")
    for tagged in (True, False):
        tok = tokenizer("bytes", "chatml", tagged=tagged)
        whole = encode(tok, turns, train_on="all")
        for weights, answers in (
            ((0, 1, 0, 0, 0, 1), ["yes", "yes"]), ((0, 0, 0, 1, 0, 0), ["an answer"]), ((0, 1, 0, 1, 0, 1), None),
        ):  # fmt: skip
            got = encode(tok, turns, weights=weights, system="Be brief.")
            trained = tok.decode([i for i, m in zip(got.ids, got.loss_mask, strict=True) if m])
            wanted = ["yes", "an answer", "yes"] if answers is None else answers
            assert trained == "".join(answer + "<|im_end|>" for answer in wanted)
        assert encode(tok, turns, weights=(0, 1, 0, 1, 0, 1)) == whole
        assert isinstance(encode(tok, turns, weights=(0,) * 6), Refused)


REWRITES = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' and not loop.last %}(cut)"
    "{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)


def test_a_template_that_rewrites():
    """The prompt is no beginning of the whole: the answer starts where its text does; a turn that is gone is said."""
    tok = Tokenizer(inner("bytes"), eos="<|im_end|>", template=REWRITES)
    got = encode(tok, chats.turns("three"))
    assert tok.decode(got.ids[got.context :]) == "yes<|im_end|>"
    assert tok.decode(got.ids[: got.context]).endswith("again: an answer<|im_end|>\n<|im_start|>assistant\n")
    assert "turn 2" in encode(tok, chats.turns("three"), train_on="all").got


@pytest.mark.parametrize("between", ["", " ", "</answer>"])
def test_a_block_that_leaves_the_end_token_out(between):
    """Every answer that is trained on ends all the same, and no other turn's end is learnt."""
    template = chats.TEMPLATES["chatml"][0].replace(
        "m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\\n'",
        f"m['content'] }}}}{{% endgeneration %}}{{{{ '{between}<|im_end|>\\n'",
    )
    assert between + "<|im_end|>" in template and template != chats.TEMPLATES["chatml"][0]
    tok = Tokenizer(inner("bytes"), eos="<|im_end|>", template=template)

    def trained(**how):
        got = encode(tok, chats.turns("three"), **how)
        return tok.decode([i for i, m in zip(got.ids, got.loss_mask, strict=True) if m])

    assert trained(train_on="all") == "yes<|im_end|>an answer<|im_end|>yes<|im_end|>"
    assert trained(train_on="last") == "yes<|im_end|>"
    assert trained(weights=(0, 0, 0, 1, 0, 1)) == "an answer<|im_end|>yes<|im_end|>"
    tok = Tokenizer(inner("bytes"), eos="<|im_end|>", template=template.replace(f"{between}<|im_end|>\\n", "\\n", 1))
    assert trained(train_on="all") == "yesan answeryes<|im_end|>", "the user's end is no answer's"


def test_a_block_without_an_end_token_of_ours():
    """All of the block is trained on, as in transformers, and an end token behind it."""
    tok = tokenizer("bytes", "chatml", eos="</s>")
    got = encode(tok, chats.turns("three"), train_on="all")
    trained = tok.decode([i for i, m in zip(got.ids, got.loss_mask, strict=True) if m])
    assert trained == "yes<|im_end|>an answer<|im_end|>yes<|im_end|></s>"


def test_a_template_that_does_not_write_the_answer_is_refused():
    silent = "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}\n{% endif %}{% endfor %}"
    for train_on in ("last", "all"):
        got = encode(Tokenizer(inner("bytes"), eos="</s>", template=silent), chats.turns("three"), train_on=train_on)
        assert isinstance(got, Refused)


def test_a_block_that_never_comes_is_refused():
    never = "{% if false %}{% generation %}{% endgeneration %}{% endif %}"
    tok = Tokenizer(inner("bytes"), eos="<|im_end|>", template=CHATML + never)
    assert isinstance(encode(tok, chats.turns("one")), Refused)


def test_bos_without_a_template():
    rows = [Example("t", "is it?", "yes", "g"), Example("t", "", "", "g", text="yes"),
            Example("t", "", "", "g", text="<s>yes")]  # fmt: skip
    plain, raw, once = encode_examples(Tokenizer(inner("prepend"), bos="<s>", eos="</s>"), rows)
    assert plain.ids[0] == 1 and plain.ids.count(1) == 1 and plain.loss_mask[0] == 0 and plain.context > 1
    assert raw.ids[0] == 1 and raw.ids[-1] == 2 and raw.loss_mask == [1] * len(raw.ids) and raw.context == 0
    assert once.ids.count(1) == 1
    without = encode_examples(Tokenizer(inner("prepend"), bos="<s>", eos="</s>", add_bos=False), rows)
    assert [one.ids for one in without[:2]] == [plain.ids[1:], raw.ids[1:]]


def test_rows_that_become_no_ids_are_named_and_the_others_stay():
    tok = tokenizer("bytes", "mistral")
    good, bad = chats.turns("one"), [dict(role="system", content="x"), *chats.turns("one")]
    out = encode_examples(tok, [example(good), example(bad), Example("t", "x" * 2_000_000, "y", "g"), example(good)])
    assert isinstance(out[0], Ids) and out[0] == out[3]
    assert "roles must alternate" in out[1].got and "2,000,001 characters" in out[2].got
    half = Example("t", "\ud800", "y", "g")
    assert isinstance(encode_examples(tok, [half, example(good)])[0], Refused)
