"""The table of bytes, the choice, and what is refused before anything compiles."""

import dataclasses

import jax
import pytest

from configs import common
from molora_jax import config as config_lib
from molora_jax import sharding
from molora_jax.backbones.compile import compile_model
from molora_jax.backbones.families import TINY
from molora_jax.core import trees
from molora_jax.engines import Engine, auto
from molora_jax.errors import InputError
from molora_jax.io.base import load_base
from molora_jax.training.setup import with_engine
from molora_jax.training.step import fresh
from tests import tiny
from tests.engines.problems import mesh


def model_of(rules, decoder=TINY, **changes):
    config = common.get_config()
    config.method.rules = rules
    config.base.source = "random:tiny"
    config.update(changes)
    config_lib.validate(config)
    return config, compile_model(config, decoder)


ROUTER = dict(name="softmax_topk", k=2, share="site")


def test_the_design_s_example():
    """D 4096, F 14336, E 8, R 16, K 2, T 4096, P 8, two bytes a number (here factors have four)."""
    big = dataclasses.replace(TINY, layers=1, width=4096, ffn_width=14336)
    projections = dict(a=common.rule("gate,up,down", experts="8", adapter=common.adapter(), router=ROUTER))
    ffn = dict(a=common.rule("ffn", experts="8", adapter=common.adapter(), router=ROUTER))
    rows = {}
    for name, rules in (("F1", projections), ("F2", ffn)):
        _, model = model_of(rules, big)
        table = auto.table(model, Engine("replicate", mesh(expert=8)), tokens=4096, itemsize=2)
        rows |= {(name, row.name): row for row in table}
    MB = 1e6
    assert rows["F1", "replicate"].shipped / 2 / MB == pytest.approx(25, rel=0.01)
    assert rows["F1", "gather"].shipped / 2 / MB == pytest.approx(37, rel=0.01)
    assert rows["F1", "all_to_all"].useful / MB == pytest.approx(1468 * 2 / 2, rel=0.1)
    assert rows["F2", "all_to_all"].useful / MB == pytest.approx(235, rel=0.01)
    # padded: 7 T rows against 1.75 T useful
    assert rows["F2", "all_to_all"].shipped > 4 * rows["F2", "all_to_all"].useful
    assert rows["F2", "ragged_all_to_all"].shipped < 1.5 * rows["F2", "ragged_all_to_all"].useful


def test_auto_takes_the_fewest_bytes_and_says_so():
    config, model = model_of(dict(a=common.rule("ffn", experts="8", adapter=common.adapter(), router=ROUTER)))
    made, text = with_engine(config, model, mesh(data=2, expert=4))
    assert made.engine.name == "replicate"
    for word in ("replicate", "gather", "all_to_all", "ragged_all_to_all", "MB useful", "fewest bytes"):
        assert word in text
    # very many experts of high rank and few tokens: tokens travel
    rows = auto.table(
        model_of(dict(a=common.rule("ffn", experts="64", adapter=common.adapter(rank=64), router=ROUTER)))[1],
        Engine("replicate", mesh(expert=8)), tokens=8, itemsize=4,
    )  # fmt: skip
    assert auto.choose(rows, state_bytes=0, memory=None)[0] == "all_to_all"
    rows = [dataclasses.replace(r, refused="x" if "all" in r.name else "") for r in rows]
    name, why = auto.choose(rows, state_bytes=10**9, memory=2 * 10**9)
    assert name == "gather" and "memory" in why


def test_auto_has_rank_space_only_where_tokens_travel(monkeypatch):
    """An engine that keeps tokens at home would gather an A that every device has already."""
    rules = dict(a=common.rule("q", experts="8", adapter=common.adapter(), router=ROUTER))
    _, model = model_of(rules)
    monkeypatch.setattr(auto, "_memory", lambda mesh: 1)  # whole experts are refused
    chosen = {}
    for tokens in (8, 10**6):
        on, _ = auto.resolve(
            model, engine="auto", mesh=mesh(data=2, expert=4), capacity=0.0, rank_space=True, tokens=tokens, itemsize=4
        )
        chosen[on.name] = on.rank_space
    assert chosen == {"all_to_all": True, "gather": False}


def test_one_device_or_nothing_to_place_prints_nothing():
    config, model = model_of(dict(a=common.rule("q", adapter=common.adapter())))
    assert with_engine(config, model, mesh(data=2, expert=4))[1] is None
    config, model = model_of(dict(a=common.rule("ffn", experts="4", adapter=common.adapter(), router=ROUTER)))
    made, text = with_engine(config, model, mesh())
    assert made.engine.alone and text is None


@pytest.mark.parametrize(
    "rules, options, expected",
    [
        (dict(a=common.rule("q", experts="4", adapter=common.adapter("dora"), router=ROUTER)), {}, "frozen product"),
        (
            dict(a=common.rule("ffn", experts="4", adapter=common.adapter(), router=ROUTER)),
            dict(expert_parallel=dict(capacity=0.0, rank_space=True)), "rank_space",
        ),
        (
            dict(
                a=common.rule("ffn", experts="4", adapter=common.adapter(), router=ROUTER),
                b=common.rule("up", adapter=common.adapter()),
            ), {}, "rule b changes gate or up",
        ),
        (
            dict(a=common.rule("q", experts="4", adapter=common.adapter(), router=ROUTER | dict(share="model"))),
            dict(expert_parallel=dict(capacity=1.0, rank_space=False)), "routes once",
        ),
    ],
)  # fmt: skip
def test_an_engine_that_cannot_serve_is_refused_by_name_and_passed_over_by_auto(rules, options, expected):
    config, model = model_of(rules, engine="all_to_all", **options)
    with pytest.raises(InputError, match=expected) as caught:
        with_engine(config, model, mesh(data=2, expert=4))
    assert caught.value.where == "engine" and "gather" in caught.value.fix
    config.engine = "auto"
    made, text = with_engine(config, model, mesh(data=2, expert=4))
    assert made.engine.name in ("replicate", "gather") and "cannot: " in text and expected in text


def test_options_of_an_exchange_without_one():
    with pytest.raises(InputError, match="capacity"):
        model_of(dict(a=common.rule("q", adapter=common.adapter())), engine="gather",
                 expert_parallel=dict(capacity=1.0, rank_space=False))  # fmt: skip


def test_state_lies_where_the_experts_lie():
    import optax

    base = load_base("random:tiny")
    where, params = mesh(data=2, expert=4), base.params
    model = compile_model(tiny.tiny_config("mola"), base.config)  # 2, 4, 6, 8 experts on four devices
    model = dataclasses.replace(model, engine=Engine("gather", where))
    shapes = jax.eval_shape(lambda p: fresh(model, optax.adam(1e-3), p, (), jax.random.key(0)), params)
    made = sharding.state_shardings(shapes, model, where)
    for tree in (made.adapters, made.opt[0].mu, made.opt[0].nu):
        for path, leaf in zip(trees.paths(tree), jax.tree.leaves(tree), strict=True):
            split = leaf.spec == jax.sharding.PartitionSpec(None, "expert")
            whole = "router" in path or path.split("/")[1] in ("000-000", "002-002")  # 2 and 6 experts
            assert split == (not whole), path
    assert made.opt[0].count.spec == made.step.spec == jax.sharding.PartitionSpec()
