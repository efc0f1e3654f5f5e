"""Whatever stands in a config: it is valid, or one `InputError` says why. Seeded mutations of every shipped config."""

import copy
import pathlib
import random

import pytest

from launch import flags
from molora_jax import config as schema
from molora_jax.config.resolve import resolve_fields, resolve_template_args, split_commas
from molora_jax.errors import InputError

ROOT = pathlib.Path(__file__).parents[1]
CONFIGS = sorted(p for p in (ROOT / "configs").glob("*.py") if p.stem != "__init__")
LONG = "a" * 300
VALUES = [
    None, [], {}, (), "", "x", -1, True, 2**31, 2**70, 10**5000, 1e300, -1e-300, float("nan"), float("inf"), [1],
    [[]], ["a", {}], {"a": 1}, {1: 2}, {"name": []}, {"name": {"x": 1}}, {None: None}, "\ud800", LONG, "~nobody/x",
    "\0", b"x", object(), {"steps": []}, 1j, len, {("a",): 1}, set(), f"jsonl:{LONG}", "dir:~nobody/x", "dir:\0",
    "gguf:" + LONG * 20, "1" * 5000, "0-" + "9" * 400, "q," * 1000, "[" * 1000, "(?", "{}", "%s", r"a\,b",
]  # fmt: skip
NAMES = ["x", 1, None, "name", ("a",), "s00", "", LONG, 10**5000]


def paths(tree, at=()):
    for key, value in tree.items():
        yield (*at, key)
        if isinstance(value, dict):
            yield from paths(value, (*at, key))


def mutated(base, every, draw):
    config = copy.deepcopy(base)
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        *groups, last = draw.choice(every)
        group = config
        for name in groups:
            group = group.get(name) if isinstance(group, dict) else None
        if not isinstance(group, dict):
            continue
        what = draw.random()
        if what < 0.7:
            group[last] = copy.deepcopy(draw.choice(VALUES))
        elif what < 0.8:
            group.pop(last, None)
        elif what < 0.9:
            group[draw.choice(NAMES)] = copy.deepcopy(draw.choice(VALUES))
        else:
            group[last] = copy.deepcopy(draw.choice(list(base.values())))
    return config


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_mutations(path):
    base, draw = flags.load(path).to_dict(), random.Random(path.stem)
    every, refused = list(paths(base)), 0
    for _ in range(120):
        try:
            schema.validate(mutated(base, every, draw), need_rules=False)
        except InputError as error:
            refused += 1
            assert error.where and error.expected and len(str(error)) < 20_000
    assert refused > 60


@pytest.mark.parametrize("config", [None, [], (), "x", 3, {1: 2}, {"data": []}, {"data": {}, "train": 3}])
def test_what_is_no_config(config):
    with pytest.raises(InputError):
        schema.validate(config)


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("data.temperature", 0.001, "at least 0.1"),
        ("optim.warmup", 2**31, "at most 2,147,483,647"),
        ("train.steps", 2**31, "32 bits"),
        ("eval.num_items", 2**63, "32 bits"),
        ("optim.eps", 1e-300, "float32"),
        ("train.clip", 10**400, "float32"),
        ("train.epochs", -1.0, "0.0, 1000000.0"),
        ("data.tasks", f"jsonl:{LONG}", "no such file"),
        ("data.tasks", "jsonl:~nobody/x.jsonl", "no such file"),
        ("data.tasks", "math\0", "'math'"),
        ("data.valid", f"jsonl:{LONG}", "no such file"),
        ("data.valid", "math", "jsonl:PATH"),
        ("data.test_share", 0.5, "0.45"),
        ("data.format", "Alpaca", "'alpaca'"),
        ("data.train_on", "first", "'last'"),
        ("data.fields", "prompt", "NAME=FIELD"),
        ("data.fields", "promt=question", "'prompt'"),
        ("data.fields", "prompt=a,target=a", "twice"),
        ("data.fields", "prompt=a,prompt=b", "twice"),
        ("data.template_args", "a=b", 'a="..."'),
        ("data.template_args", "a=1 b=2", "commas"),
        ("data.template_args", "messages=[]", "no name that the rows"),
        ("data.template_args", "a=NaN", "JSON"),
        ("data.template_args", r'a="\ud800"', "JSON"),
        ("base.source", f"dir:{LONG}", "no such folder"),
        ("base.source", f"gguf:{LONG}", "no such file"),
        ("train.init_from", LONG, "no such folder"),
    ],
)
def test_refused_by_name(field, value, text):
    config = flags.load(ROOT / "configs/mixlora.py").to_dict()
    section, name = field.split(".")
    config[section][name] = value
    with pytest.raises(InputError) as caught:
        schema.validate(config)
    assert caught.value.where == field and text in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        (dict(data=dict(raw=True, system="s")), "data.system"),
        (dict(data=dict(raw=True, template_args="a=1")), "data.template_args"),
        (dict(data=dict(raw=True, format="messages")), "data.format"),
        (dict(data=dict(test_share=0.0), train=dict(eval_every=5)), "train.eval_every"),
    ],
)
def test_fields_that_do_not_go_together(changes, where):
    config = flags.load(ROOT / "configs/mixlora.py").to_dict()
    for section, fields in changes.items():
        config[section].update(fields)
    with pytest.raises(InputError) as caught:
        schema.validate(config)
    assert caught.value.where == where


def test_a_config_file_with_names_that_no_path_can_hold(tmp_path):
    for text in ("{1: {}}", "{'data': {None: 1}}", "{'a.b': 1}"):
        (tmp_path / "c.py").write_text(f"def get_config():\n    return {text}\n")
        with pytest.raises(InputError, match="names that are text without dots"):
            flags.load(tmp_path / "c.py")
    with pytest.raises(InputError, match="no such file"):
        flags.load(tmp_path / f"{LONG}.py")


def test_small_languages():
    assert split_commas(r"math, jsonl:a\,b.jsonl ,,c") == ("math", "jsonl:a,b.jsonl", "c")
    assert resolve_fields("prompt=q, target=a,drop=x,drop=y") == {"q": "prompt", "a": "target", "x": "", "y": ""}
    assert resolve_template_args('a=false, b=[1, {"x": "y,z"}],c="d,e"') == dict(a=False, b=[1, dict(x="y,z")], c="d,e")
    assert resolve_template_args(" ") == {} == resolve_fields("")
