"""A wrong config is refused before jax is imported, with the field, the nearest name and what to change."""

import json
import pathlib
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import common
from launch import flags
from molora_jax import config as schema
from molora_jax.backbones.base import Backbone
from molora_jax.config import fields as config_fields
from molora_jax.config import members as config_members
from molora_jax.errors import InputError

ROOT = pathlib.Path(__file__).parents[1]
CONFIGS = sorted(p for p in (ROOT / "configs").glob("*.py") if p.stem not in ("__init__", "common"))
REMOVE = object()
ROUTER = "method.rules.ffn.router"
ADAPTER = "method.rules.ffn.adapter"
TOP_P = dict(name="top_p", p=0.4, share="ffn")


def mixlora(**changes):
    """The mixlora config as a nested dict, with dotted fields changed or removed."""
    config = flags.load(ROOT / "configs/mixlora.py").to_dict()
    for path, value in changes.items():
        *groups, key = path.split(".")
        group = config
        for name in groups:
            group = group.setdefault(name, {})
        if value is REMOVE:
            del group[key]
        else:
            group[key] = value
    return config


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_shipped_configs_are_valid_and_survive_json(path):
    config = flags.load(path)
    trains = not config.get("surgery")  # a surgery's rules are those of the runs that go in
    schema.validate(config, need_rules=trains)
    schema.validate(config.to_dict(), need_rules=trains)
    schema.check_model(config, 30, dict.fromkeys(("q", "k", "v", "o", "gate", "up", "down"), (576, 576)))
    schema.check_model(config, 4)  # random:tiny
    again = schema.from_dict(json.loads(json.dumps(schema.to_dict(config))))
    assert again == config
    assert not trains or all(type(rule.load) is tuple for rule in again.method.rules.values())


GOOD = [
    {f"{ADAPTER}.name": "dora", "method.rules.ffn.down": "per_expert"},
    {"method.rules.attn.adapter.name": "dora"},
    {f"{ADAPTER}.name": "rslora", f"{ADAPTER}.init": "pissa"},
    {ROUTER: TOP_P},
    {ROUTER: {**TOP_P, "p": 1.5}},
    {f"{ROUTER}.share": "site"},
    {f"{ROUTER}.share": "model"},
    {f"{ROUTER}.jitter": 0.1},
    {"method.rules.ffn.experts": "1", f"{ROUTER}.k": 1},
    {"method.rules.ffn.experts": "2*8,4*22"},
    {"method.rules.ffn.experts": "2*8,4*14", "method.rules.ffn.layers": "8-29"},
    {"method.rules.attn.sites": "*"},
    {"method.rules.attn.sites": "[qv]"},
    {"losses.z_loss": dict(weight=1e-3), "losses.entropy": dict(weight=0)},
    {"losses.balance": dict(weight=1e-2)},
    {"optim.name": "lora_plus", "optim.ratio": 16.0},
    {"train.accumulate": 4, "mesh.data": 2},
    {"schedule.s01": dict(steps=0, tasks="math", freeze="*/router/*", route="", set={}), "schedule.s00.steps": 100},
    {"schedule.s00.set": {"method": {"rules": {"ffn": {"router": {"k": 1}}}}}},
    {"base.source": "random:tiny"},
    {"base.source": "random:tiny-untied"},
    {"base.source": "random:tiny-qwen3"},
    {"base.source": "hf:HuggingFaceTB/SmolLM2-135M@main"},
    {"optim.learning_rate": 1},
]


@pytest.mark.parametrize("changes", GOOD, ids=lambda c: ",".join(c))
def test_right(changes):
    schema.validate(mixlora(**changes))


NAN, INF = float("nan"), float("inf")
BAD = [
    ({"trian": {}}, "trian", "'train'"),
    ({"train.step": 3}, "train.step", "'steps'"),
    ({"train.steps": REMOVE}, "train.steps", "got nothing"),
    ({"train": REMOVE}, "train", "a group of fields"),
    ({"train": 3}, "train", "a group of fields"),
    ({"train.steps": "abc"}, "train.steps", "an integer"),
    ({"train.steps": 2.5}, "train.steps", "an integer"),
    ({"train.steps": True}, "train.steps", "an integer"),
    ({"train.steps": 0}, "train.steps", ">= 1"),
    ({"seed": -1}, "seed", "from 0 to"),
    ({"seed": None}, "seed", "an integer"),
    ({"train.clip": NAN}, "train.clip", "a finite number"),
    ({"optim.learning_rate": NAN}, "optim.learning_rate", "a finite number"),
    ({"optim.learning_rate": INF}, "optim.learning_rate", "a finite number"),
    ({"optim.b2": 1.0}, "optim.b2", "in [0, 1)"),
    ({"optim.decay": "cosin"}, "optim.decay", "'cosine'"),
    ({"optim.name": "adam"}, "optim.name", "'adamw'"),
    ({"optim.lr": 1e-3}, "optim.lr", "learning_rate"),
    ({"losses.balance.weight": NAN}, "losses.balance.weight", "a finite number"),
    ({"losses.balance.over": "layers"}, "losses.balance.over", "'layer'"),
    ({"losses.balance.times_experts": 1}, "losses.balance.times_experts", "true or false"),
    ({"losses.balanse": dict(weight=1.0)}, "losses.balanse", "'balance'"),
    ({"losses.balance": 3}, "losses.balance", "a dict of options"),
    ({"method.rules.ffn": REMOVE}, "losses.balance", "a rule with a router"),
    ({"method.rules": {}, "losses": {}}, "method.rules", "no rule"),
    ({"method.rules": 3}, "method.rules", "a group of fields"),
    ({"method.rules.A-b": common.rule("q", adapter=common.adapter())}, "method.rules.A-b", "a-z"),
    ({"method.rules.ffn.site": "q"}, "method.rules.ffn.site", "'sites'"),
    ({"method.rules.attn.sites": "q,vv"}, "method.rules.attn.sites", "Did you mean 'v'"),
    ({"method.rules.attn.sites": "y*"}, "method.rules.attn.sites", "matches nothing"),
    ({"method.rules.attn.sites": ""}, "method.rules.attn.sites", "comma list"),
    ({"method.rules.attn.sites": "attn"}, "method.rules.attn.sites", "not available yet"),
    ({"method.rules.attn.sites": "ffn,q"}, "method.rules.attn.sites", "two rules"),
    ({"method.rules.attn.layers": "7-3"}, "method.rules.attn.layers", "rising"),
    ({"method.rules.attn.layers": "first"}, "method.rules.attn.layers", "0-7,12"),
    ({"method.rules.attn.layers": "0-3,2"}, "method.rules.attn.layers", "once"),
    ({"method.rules.attn.experts": "2"}, "method.rules.attn.experts", "without a router"),
    ({"method.rules.ffn.experts": "0"}, "method.rules.ffn.experts", ">= 1"),
    ({"method.rules.ffn.experts": 8}, "method.rules.ffn.experts", "a string"),
    ({"method.rules.ffn.experts": "2|x"}, "method.rules.ffn.experts", "2|4|6|8"),
    ({"method.rules.ffn.experts": "2*3", "method.rules.ffn.layers": "0-7"}, "method.rules.ffn.experts", "8 layers"),
    ({"method.rules.ffn.load": ("missing_adapter",)}, "method.rules.ffn.load", "paths that exist"),
    ({f"{ROUTER}.k": 9}, f"{ROUTER}.k", "K > E"),
    ({"method.rules.ffn.experts": "1|8"}, f"{ROUTER}.k", "K > E"),
    ({f"{ROUTER}.k": -1}, f"{ROUTER}.k", ">= 0"),  # 0 is all
    ({ROUTER: dict(name="entropy_hybrid", q=3.0)}, f"{ROUTER}.q", "in [0.01, 2.0]"),
    ({"losses.localized_balance": dict(world="math,fact")}, "losses.localized_balance.world", "among data.tasks"),
    ({ROUTER: {**TOP_P, "p": 0.0}}, f"{ROUTER}.p", "> 0"),
    ({ROUTER: {**TOP_P, "k": 2}}, f"{ROUTER}.k", "an option of top_p"),
    ({f"{ROUTER}.name": "softmax_topp"}, f"{ROUTER}.name", "'softmax_topk'"),
    ({f"{ROUTER}.share": "attn"}, f"{ROUTER}.share", "q,k,v,o"),
    ({"method.rules.attn.router": dict(name="top_p", share="ffn")}, "method.rules.attn.router.share", "gate,up,down"),
    ({"method.rules.ffn.experts": "2|4", f"{ROUTER}.share": "model"}, f"{ROUTER}.share", "equal counts"),
    ({f"{ADAPTER}.rank": 0}, f"{ADAPTER}.rank", ">= 1"),
    ({f"{ADAPTER}.rank": 8.0}, f"{ADAPTER}.rank", "an integer"),
    ({f"{ADAPTER}.alpha": 0.0}, f"{ADAPTER}.alpha", "> 0"),
    ({f"{ADAPTER}.dropout": 1.0}, f"{ADAPTER}.dropout", "[0, 1)"),
    ({f"{ADAPTER}.init": "kaimin"}, f"{ADAPTER}.init", "'kaiming'"),
    ({f"{ADAPTER}.name": "lorra"}, f"{ADAPTER}.name", "'lora'"),
    ({ADAPTER: REMOVE}, ADAPTER, "a dict of options"),
    ({f"{ADAPTER}.name": "dora"}, "method.rules.ffn.down", "sits after W_d"),
    ({"data.tasks": "morph,maths"}, "data.tasks", "'math'"),
    ({"data.tasks": ""}, "data.tasks", "jsonl:PATH"),
    ({"data.tasks": "math,math"}, "data.tasks", "once"),
    ({"data.tasks": "jsonl:missing.jsonl"}, "data.tasks", "no such file"),
    ({"data.seq_len": 4}, "data.seq_len", ">= 8"),
    ({"data.temperature": 0.0}, "data.temperature", "> 0"),
    ({"base.source": "gguf:missing.gguf"}, "base.source", "no such file"),
    ({"base.source": "dir:missing"}, "base.source", "no such folder"),
    ({"base.source": "pkg:smollm2-135m"}, "base.source", "smollm2-135m-instruct"),
    ({"base.source": "ggguf:x"}, "base.source", "'gguf'"),
    ({"base.source": "hf:SmolLM2"}, "base.source", "hf:ORG/NAME"),
    ({"base.dtype": "float16"}, "base.dtype", "bfloat16"),
    ({"mesh.fsdp": -1}, "mesh.fsdp", ">= 1"),
    ({"mesh.data": 0}, "mesh.data", "-1"),
    ({"mesh.data": 3}, "mesh", "divide the 8 rows"),
    ({"mesh.fsdp": 16}, "mesh", "divide the 8 rows"),
    ({"train.accumulate": 3}, "train.batch_size", "a multiple"),
    ({"train.accumulate": 0}, "train.accumulate", ">= 1"),
    ({"train.remat": "all"}, "train.remat", "'full'"),
    ({"train.init_from": "missing_run"}, "train.init_from", "no such folder"),
    ({"engine": "fssdp"}, "engine", "not available yet"),
    ({"engine": "replicat"}, "engine", "'replicate'"),
    ({"schedule": {}}, "schedule", "at least one stage"),
    ({"schedule.first": dict(steps=0, tasks="", freeze="", set={}, route="")}, "schedule.first", "s00"),
    ({"schedule.s00.steps": 10}, "schedule", "train.steps = 200"),
    ({"schedule.s00.step": 10}, "schedule.s00.step", "'steps'"),
    ({"schedule.s00.tasks": "math,topics"}, "schedule.s00.tasks", "among data.tasks"),
    ({"schedule.s00.freeze": "a b"}, "schedule.s00.freeze", "path patterns"),
    ({"schedule.s00.set": {"optim": {"lr": 1}}}, "schedule.s00.set.optim.lr", "learning_rate"),
    ({"schedule.s00.set": {"optim": {"decay": "none"}}}, "schedule.s00.set.optim.decay", "'cosine'"),
    ({"schedule.s00.set": {"optim": 3}}, "schedule.s00.set.optim", "a value like"),
]


@pytest.mark.parametrize(("changes", "where", "text"), BAD, ids=[f"{w}-{i}" for i, (_, w, _) in enumerate(BAD)])
def test_wrong(changes, where, text):
    with pytest.raises(InputError) as caught:
        schema.validate(mixlora(**changes))
    assert caught.value.where == where
    assert text in str(caught.value)
    assert caught.value.expected


def _paths(group, prefix=""):
    for key, value in group.items():
        yield prefix + key
        if isinstance(value, dict):
            yield from _paths(value, f"{prefix}{key}.")


ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["*", "2|4", "1*4"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["name", "s00", "k"]), inner, max_size=3)
    ),
    max_leaves=4,
)


@settings(max_examples=300)
@given(st.dictionaries(st.sampled_from(sorted(_paths(mixlora()))), ANYTHING | st.just(REMOVE), min_size=1, max_size=3))
def test_nothing_but_an_input_error(changes):
    try:
        config = mixlora(**dict(sorted(changes.items(), reverse=True)))
    except (KeyError, TypeError, AttributeError):  # two changes that do not go together
        return
    try:
        schema.validate(config)
    except InputError as error:
        assert error.where and error.expected


def test_all_problems_in_one_message():
    with pytest.raises(InputError) as caught:
        schema.validate(mixlora(**{"train.step": 3, f"{ROUTER}.k": 9, "optim.eps": 0.0}))
    for field in ("train.step", f"{ROUTER}.k", "optim.eps"):
        assert field in str(caught.value)


def test_layers():
    assert schema.resolve_layers("all", 3) == (0, 1, 2)
    assert schema.resolve_layers("5, 0-2", 6) == (0, 1, 2, 5)
    for spec in ("6", "4-9", "", "-1", "1-", "x"):
        with pytest.raises(InputError):
            schema.resolve_layers(spec, 6)


def test_experts():
    assert schema.resolve_experts("8", 3) == (8, 8, 8)
    assert schema.resolve_experts("2|4|6|8", 30) == (2,) * 8 + (4,) * 8 + (6,) * 7 + (8,) * 7
    assert schema.resolve_experts("2*1,4*3", 4) == (2, 4, 4, 4)
    for spec in ("2*1,4*4", "2|2|2|2|2", "0", "-1", "2*0", "2,4", "1" * 5000, "9" * 8):
        with pytest.raises(InputError):
            schema.resolve_experts(spec, 4)


@given(st.integers(1, 80), st.lists(st.integers(1, 9), min_size=1, max_size=8))
def test_experts_in_groups_cover_every_layer_in_order(num_layers, counts):
    if len(counts) > num_layers:
        return
    found = schema.resolve_experts("|".join(map(str, counts)), num_layers)
    assert len(found) == num_layers
    collapsed = [c for i, c in enumerate(found) if i == 0 or found[i - 1] != c]
    assert collapsed == [c for i, c in enumerate(counts) if i == 0 or counts[i - 1] != c]


def test_sites():
    assert schema.resolve_sites("v,q") == ("q", "v")
    assert schema.resolve_sites("*", absent=Backbone.ABSENT) == ("q", "k", "v", "o", "gate", "up", "down")
    assert schema.resolve_sites("*_proj") == ("in_proj", "x_proj", "dt_proj", "out_proj")
    with pytest.raises(InputError, match="'x\\*', which matches nothing"):
        schema.resolve_sites("x*", absent=Backbone.ABSENT)
    assert schema.resolve_sites("gate,u*") == ("gate", "up")
    assert schema.resolve_sites("ffn") == ("ffn",)


def test_mesh():
    mesh = dict(data=-1, fsdp=2, expert=1, tensor=1)
    assert schema.resolve_mesh(mesh, 8) == dict(data=4, fsdp=2, expert=1, tensor=1)
    assert schema.resolve_mesh({**mesh, "data": 1, "fsdp": 1}, 1, rows=5)["data"] == 1
    for changes, devices, rows in (({}, 3, None), ({"data": 2}, 8, None), ({}, 8, 6)):
        with pytest.raises(InputError) as caught:
            schema.resolve_mesh({**mesh, **changes}, devices, rows=rows)
        assert caught.value.where == "mesh"
    with pytest.raises(InputError):
        schema.check_mesh(mixlora(**{"train.batch_size": 6}), 4)
    assert schema.resolve_mesh({**mesh, "dcn": 2}, 8)["data"] == 4, "over slices and within"
    with pytest.raises(InputError, match="mesh.dcn"):
        schema.resolve_mesh({**mesh, "dcn": 3}, 8)


def test_model():
    dims = dict.fromkeys(("q", "k", "v", "o", "gate", "up", "down"), (64, 32))
    for changes, field in (
        ({"method.rules.ffn.experts": "2*8,4*8"}, "method.rules.ffn.experts"),
        ({"method.rules.ffn.experts": "2|2|2|4|4"}, "method.rules.ffn.experts"),
        ({"method.rules.attn.layers": "0-7"}, "method.rules.attn.layers"),
        ({f"{ADAPTER}.init": "pissa", f"{ADAPTER}.rank": 33}, f"{ADAPTER}.rank"),
    ):
        with pytest.raises(InputError) as caught:
            schema.check_model(mixlora(**changes), 4, dims)
        assert caught.value.where == field


def test_a_member_with_a_mistake_is_named(tmp_path, monkeypatch):
    (tmp_path / "losses").mkdir()
    head = "import dataclasses\n@dataclasses.dataclass(frozen=True)\n"
    (tmp_path / "losses" / "odd.py").write_text(f"{head}class Odd:\n    table: dict = None\n")
    (tmp_path / "losses" / "broken.py").write_text(f"{head}class Broken\n")
    monkeypatch.setattr(config_members, "PACKAGE", tmp_path)
    for name, where in (("odd", "field table"), ("broken", "line 3")):
        with pytest.raises(InputError) as caught:
            config_members.options("losses", name)
        assert f"{name}.py, {where}" in caught.value.where


def test_options_are_read_from_the_members_file(tmp_path, monkeypatch):
    """A newcomer's file is enough: fields, defaults, inherited fields and Literal choices."""
    (tmp_path / "routers").mkdir()
    (tmp_path / "routers" / "base.py").write_text(
        "import dataclasses\n@dataclasses.dataclass(frozen=True)\nclass Router:\n    share: str = 'site'\n"
    )
    (tmp_path / "routers" / "mine.py").write_text(
        "import dataclasses\nfrom typing import ClassVar, Literal\nimport absent\n"
        "from molora_jax.routers.base import Router\n"
        "@dataclasses.dataclass(frozen=True)\nclass Mine(Router):\n    NEEDS: ClassVar = ('z',)\n"
        "    mode: Literal['soft', 'hard'] = 'soft'\n    heat: float\n"
    )
    monkeypatch.setattr(config_members, "PACKAGE", tmp_path)
    config_members.options.cache_clear()
    options = config_members.options("routers", "mine")
    config_members.options.cache_clear()
    assert config_members.members("routers") == ("mine",)
    assert set(options) == {"share", "mode", "heat"}
    assert options["share"].default == "site" and options["mode"].accepts("hard") and not options["mode"].accepts("x")
    assert options["heat"].kind is float
    assert config_members.attribute("routers", "mine", "NEEDS") == ("z",)
    assert not config_members.unlisted("routers", "mine")
    (tmp_path / "routers" / "__init__.py").write_text("ROUTERS = {'other': None}\n")
    assert config_members.unlisted("routers", "mine")


def test_a_helper_file_is_no_member(tmp_path, monkeypatch):
    """What the axis does not list is not offered; asked for by name, it is told where members are listed."""
    (tmp_path / "routers").mkdir()
    (tmp_path / "routers" / "__init__.py").write_text("ROUTERS = {'mine': None}\n")
    for name in ("mine", "noise"):
        (tmp_path / "routers" / f"{name}.py").write_text("")
    monkeypatch.setattr(config_members, "PACKAGE", tmp_path)
    assert config_members.members("routers") == ("mine",)
    told = config_members.member_problem("router.name", "routers", "noise")
    assert "does not list" in told.got and "one of mine" in told.expected and "is a helper" in told.fix
    (tmp_path / "routers" / "new.py").write_text("@dataclasses.dataclass\nclass New:\n    k: int = 1\n")
    assert "Add it to" in config_members.member_problem("router.name", "routers", "new").fix
    assert "noise" not in config_members.member_problem("router.name", "routers", "other").expected


@pytest.mark.parametrize("name, near", [("max", ""), ("mena", "mean"), ("softmx", "softmax_topk"), ("ffm", "ffn")])
def test_the_nearest_name_of_a_short_word_is_near(name, near):
    assert config_fields.nearest(name, ("mean", "softmax_topk", "ffn", "sum")) == near


def test_every_start_away_from_zero_says_so():
    """AWAY is what keeps it from adapters that do not take it off: of each init that gives A0, and of no other. CORE is
    what keeps a core from adapters that have none."""
    import jax

    from molora_jax.core.types import Site
    from molora_jax.inits import INITS, made

    given = dict(base=jax.numpy.eye(8), base_grad=jax.numpy.eye(8))
    for name in INITS:
        leaves = made(name)(jax.random.key(0), Site("q", 8, 8, (0,), 2), 2, scale=1.0, **given)
        away = "A0" in leaves or "core" not in leaves and bool(jax.numpy.any(leaves["B"]))
        assert bool(config_members.attribute("inits", name, "AWAY")) == away, name
        assert bool(config_members.attribute("inits", name, "CORE")) == ("core" in leaves), name


@pytest.mark.parametrize("name", sorted(config_members.members("adapters")))
def test_who_takes_a_start_off_says_so_beside_its_factors(name):
    """One that does not (a newcomer's default, whatever it derives from) is refused such a start."""
    config = mixlora(**{f"{ADAPTER}.name": name, f"{ADAPTER}.init": "pissa"} | (
        {"method.rules.ffn.down": "per_expert"} if config_members.attribute("adapters", name, "ROW_FACTORS") else {}
    ))  # fmt: skip
    if config_members.stated_with("adapters", name, "SUBTRACTS", "factors"):
        schema.validate(config)
    else:
        with pytest.raises(InputError, match="init"):
            schema.validate(config)


def test_importing_the_schema_imports_no_jax():
    code = "import sys, molora_jax.config, launch.flags; sys.exit('jax' in sys.modules or 'flax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
