"""The nine tasks: counts, splits, determinism, clear errors. They need the packages of the extra `data`."""

import collections
import subprocess
import sys

import pytest

from molora_jax.data import build, parse_tasks
from molora_jax.data.example import SPLITS, distinct, split_of
from molora_jax.data.sources import SOURCES, translate
from molora_jax.errors import InputError
from tests.data.fakes import ByteTokenizer, CoarseTokenizer, config

DEFAULT = "morph,translate,emoji,factbook,sentiment,topic,dialog,code,math"
COUNTS = dict(  # train, of the survey of the packages
    morph=40_901, translate=3_035, emoji=8_355, factbook=2_651, sentiment=5_862, topic=689, dialog=1_067, code=3_564,
    math=4_133,
)  # fmt: skip


@pytest.fixture(scope="module")
def examples():
    return {
        name: distinct(source.examples(source.files()), several_answers=getattr(source, "SEVERAL_ANSWERS", False))
        for name, source in SOURCES.items()
    }


def test_default_tasks_are_the_sources():
    assert tuple(SOURCES) == parse_tasks(DEFAULT)


@pytest.mark.parametrize("task", COUNTS)
def test_counts_are_near_the_survey(examples, task):
    count = collections.Counter(SPLITS[split_of(task, e.group)] for e in examples[task])
    assert count["train"] == pytest.approx(COUNTS[task], rel=0.1)
    assert min(count["valid"], count["test"]) >= 0.03 * count["train"]


@pytest.mark.parametrize("task", COUNTS)
def test_examples_are_clean(examples, task):
    for example in examples[task]:
        assert example.task == task and example.prompt.strip() and example.group
        assert example.target == example.target.strip() != ""
        assert not set("<>\n") & set(example.target) or task in ("dialog",)
        assert example.choices is None or example.target in example.choices
    assert len({(e.prompt, e.target) for e in examples[task]}) == len(examples[task])


def test_facts(examples):
    answers = {(task, e.prompt): e.target for task in examples for e in examples[task]}
    assert answers["morph", 'Past tense of the verb "run":'] == "ran"
    assert answers["morph", 'Past participle of the verb "walk":'] == "walked"
    assert answers["morph", 'Superlative of "good":'] == "best"
    assert answers["factbook", "What is the capital of France?"] == "Paris"
    assert answers["translate", "Translate into French: Password changed successfully."].startswith("Mot de passe")
    assert answers["emoji", 'German name of the emoji "red apple":'] == "roter apfel"
    assert answers["sentiment", 'Is the word "awful" positive or negative?'] == "negative"
    assert len(next(iter(examples["topic"])).choices) == 21
    for prompt in (e.prompt for e in examples["math"] if e.prompt.startswith("What is")):
        left, op, right = prompt.removeprefix("What is ").rstrip("?").split()
        values = {"+": int(left) + int(right), "-": int(left) - int(right), "*": int(left) * int(right)}
        assert answers["math", prompt] == str(values.get(op, int(left) // int(right)))


def test_variants_never_straddle_splits(examples):
    """All forms of a lemma, all languages of a sentence or an emoji, all questions on a country."""
    for task in ("morph", "translate", "emoji", "factbook"):
        splits = collections.defaultdict(set)
        for example in examples[task]:
            splits[example.group].add(split_of(task, example.group))
        assert max(map(len, splits.values())) == 1 and len(splits) < len(examples[task])
    forms = [e for e in examples["morph"] if '"run"' in e.prompt]
    assert len(forms) == 5 and len({e.group for e in forms}) == 1


def test_splits_are_stable():
    """Written out, so that a change of the rule is seen."""
    words = ("run", "walk", "house", "good", "able", "swim")
    assert [split_of("morph", word) for word in words] == [0, 0, 2, 2, 0, 0]


def test_a_second_process_reads_the_same():
    script = (
        "import sys; from tests.data.fakes import *; from molora_jax.data import build;"
        "d = build(config('topic,math,code', seq_len=128), tokenizer=ByteTokenizer(), batch_size=1, seed=0);"
        "print(d.fingerprint, d.train.batch(3)['example_ids'].tolist(), 'jax' in sys.modules)"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", script], env={"PYTHONHASHSEED": seed, "PATH": "", "HOME": "/nonexistent"},
            capture_output=True, text=True, check=True,
        ).stdout
        for seed in ("1", "2")
    ]  # fmt: skip
    assert runs[0] == runs[1] and runs[0].rstrip().endswith("False"), "and without importing jax"


def test_the_default_mixture_packs_tightly(examples):
    data = build(config(DEFAULT, seq_len=128), tokenizer=CoarseTokenizer(), batch_size=8, seed=0)
    report = data.report()
    assert report["padding"] < 0.10
    assert report["targets_per_row"] < 128
    assert all(row["skipped"] < 0.02 * row["train"] for row in report["tasks"].values())
    assert "padding" in str(report) and "morph" in str(report)


@pytest.mark.parametrize(
    "tasks, message",
    [
        ("morf", "Did you mean 'morph'"),
        ("morph,xyzzy", "jsonl:PATH"),
        ("morph,morph", "twice"),
        ("", "at least one"),
        (" , ", "at least one"),
        ("jsonl:", "jsonl:PATH"),
    ],
)
def test_unknown_tasks(tasks, message):
    with pytest.raises(InputError, match="data.tasks") as error:
        build(config(tasks), tokenizer=ByteTokenizer(), batch_size=1, seed=0)
    assert message in str(error.value)


@pytest.mark.parametrize("change", [dict(overlong="cut"), dict(bad_rows="x"), dict(temperature=0), dict(seq_len=0)])
def test_bad_fields(change):
    with pytest.raises(InputError, match=f"data.{next(iter(change))}"):
        build(config("math", **change), tokenizer=ByteTokenizer(), batch_size=1, seed=0)


def test_a_package_of_another_format_is_named(monkeypatch, tmp_path):
    (tmp_path / "other.txt").write_text("no table at all\n")
    monkeypatch.setattr(SOURCES["sentiment"], "files", lambda: [("other.txt", tmp_path / "other.txt")])
    with pytest.raises(InputError, match="vaderSentiment 3.*pinned version"):
        build(config("sentiment"), tokenizer=ByteTokenizer(), batch_size=1, seed=0)


@pytest.mark.parametrize("task", [name for name, source in SOURCES.items() if source.DISTRIBUTION])
def test_a_missing_package_is_named(monkeypatch, task):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError) as error:
        build(config(task), tokenizer=ByteTokenizer(), batch_size=1, seed=0)
    assert repr(task) in str(error.value) and SOURCES[task].DISTRIBUTION in str(error.value)
    assert "molora_jax[data]" in str(error.value)


def test_packages_are_not_imported():
    script = "import sys; from molora_jax.data.sources import SOURCES;"
    script += "[list(s.examples(s.files())) for s in SOURCES.values()];"
    script += (
        "print([m for m in ('django','emoji','lemminflect','chatterbot_corpus','vaderSentiment') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout.strip() == "[]"


def test_catalogue_entries():
    text = (
        'msgid ""\nmsgstr "header"\n\n# note\nmsgid "Yes"\nmsgstr "Oui"\n\n#, fuzzy\nmsgid "No"\nmsgstr "Non"\n\n'
        'msgctxt "c"\nmsgid ""\n"Say \\"hi\\" "\n"now"\nmsgstr "Dites \\"salut\\""\n\n'
        'msgid "One"\nmsgid_plural "Many"\nmsgstr[0] "Un"\nmsgstr[1] "Plus"\n\n#~ msgid "Old"\n#~ msgstr "Vieux"\n'
    )
    assert list(translate.entries(text)) == [("Yes", "Oui"), ('Say "hi" now', 'Dites "salut"')]
