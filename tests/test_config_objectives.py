"""Objectives and trained copies in a config: what is taken, what is refused and why, before jax is loaded."""

import functools

import pytest

from configs import common
from launch import flags
from molora_jax import config as schema
from molora_jax.config import defaults, objectives
from molora_jax.errors import InputError
from molora_jax.runs import identity


def config(**changes):
    out = common.get_config()
    out.method.rules = dict(all=common.rule("q", adapter=common.adapter()))
    out.unlock()
    for path, value in changes.items():
        group = out
        *groups, key = path.split("/")
        for name in groups:
            group = group[name]
        group[key] = value
    return out


DPO = dict(name="preference", form="dpo", reference="base")


def test_what_a_run_reads_and_what_belongs_together():
    schema.validate(config(objective=DPO))
    assert objectives.unit(config(objective=DPO)) == 2 and objectives.reads(config(objective=DPO)) == "pair"
    stages = {"schedule/s00/steps": 3, "schedule/s01": dict(common.get_config().schedule.s00.to_dict(), objective=DPO)}
    with pytest.raises(InputError, match=r"schedule\.s01\.objective\.name.*reads pair rows.*init_from"):
        schema.validate(config(**stages))
    schema.validate(config(**{"method/rules": {}, "objective": dict(name="classify")}))  # its head trains
    schema.validate(config(**{"method/rules": {}, "method/train_base": "all"}))


@pytest.mark.parametrize(
    "changes, where, told",
    [
        ({"objective": dict(name="lmm")}, "objective.name", "Did you mean 'lm'"),
        ({"objective": dict(name="preference", form="ppo")}, "objective.form", "'dpo'"),
        ({"objective": dict(name="preference", beta=0.0)}, "objective.beta", "in ["),
        ({"objective": dict(name="lm", beta=1.0)}, "objective.beta", "an unknown field"),
        ({"objective": DPO, "train/batch_size": 3}, "train.batch_size", "whole units of 2 rows"),
        ({"objective": DPO, "train/batch_size": 6, "mesh/data": 2}, "mesh", "units of 2 rows"),
        ({"objective": DPO, "train/exact": True, "train/batch_size": 16}, "objective.name", "lm with train.exact"),
        ({"objective": DPO, "data/format": "alpaca"}, "data.format", "pair rows"),
        ({"data/format": "labelled"}, "data.format", "text rows"),
        ({"objective": dict(name="classify"), "data/system": "x"}, "data.system", "no chat template"),
        ({"objective": dict(name="classify"), "data/raw": True}, "data.raw", "label rows"),
        ({"method/train_base": "norm"}, "method.train_base", "Did you mean 'norms'"),
        ({"method/train_base": "all"}, "method.train_base", "no rules"),
        ({"method/train_base": "norms", "train/exact": True}, "method.train_base", "train.exact"),
        ({"objective": DPO, "method/rules": dict(modules=common.rule("q", adapter=common.adapter()))},
         "method.rules.modules", "another name"),
        ({"method/rules": dict(modules=common.rule("q", adapter=common.adapter()))},
         "method.rules.modules", "another name"),
        ({"schedule/s00/objective": dict(name="nothing")}, "schedule.s00.objective.name", "one of"),
    ],
)  # fmt: skip
def test_what_is_refused(changes, where, told):
    with pytest.raises(InputError) as error:
        schema.validate(config(**changes))
    assert error.value.where == where and told in str(error.value)


def test_pairs_stay_on_one_device():
    made = config(objective=DPO, **{"train/batch_size": 8})
    assert schema.check_mesh(made, 4)["data"] == 4
    with pytest.raises(InputError, match="units of 2 rows"):
        schema.check_mesh(made, 8)


def test_an_older_config_and_its_identity_are_those_of_lm():
    old = config().to_dict()
    del old["objective"], old["method"]["train_base"], old["schedule"]["s00"]["objective"]
    schema.validate(old)
    whole, added = defaults.completed(old)
    assert whole["objective"] == {"name": "lm"} and {"objective", "method.train_base"} <= set(added)
    extra = dict(base_digest="b", data_fingerprint="d")
    before, now = (identity.identity(one, extra) for one in (old, config().to_dict()))
    assert identity.compare(before, now)[0] == []
    other = identity.identity(config(objective=DPO).to_dict(), extra)
    assert [line.split(":")[0] for line in identity.compare(before, other)[0]] == [
        "objective.form", "objective.name", "objective.reference",
    ]  # fmt: skip


def test_a_teachers_path_is_no_part_of_the_identity():
    one, two = (
        identity.identity(
            config(objective=dict(name="distill", teacher=path)).to_dict(),
            dict(base_digest="b", data_fingerprint="d", frozen=[digest]),
        )
        for path, digest in (("a", "x"), ("b", "y"))
    )
    assert [line.split(":")[0] for line in identity.compare(one, two)[0]] == ["extra.frozen"]


MEMBERS = {  # a field of a member, wherever one stands in a config, and a value that is not its default
    "method.rules.all.adapter.rank": 3,
    "method.rules.all.adapter.init.layers": 5,
    "method.rules.all.router.k": 3,
    "losses.balance.counts": "soft",
    "optim.b1": 0.5,
    "objective.beta": 0.7,
    "schedule.s00.objective.beta": 0.7,
}


@pytest.mark.parametrize("path", MEMBERS)
def test_an_option_that_a_member_gained_had_its_default_in_older_runs(path):
    made = common.get_config()
    adapter = common.adapter("rslora", init=dict(name="lora_ga"))
    made.method.rules = dict(all=common.rule("q", adapter=adapter, experts="4", router=dict(name="softmax_topk")))
    with made.unlocked():
        made.losses = dict(balance=common.balance())
        made.objective, made.schedule.s00.objective = dict(DPO), dict(DPO)

    def at(value=None):
        tree = made.to_dict()
        *groups, name = path.split(".")
        group = functools.reduce(lambda node, key: node[key], groups, tree)
        group.pop(name, None)
        group.update({} if value is None else {name: value})
        return identity.identity(tree, dict(base_digest="b", data_fingerprint="d"))

    older, default = at(), defaults.default_at(made.to_dict(), path)
    for one, two in ((older, at(default)), (at(default), older)):
        assert identity.compare(one, two)[0] == []
    assert [line.split(":")[0] for line in identity.compare(older, at(MEMBERS[path]))[0]] == [path]


def test_the_command_line_names_objectives():
    made = flags.override(
        config(),
        [("objective.beta", "0.5"), ("objective.name", "preference"), ("objective.form", "dpo"),
         ("schedule.s00.objective.temperature", "2"), ("schedule.s00.objective.name", "distill")],
    )  # fmt: skip
    assert made.objective.to_dict() == dict(name="preference", beta=0.5, form="dpo")
    assert made.schedule.s00.objective.to_dict() == dict(name="distill", temperature=2.0)


def test_experts_of_a_base_do_not_train_whole():
    """Their kernels are read expert by expert, without a gradient: better refused than silently frozen."""
    from molora_jax.training.setup import setup

    whole = config(**{"method/rules": {}, "method/train_base": "all", "base/source": "random:tiny-moe"})
    schema.validate(whole)
    with pytest.raises(InputError, match=r"method\.train_base: got 'all' on a base that routes.*base_experts"):
        setup(whole)
