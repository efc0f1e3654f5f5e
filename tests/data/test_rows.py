"""Rows of other trainers' files: every form, against transformers; fields are used, refused or counted."""

import json
import pathlib

import pytest

from molora_jax.data import build, encode, traces
from molora_jax.data.jsonl import BadRow
from molora_jax.data.options import Options
from molora_jax.data.rows import to_example
from molora_jax.errors import InputError
from molora_jax.io import templates
from molora_jax.io.tokenizer import Tokenizer, byte_tokenizer
from tests.data.fakes import ByteTokenizer, config, write_rows
from tests.data.test_large import as_large

FORMATS = json.loads((pathlib.Path(__file__).parents[1] / "fixtures" / "row_formats.json").read_text())
TOOLS = Tokenizer(byte_tokenizer().inner, bos="<|bos|>", eos="<|im_end|>", template=FORMATS["template"])
CHATML = byte_tokenizer()


def make(tmp_path, rows, *, tokenizer=None, name="d.jsonl", **changes):
    entry = write_rows(tmp_path / name, rows)
    return build(config(entry, **dict(seq_len=400, test_share=0.0) | changes), tokenizer=tokenizer or CHATML,
                 batch_size=2, seed=0)  # fmt: skip


def texts(data, tokenizer=CHATML):
    """(context, answer) of each training example."""
    split = data.splits["train"]
    examples = [split.example(i) for i in range(len(split.length))]
    return [(tokenizer.decode(e.context_ids), tokenizer.decode(e.target_ids)) for e in examples]


def read(row, **changes):
    return to_example(row, 1, Options.of(config("", **changes)))


def chat(*turns, **more):
    return (
        dict(messages=[dict(zip(("role", "content"), turn[:2], strict=True), **dict(*turn[2:])) for turn in turns])
        | more
    )


U, A = ("user", "q"), ("assistant", "a")


@pytest.mark.parametrize("case", FORMATS["cases"])
def test_a_row_is_what_transformers_renders_of_its_meaning(tmp_path, case):
    want = FORMATS["cases"][case]
    for form in ("auto", *(["alpaca"] if "alpaca" in case else ["sharegpt"] if "sharegpt" in case else [])):
        ((context, answer),) = texts(make(tmp_path, [want["row"]], tokenizer=TOOLS, format=form), TOOLS)
        assert context == want["context"] and context + answer + "\n" == want["text"]


def test_names_of_the_file_are_mapped(tmp_path):
    rows = [dict(question="Hi", context="there", answer="Ho", label=3)]
    fields = "prompt=question,input=context,target=answer,drop=label"
    data = make(tmp_path, rows, fields=fields)
    assert texts(data) == [("<|im_start|>user\nHi\nthere<|im_end|>\n<|im_start|>assistant\n", "Ho<|im_end|>")]
    assert data.report()["tasks"]["d"]["unused"] == {"field 'label'": 1}
    with pytest.raises(InputError, match="data.fields: got 'quest'"):
        make(tmp_path, [dict(prompt="a", target="b")], fields="prompt=quest")
    with pytest.raises(InputError, match="row 1: got no field 'prompt'.*data.fields"):
        make(tmp_path, rows)


@pytest.mark.parametrize(
    "name", ["context", "rejected", "choices", "answer", "images", "functions", "text", "history_"]
)
def test_a_field_that_could_matter_is_refused_and_another_one_counted(tmp_path, name):
    rows = [dict(prompt=f"p{i}", target="t", **{name: "x"}, source="web", note=None) for i in range(3)]
    if name == "history_":
        assert make(tmp_path, rows).report()["tasks"]["d"]["unused"] == {"field 'history_'": 3, "field 'source'": 3}
        return
    with pytest.raises(InputError, match=f"row 1: got a field '{name}'"):
        make(tmp_path, rows)
    assert (
        make(tmp_path, [*rows, dict(prompt="p", target="t")], bad_rows="skip").report()["tasks"]["d"]["bad_rows"] == 3
    )


def test_a_row_of_two_forms_needs_to_be_told_apart(tmp_path):
    row = chat(U, A) | dict(prompt="q", target="z")
    with pytest.raises(InputError, match="several forms.*data.format"):
        make(tmp_path, [row])
    ((_, answer),) = texts(make(tmp_path, [row], format="messages"))
    assert answer == "a<|im_end|>"


def test_a_generation_prompt_that_training_rows_do_not_have_is_said(tmp_path):
    thinks = "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}"
    template = CHATML.template.partition("{% if add_generation_prompt %}")[0] + thinks
    tokenizer = Tokenizer(CHATML.inner, eos="<|im_end|>", template=template)
    (said,) = make(tmp_path, [chat(U, A), chat(("user", "v"), A)], tokenizer=tokenizer).report()["warnings"]
    assert "'<think>\\n\\n</think>\\n\\n', which 2 rows of d do not have" in said
    assert not make(tmp_path, [chat(U, A), chat(("user", "v"), A)]).report()["warnings"]


def test_what_no_template_writes_is_refused_in_an_answer_and_counted_in_a_context(tmp_path):
    call = dict(tool_calls=[dict(function=dict(name="f"))])
    with pytest.raises(InputError, match="row 2: got 'reasoning_content' of the answer"):
        make(tmp_path, [chat(U, A), chat(U, (*A, dict(reasoning_content="why")))])
    with pytest.raises(InputError, match="row 1: got tools, of which the chat template writes nothing"):
        make(tmp_path, [chat(U, A, tools=[dict(name="f")])])
    report = make(tmp_path, [chat(U, ("assistant", None, call), ("tool", "5"), A)]).report()
    assert report["tasks"]["d"]["unused"] == {"'tool_calls' of a turn": 1} and "tool_calls" in report["warnings"][0]
    only_two = "{% for m in messages %}{% if m.role in ['user', 'assistant'] %}[{{ m.content }}]{% endif %}{% endfor %}"
    tokenizer = Tokenizer(CHATML.inner, eos="<|im_end|>", template=only_two)
    rows = [chat(U, A), chat(("system", "s"), U, A)]
    with pytest.raises(InputError, match="row 2: got a turn of role 'system'"):
        make(tmp_path, rows, tokenizer=tokenizer)
    assert make(tmp_path, rows, tokenizer=tokenizer, bad_rows="skip").report()["tasks"]["d"]["bad_rows"] == 1
    with pytest.raises(InputError, match="data.system"):
        make(tmp_path, [chat(U, A)], tokenizer=tokenizer, system="be brief")


@pytest.mark.parametrize(
    ("row", "got"),
    [
        (chat(("user", [dict(type="image_url", image_url="x")]), A), r"content\[0\] of type 'image_url'"),
        (chat(("user", [dict(type="text")]), A), r"content\[0\].text of type null"),
        (chat(("user", None), A), "content of type null"),
        (chat(U, ("tool", "5"), ("assistant", None)), "content of type null"),
        (chat(("user", dict(a=1)), A), "content of type object"),
        (chat(U, ("assistant", "a", dict(tool_calls="f"))), "tool_calls of type string"),
        (chat(U, ("function", "a"), A), "'function'"),
        (chat(U, A, U), "roles"),
        (chat(("system", "s"), U, A, system="t"), "a system turn and a field 'system'"),
        (dict(prompt="a", target="b", history=[["a"]]), r"history\[0\]"),
        (dict(prompt="a", target="b", history=3), "history of type number"),
        (dict(prompt="a", target="b", tools="f("), "tools 'f"),
        (dict(prompt="a", target="b", tools=["f"]), "tools of type list"),
        (dict(prompt="a", target="b", system=["f"]), "system of type list"),
        (dict(prompt="a", target="b", weight=0.5), "weight 0.5"),
        (chat(U, ("assistant", "a", dict(weight=2))), r"messages\[1\].weight"),
        (chat(("user", "q", dict(weight=1)), A), "weight 1 on a turn of role 'user'"),
        (dict(conversations=[{"from": "bot", "value": "x"}]), "'bot'"),
        (dict(conversations=[{"from": "function_call", "value": "f("}]), r"value 'f\('"),
        (dict(conversations=[{"from": "human", "value": 1}]), "content of type number"),
        (dict(instruction="a", output="b", input=3), "input of type number"),
        (chat(U, ("assistant", "a", dict(train=False)), U, A), r"messages\[1\].train'"),
        (dict(text="a"), "no field 'prompt'"),
        (dict(prompt=[dict(role="user", content="a")], target="b", input="c"), "'input' beside a list of turns"),
        (dict(prompt=[], target="b"), "roles"),
    ],
)  # fmt: skip
def test_bad_rows(row, got):
    with pytest.raises(BadRow) as error:
        read(row)
    with pytest.raises(BadRow, match=got):
        read(row)
    assert error.value.expected


def test_weights(tmp_path):
    (example, _) = read(chat(U, ("assistant", "a", dict(weight=1)), U, ("assistant", "b")))
    assert example.weights == (0, 1, 0, 1) and "weight" not in example.turns[1]
    (example, _) = read(chat(U, ("assistant", "a", dict(weight=0)), U, ("assistant", "b")), train_on="all")
    assert example.weights == (0, 0, 0, 1)
    (example, _) = read(chat(U, ("assistant", "a", dict(weight=1)), U, ("assistant", "b", dict(weight=0))))
    assert example.target == "a" and len(example.turns or "ab") == 2, "what comes behind the last loss is left out"
    assert read(chat(U, ("assistant", "a", dict(weight=0))))[0] is None
    assert read(dict(prompt="a", target="b", weight=0))[0] is None
    assert read(chat(U, ("assistant", "a", dict(weight=1))))[0].weights is None
    rows = [dict(prompt=f"p{i}", target="t", weight=i % 2) for i in range(6)]
    assert make(tmp_path, rows).report()["tasks"]["d"]["weight_0"] == 3
    with pytest.raises(InputError, match="no good one.*weight of 1"):
        make(tmp_path, rows[::2])


def test_raw_text(tmp_path):
    rows = [dict(text="Once upon a time"), dict(prompt="2+2=", completion="4"), dict(prompt="3+3=", target="6")]
    data = make(tmp_path, rows, raw=True)
    split = data.splits["train"]
    found = {CHATML.decode(split.tokens(i)): CHATML.decode(split.tokens(i)[split.loss_mask(i) > 0]) for i in range(3)}
    assert found["2+2=4<|im_end|>"] == "4<|im_end|>" and found["3+3=6<|im_end|>"] == "6<|im_end|>"
    assert found["Once upon a time<|im_end|>"].endswith("nce upon a time<|im_end|>")
    with pytest.raises(InputError, match="no field 'text'|no field 'prompt'"):
        make(tmp_path, [chat(U, A)], raw=True)
    with pytest.raises(InputError, match="data.raw=True"):
        make(tmp_path, rows[:1])


def test_several_tasks_in_a_file(tmp_path):
    rows = [dict(prompt=f"{t} {i}", target="t", task=t) for t in ("b", "a") for i in range(20)]
    rows += [dict(prompt=f"p{i}", target="t") for i in range(10)] + [dict(prompt=1, task="a")]
    data = make(tmp_path, rows, bad_rows="skip")
    assert data.task_names == ("b", "a", "d") and set(data.train.batch(0)["task_ids"].ravel()) <= {0, 1, 2}
    report = data.report()["tasks"]
    assert [report[name]["train"] for name in data.task_names] == [20, 20, 10] and report["a"]["bad_rows"] == 1
    assert {data.splits["train"].example(i).prompt[0] for i in data.train.for_tasks("a").draws(0)} == {"a"}
    entry = f"jsonl:{tmp_path}/d.jsonl"
    assert data.train.for_tasks(entry).task_ids == (0, 1, 2) and data.labels({entry}) == (entry,) * 3
    one = make(tmp_path, rows, bad_rows="skip", file_tasks=False)
    assert one.task_names == ("d",) and one.fingerprint != data.fingerprint
    assert one.report()["tasks"]["d"]["train"] == 50


def test_names_that_are_no_tasks(tmp_path):
    rows = [dict(prompt=f"p{i}", target="t", task=f"id-{i}") for i in range(1200)]
    with pytest.raises(InputError, match="1,200 tasks.*drop=task"):
        make(tmp_path, rows)
    for changes in (dict(fields="drop=task"), dict(file_tasks=False)):
        assert make(tmp_path, rows, **changes).report()["tasks"]["d"]["train"] == 1200
    for name in ("a" * 101, "a\nb", "\x1b[31m"):
        with pytest.raises(BadRow, match="task '"):
            read(dict(prompt="p", target="t", task=name))


def test_a_json_file_may_hold_one_list(tmp_path):
    rows = [dict(prompt=f"p{i}", target="t") for i in range(3)]
    for name, text in (("l.json", json.dumps(rows)), ("m.json", json.dumps(rows, indent=1)),
                       ("n.jsonl", "\n" + json.dumps(rows, indent=1) + "\n")):  # fmt: skip
        (tmp_path / name).write_text(text)
        data = build(
            config(f"jsonl:{tmp_path / name}", test_share=0.0), tokenizer=ByteTokenizer(), batch_size=1, seed=0
        )
        assert data.report()["tasks"][name[0]]["train"] == 3
    for text, got in (
        ("[{}", "no end after row 1"), ('[{"prompt": "a", "target": "b"} 5]', "after row 1"), ("[{},{]", "row 2"),
        ("[] x", "after the list"), ("[", "no end|Expecting value|row 1"),
    ):  # fmt: skip
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(InputError, match=got):
            build(config(f"jsonl:{tmp_path}/x.json", bad_rows="skip"), tokenizer=ByteTokenizer(), batch_size=1, seed=0)
    (tmp_path / "x.json").write_text('[{"prompt": "a"}, {"prompt": "a", "target": "b"}]')
    with pytest.raises(InputError, match="x.json, row 1: got no field 'target'"):
        build(config(f"jsonl:{tmp_path}/x.json"), tokenizer=ByteTokenizer(), batch_size=1, seed=0)


@pytest.mark.parametrize(
    ("line", "got"),
    [
        (b'{"prompt": "a", "target": "b", "x": NaN}', "NaN"),
        (b'{"prompt": "a", "target": "b", "x": -Infinity}', "Infinity"),
        (b'{"prompt": "a", "target": "b", "x": 1e999}', "1e999"),
        (b'{"prompt": "a", "target": "b", "prompt": "c"}', "'prompt' twice"),
        (b'{"prompt": "a", "target": "b", "x": [{"y": "\\ud800"}]}', r"x\[0\].y with half of a surrogate"),
        (b'{"prompt": "a", "target": "b", "\\udc00": 1}', "surrogate"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', r"messages\[0\].content with half"),
        (b'{"prompt": "a", "target": "b", "x": ' + b"[" * 80 + b"]" * 80 + b"}", "nested deeper than 64"),
        (b'{"prompt": "' + b"a" * 10_000_000 + b'"}', "10,000,0"),
    ],
)
def test_hostile_lines(tmp_path, line, got):
    good = b'{"prompt": "good", "target": "yes"}\n'
    path = tmp_path / "h.jsonl"
    path.write_bytes(good + line + b"\n" + good)
    with pytest.raises(InputError, match=f"h.jsonl, row 2: got .*{got}"):
        build(config(f"jsonl:{path}"), tokenizer=ByteTokenizer(), batch_size=1, seed=0)
    data = build(
        config(f"jsonl:{path}", bad_rows="skip", test_share=0.0), tokenizer=ByteTokenizer(), batch_size=1, seed=0
    )
    assert data.report()["tasks"]["h"]["bad_rows"] == 1


@pytest.mark.parametrize("start", [b"\x1f\x8b", b"PK\x03\x04", b"PAR1", b"\xff\xfe{", b"\x28\xb5\x2f\xfd"])
def test_files_of_other_formats_are_named(tmp_path, start):
    (tmp_path / "f.jsonl").write_bytes(start + b"\0" * 20)
    with pytest.raises(InputError, match="f.jsonl: got (a|UTF-16) .*JSON object a line, in UTF-8"):
        build(config(f"jsonl:{tmp_path}/f.jsonl"), tokenizer=ByteTokenizer(), batch_size=1, seed=0)


TURN = "<|im_start|>{{ m.role }}\n{% if m.content %}{{ m.content }}{% endif %}CALLS<|im_end|>\n"
PLAIN_TURNS = (
    "{% for m in messages %}" + TURN + "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TAGGED = PLAIN_TURNS.replace(
    "{% if m.content %}", "{% if m.role == 'assistant' %}{% generation %}{{ m.content or '' }}CALLS<|im_end|>"
    "{% endgeneration %}{{ '\n' }}{% continue %}{% endif %}{% if m.content %}",
)  # fmt: skip


@pytest.mark.parametrize("template", [PLAIN_TURNS, TAGGED])
def test_what_is_not_written_of_any_trained_turn_is_refused(tmp_path, template):
    """A turn of calls alone would teach an end at once, wherever it stands; the last turn's calls are not another's."""
    call = lambda city: dict(tool_calls=[dict(function=dict(name="f", arguments=dict(city=city)))])  # noqa: E731
    row = chat(
        U, ("assistant", None, call("Oslo")), ("tool", "Oslo: 5"), A, ("user", "v"), ("assistant", None, call("Rome"))
    )
    silent, last, every = (
        Tokenizer(CHATML.inner, eos="<|im_end|>", template=template.replace("CALLS", calls)) for calls in (
            "", "{% if loop.last and m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}",
            "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}",
        )
    )  # fmt: skip
    short = chat(U, ("assistant", None, call("Oslo")), ("tool", "Oslo: 5"), A)
    assert make(tmp_path, [short], tokenizer=silent).report()["tasks"]["d"]["unused"] == {"'tool_calls' of a turn": 1}
    weighted = chat(U, ("assistant", None, dict(call("Oslo"), weight=1)), ("tool", "Oslo: 5"), A)
    for tokenizer, rows, changes in (
        (silent, short, dict(train_on="all")), (silent, weighted, {}), (last, row, dict(train_on="all"))
    ):  # fmt: skip
        with pytest.raises(InputError, match="row 1: got 'tool_calls' of the answer.*data.train_on, weight"):
            make(tmp_path, [rows], tokenizer=tokenizer, **changes)
    task = make(tmp_path, [row], tokenizer=every, train_on="all").tasks[0]
    trained = every.decode([i for i, m in zip(task.ids.tolist(), task.mask.tolist(), strict=True) if m])
    calls = [json.dumps(call(city)["tool_calls"]) for city in ("Oslo", "Rome")]
    assert trained == f"{calls[0]}<|im_end|>a<|im_end|>{calls[1]}<|im_end|>"
    assert not task.unused


def test_a_row_that_hangs_the_template_is_one_bad_row(tmp_path, monkeypatch):
    """And not those that stand beside it; a file of many such rows is refused by one of them, whatever is skipped."""
    hangs = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    hangs = "{% if messages[0].content[:4] == 'boom' %}" + hangs + "{% endif %}"
    tokenizer = Tokenizer(CHATML.inner, eos="<|im_end|>", template=hangs + templates.CHATML)
    worker = templates.Worker(seconds=0.5)
    monkeypatch.setattr(templates, "_worker", worker)
    try:
        rows = [dict(prompt=f"q{i}", target="a") for i in range(600)]
        rows[300]["prompt"] = "boom"
        (task,) = make(tmp_path, rows, tokenizer=tokenizer, bad_rows="skip").report()["tasks"].values()
        assert (task["bad_rows"], task["kept"]) == (1, 599)
        with pytest.raises(InputError, match=r"d.jsonl, row 301: got it ran for more than 0.5 seconds.*bad_rows"):
            make(tmp_path, rows, tokenizer=tokenizer)
        as_large(monkeypatch)
        monkeypatch.setattr(encode, "Deaths", lambda: templates.Deaths(3))
        for i in range(100, 112, 2):
            rows[i]["prompt"] = f"boom {i}"
        with pytest.raises(InputError, match=r"d.jsonl, row \d+: got one of 3 rows that stop the chat template"):
            make(tmp_path, rows, tokenizer=tokenizer, bad_rows="skip")
    finally:
        worker.close()


def test_what_a_template_writes_is_found_in_the_text_that_it_writes():
    call = dict(type="function", function=dict(name="get_weather", arguments=dict(city="Zürich", day="Monday")))
    tools = [dict(function=dict(name="get_weather", description="The weather in <a city>"))]
    turns = [
        dict(role="system", content="assistant"), dict(role="user", content="How is Zürich?", name="Bo"),
        dict(role="assistant", content=None, tool_calls=[call]),
        dict(role="tool", content="5 < 6\n7", name="get_weather"),
        dict(role="assistant", content="<think>hm</think>Good", reasoning_content="why so", tool_calls=[call]),
    ]  # fmt: skip
    context = f"TOOLS {json.dumps(tools)} [ASSISTANT] how is zürich? 5 &lt; 6 7"
    everything = f"{context} {json.dumps([call])} Bo, get_weather: assistant\n"
    answer = f"why so Good {json.dumps([call])}"
    whole = everything + answer
    assert traces.untraced(turns, tools, whole, {4: (len(everything), len(whole))}) == ()
    lost = {
        ("tools", ""), ("context", "name"), ("context", "tool_calls"), ("answer", "tool_calls"),
        ("answer", "reasoning_content"), ("content", "answer"), ("content", "tool"),
    }  # fmt: skip
    bare = "[assistant] How is Zürich? assistant"
    assert set(traces.untraced(turns, tools, bare, {4: (len(bare), len(bare))})) == lost
    found = set(traces.untraced(turns, tools, context, {4: (len(context), len(context))}))
    assert found == lost - {("tools", ""), ("content", "tool")}


def test_a_row_of_many_turns_is_rendered_once_as_it_is(tmp_path):
    seen = []

    class Watched(ByteTokenizer):
        def render(self, conversations, **more):
            seen.extend(conversations)
            return super().render(conversations, **more)

    many = chat(*[U, A] * 300)
    make(tmp_path, [many], tokenizer=Watched(), system="be brief", seq_len=100_000)
    assert [len(one["messages"]) for one in seen] == [601, 600]
    with pytest.raises(InputError, match="row 1: got 4,000 turns with 2,000 answers to train on.*Cut the conversation"):
        make(tmp_path, [chat(*[U, A] * 2000)], train_on="all")


@pytest.mark.parametrize(
    "name", ["../../x", "x,y", "a\tb", " a", "a ", ".x", "a/b", "a\\b", "x" * 101, "jsonl:x", "  "]
)
def test_a_task_is_named_as_a_stage_can_name_it(tmp_path, name):
    rows = [dict(prompt="p", target="t", task=name)]
    with pytest.raises(InputError, match="row 1: got task .*letters, digits"):
        make(tmp_path, rows)
    good = ["", "a b", "v1.2-x_y", "Übung", "C++", "1"]
    rows = [dict(prompt=f"p{i}", target="t", task=task) for i, task in enumerate(good)] + rows
    report = make(tmp_path, rows, bad_rows="skip").report()["tasks"]
    assert list(report) == ["d", *good[1:]] and sum(row.get("bad_rows", 0) for row in report.values()) == 1


def test_raw_without_what_it_cannot_use(tmp_path):
    with pytest.raises(InputError, match="data.system"):
        make(tmp_path, [dict(text="abc")], raw=True, system="S")
    for turns in ([], [dict(role="user", content="a")]):
        for name in ("messages", "conversations"):
            with pytest.raises(InputError, match=f"row 1: got a field '{name}'"):
                make(tmp_path, [dict(text="abc", **{name: turns})], raw=True)


def test_a_list_with_a_comma_behind_its_last_row_is_not_json(tmp_path):
    row = json.dumps(dict(prompt="a", target="b"))
    for text, got in (
        (f"[{row},\n]", "a comma after row 1"),
        ("[,]", "row 1 of the list"),
        (f"[{row},,{row}]", "row 2"),
    ):
        (tmp_path / "d.json").write_text(text)
        with pytest.raises(InputError, match=got):
            build(config(f"jsonl:{tmp_path}/d.json"), tokenizer=CHATML, batch_size=1, seed=0)


def test_what_messages_advise(tmp_path):
    def refusal(rows, **changes):
        with pytest.raises(InputError) as error:
            make(tmp_path, rows, **changes)
        return str(error.value)

    long = refusal([chat(U, ("assistant", "x" * 1_000_001))])
    assert "Cut the row. `data.bad_rows" in long and "Correct the row" not in long
    nothing = refusal([chat(U, A, weight=0), chat(U, ("assistant", "b"), weight=0)])
    assert "got 2 rows of weight 0 and no good one" in nothing and "weight of 1" in nothing
    both = refusal([chat(U, A, weight=0), dict(prompt=1, target="x")], bad_rows="skip")
    assert "got 1 bad rows, 1 rows of weight 0 and no good one" in both
    upper = "{% for m in messages %}[{{ m.content | upper }}]<|im_end|>{% endfor %}"
    shouts = Tokenizer(CHATML.inner, eos="<|im_end|>", template="x{{ messages | length }}" + upper)
    talk = chat(U, ("assistant", "abc"), U, ("assistant", "abd"))
    last, every = (refusal([talk], tokenizer=shouts, train_on=which) for which in ("last", "all"))
    assert "turn 4 in another way" in last and "data.template_args" in last and "last turn only" not in last
    assert "turn 2 in another way" in every and "last turn only" in every


def test_the_end_of_a_text_stays(tmp_path):
    data = make(tmp_path, [dict(text="x" * 100 + "the end")], raw=True, seq_len=16, overlong="truncate")
    ids = data.splits["train"].tokens(0)
    assert CHATML.decode(ids).endswith("xthe end<|im_end|>") and len(ids) == 17


def test_a_template_without_a_generation_prompt_makes_the_header_part_of_the_answer(tmp_path):
    template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    tokenizer = Tokenizer(CHATML.inner, eos="<|im_end|>", template=template)
    assert texts(make(tmp_path, [chat(U, A)], tokenizer=tokenizer)) == [("[user] q\n", "[assistant] a<|im_end|>")]
    none = Tokenizer(CHATML.inner, bos="<|bos|>", eos="<|im_end|>", add_bos=True)
    assert texts(make(tmp_path, [chat(U, A)], tokenizer=none)) == [("<|bos|>user: q\nassistant:", " a<|im_end|>")]
    own = chat(("system", "mine"), U, A)
    assert "mine" in texts(make(tmp_path, [own], system="yours"))[0][0]
    assert "yours" not in texts(make(tmp_path, [own], system="yours"))[0][0]
