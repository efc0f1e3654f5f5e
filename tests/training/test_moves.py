"""It trains, provably: every trainable leaf moves within three steps, nothing else does, and what is saved is that."""

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from configs import common
from molora_jax import config as config_lib
from molora_jax.core import trees
from molora_jax.runs.opened import open_run
from molora_jax.training import loop, summary
from tests.backbones import every_family, family_cases
from tests.tiny import write_family

TOP2 = dict(name="softmax_topk", k=2, share="site")
LLAMA, SSM = "q,k,v,o,gate,up,down", "in_proj,x_proj,dt_proj,out_proj"


def rule(sites, router=TOP2, experts="4", name="lora", **more):
    adapter = common.adapter(name, **dict(rank=2, alpha=4.0, dropout=0.0) | more.pop("options", {}))
    return dict(all=common.rule(sites, adapter=adapter, router=router, experts=experts if router else "1", **more))


CHAIN = dict(placement=dict(name="chain", iterations=2))
EXPERTS = dict(router=None, placement=dict(name="base_experts", factors="own"), base_router="trained")
CASES = {
    "projection": ("random:tiny", rule(LLAMA)),
    "ffn": ("random:tiny", rule("ffn", router=dict(name="biased_topk", k=2, bias_rate=0.1, share="site"))),
    "chain": ("random:tiny", rule("ffn", **CHAIN)),
    "base_experts": ("random:tiny-moe", rule("ffn", **EXPERTS) | {"attn": rule("q,k,v,o", None)["all"]}),
    "bert": ("random:tiny-bert", rule("q,k,v,o,up,down")),
    "pissa": ("random:tiny-qwen3", rule("q,v", None, options=dict(init="pissa"))),
    "vera": ("random:tiny-untied", rule("q,down", None, "1", "vera", options=dict(alpha=0.0))),
}  # fmt: skip
FAMILIES = every_family.DECODERS | {"sliding": family_cases.KINDS["sliding window (mistral)"]}


def trained(tmp_path, monkeypatch, source, rules, **groups):
    """`(leaves of step 0, of step 3, as the last save was given them, frozen patterns, notes)`, by path."""
    config = common.get_config()
    config.base.source, config.method.rules = source, rules
    config.data.update(tasks="math", seq_len=96)
    config.optim.update(learning_rate=1e-2, warmup=0)
    config.train.update(steps=3, batch_size=8, save_every=0, keep=3)
    if "bert" in source:
        config.objective = dict(name="classify", pooling="mean")
        config.data.tasks = "sentiment"
    for group, values in groups.items():
        config[group].update(values)
    config_lib.validate(config)
    given, notes, save = {}, [], loop.TrainingRun.save

    def watched(self, state, step, **more):
        items = dict(adapters=state.adapters, modules=state.modules, router_state=state.router_state)
        given.update({name: jax.device_get(tree) for name, tree in items.items()})
        return save(self, state, step, **more)

    monkeypatch.setattr(loop.TrainingRun, "save", watched)
    loop.train(config, str(tmp_path / "run"), note=notes.append)
    runs = [open_run(tmp_path / "run", step, warn=str) for step in (0, 3)]
    flat = lambda items: flatten_dict(trees.joined(items["adapters"], items.get("modules", {})), sep="/")  # noqa: E731
    before, after = (flat(one.items) for one in runs)
    jax.tree.map(np.testing.assert_array_equal, given["router_state"], runs[1].items["router_state"])
    return before, after, flat(given), runs[1].model.frozen_patterns(), notes


def check(before, after, given, frozen, notes):
    trainable, fixed = (flatten_dict(part, sep="/") for part in trees.split(unflatten_dict(before, sep="/"), frozen))
    assert trainable and before.keys() == after.keys() == given.keys()
    for path in trainable:
        assert (before[path] != after[path]).any(), f"{path} did not move"
    for path in fixed:
        np.testing.assert_array_equal(before[path], after[path], err_msg=path)
    for path, leaf in given.items():
        np.testing.assert_array_equal(leaf, after[path], err_msg=path)  # what is saved is what moved
    told = next(note for note in notes if "trains" in note.split("\n")[0]).splitlines()
    for path in trainable:
        assert any(path.rsplit("/", 1)[-1] in line for line in told), path


@pytest.mark.parametrize("name", CASES)
def test_every_trainable_leaf_moves_within_three_steps_and_is_saved(tmp_path, monkeypatch, name):
    check(*trained(tmp_path, monkeypatch, *CASES[name]))


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_in_every_family(tmp_path, monkeypatch, name):
    """Of a base that routes its experts and its router too."""
    folder = write_family(FAMILIES[name], tmp_path / "base")
    rules = rule(SSM if name in every_family.MAMBA else LLAMA)
    if name in every_family.MOE:
        rules = rule("ffn", **EXPERTS) | {"attn": rule("q,k,v,o", None)["all"]}
    check(*trained(tmp_path, monkeypatch, f"dir:{folder}", rules, data=dict(seq_len=64)))


def test_the_table_says_per_site_what_trains():
    adapters = {
        "all": {
            "000-001": {"q": {"A": np.zeros((2, 4, 3, 8)), "B": np.zeros((2, 4, 3, 8))},
                        "router": {"q": {"W": np.zeros((2, 4, 8))}}},
            "002-003": {"q": {"A": np.zeros((2, 2, 3, 8)), "B": np.zeros((2, 2, 3, 8))}},
            "shared": {"lambda": np.zeros(5)},
        }
    }  # fmt: skip
    lines = summary.sites_table(adapters, ("all/*/q/A",), {"base": {"embed": np.zeros((3, 2))}}).splitlines()
    assert lines[0].split() == ["rule", "site", "layers", "trains", "frozen"]
    row = {tuple(line.split()[:2]): " ".join(line.split()[2:]) for line in lines[1:]}
    assert row["all", "q"] == "0-3 B 288 A 288" and row["all", "router/q"] == "0-1 W 64 -"
    assert row["all", "(shared)"] == "- lambda 5 -" and row["modules", "base"] == "- embed 6 -"
