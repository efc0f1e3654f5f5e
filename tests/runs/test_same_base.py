"""One base, by all that asks: train.init_from, a rule's `load` of a run and of an exported one, surgery."""

import dataclasses

import pytest

from configs import common
from molora_jax import perform
from molora_jax.backbones.compile import compile_model
from molora_jax.errors import InputError
from molora_jax.evaluation.run import _arrays_of
from molora_jax.export.perform import perform as export
from molora_jax.io.base import load_base
from molora_jax.runs import expert_runs, warm_start, written
from molora_jax.runs.opened import open_run
from molora_jax.runs.same_base import facts_of, same_base
from tests.cases.common import CHATML, SPECIALS, byte_inner, config, folder, weights
from tests.surgery.make import config_of, lora_rules, new_run

RULES = lora_rules(sites="q,v")
BASES = {  # the same weights
    "same": {},
    "numbers": dict(cfg=config(rope_theta=100.0)),
    "template": dict(template=CHATML.replace("user", "human").replace("\n", " ")),
    "tokenizer": dict(inner=byte_inner(SPECIALS[::-1])),
    "quant": {},
}
REFUSED = {"numbers": "another config.json:\n  base.config.rope_base: was", "tokenizer": "with another tokenizer"}
SAID = {"template": "another chat template", "quant": "base.quant=none; here base.quant=int8"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder of the bases, of a run on each and of one exported."""
    path = tmp_path_factory.mktemp("bases")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOLORA_CACHE", str(path / "cache"))
        for name, changes in BASES.items():
            folder(path / name, arrays=weights(config()), **changes)
            quant = dict(quant="int8") if name == "quant" else {}
            new_run(path / f"run-{name}", RULES, source=f"dir:{path / name}", base=quant)
        export(path / "run-same", "molora", path / "exported", note=lambda text: None)
        yield path


def start(path, name, base, facts, note):
    shapes = written.shapes_of(open_run(path / "run-same", warn=print).config, base.config, classes=0)
    items = {item: shapes[item] for item in warm_start.ITEMS}
    warm_start.start(str(path / "run-same"), items, base=facts, note=note)


def load(path, name, base, facts, note, source="run-same", kind=""):
    own = common.get_config()
    own.method.rules = dict(all=common.rule("q,v", adapter=common.adapter(rank=4, dropout=0.0)))
    rule = dataclasses.replace(compile_model(own, base.config).rules[0], load=(f"{kind}{path / source}",))
    expert_runs._factors(rule.load[0], rule, base.config, facts, note)


def load_exported(*given):
    load(*given, source="exported", kind="molora:")


def surgery(path, name, base, facts, note):
    inputs = path / f"run-{name}", path / "run-same"
    perform(config_of("average", *inputs), path / f"average-{name}", note=note)


WAYS = [start, load, load_exported, surgery]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", BASES)
def test_another_base_is_refused_or_said(made, way, name):
    said, asked = [], common.get_config()
    asked.base.quant = "int8" if name == "quant" else "none"
    base = load_base(f"dir:{made / name}")

    def run():
        way(made, name, base, facts_of(base, asked), said.append)

    message = "trained on base.quant=none" if (way, name) == (surgery, "quant") else REFUSED.get(name)
    if message:
        where = {start: "train.init_from", surgery: "surgery.inputs"}.get(way, "method.rules.all.load")
        with pytest.raises(InputError, match=f"^{where}: got .*{message}"):
            run()
    else:
        run()
        assert any(SAID[name] in line for line in said) if name in SAID else not [x for x in said if "trained" in x]


def test_what_an_older_run_does_not_tell_is_not_compared(made):
    ours, said = facts_of(load_base(f"dir:{made / 'same'}"), common.get_config()), []
    other = facts_of(load_base(f"dir:{made / 'tokenizer'}"), common.get_config())

    def check(theirs):
        same_base(
            theirs,
            ours,
            refuse=lambda got, expected, fix: InputError("a", got=got, expected=expected),
            note=said.append,
        )

    config = dict(list(ours["config"].items())[:4])
    for theirs in ({}, {"digest": ours["digest"]}, {"config": None}, {"config": config | {"gone": 1}}):
        check(theirs)
    assert said == []
    check({"tokenizer": other["tokenizer"]})  # of a version that did not tell which of the two
    assert said == ["trained with another tokenizer or chat template"]
    for theirs in ({"config": 5}, {"digest": 5}, {"config": ours["config"] | {"width": 1}}):
        with pytest.raises(InputError):
            check(theirs)


def test_arrays_are_shared_by_runs_of_one_form_of_one_base(made):
    runs = {name: open_run(made / f"run-{name}", warn=print) for name in BASES}
    assert {name for name, run in runs.items() if _arrays_of(run) == _arrays_of(runs["same"])} == {
        "same", "template", "tokenizer",
    }  # fmt: skip
