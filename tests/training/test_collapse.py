"""The watch for router collapse: what it says once, what it advises, and where it is silent."""

import dataclasses
import types

import numpy as np
import pytest

from molora_jax.routers import ROUTERS
from molora_jax.training.collapse import EVERY, WINDOW, CollapseWatch
from tests.tiny import tiny_config

LAYERS, E, TOKENS = 4, 8, 1000


def watch(losses=True):
    config, notes = tiny_config("mixlora"), []
    if not losses:
        with config.unlocked():
            config.losses = {}
    return CollapseWatch(config, notes.append), notes


def model(router="softmax_topk", experts=(E,) * LAYERS, route="", **options):
    router = None if router is None else ROUTERS[router](**options)
    rule = types.SimpleNamespace(name="ffn", router=router, experts=experts)
    return types.SimpleNamespace(rules=(rule,), route=route)


def site(share, k=1, layers=LAYERS, first=None):
    """Sums of a step: tokens by expert in the proportions `share [E]` or `[layers, E]`, the strongest in `first`."""
    if first is not None:
        return {"ffn/ffn": site(share, k, layers)["ffn/ffn"] | {"top1": site(first, 1, layers)["ffn/ffn"]["count"]}}
    share = np.broadcast_to(np.asarray(share, float), (layers, np.shape(share)[-1]))
    count = np.where(share < 0, -1, TOKENS * k * share / np.where(share > 0, share, 0).sum(-1, keepdims=True))
    top1 = np.where(share < 0, -1, count / k)
    return {"ffn/ffn": {"count": count, "top1": top1, "active_experts": np.full(layers, float(k))}}


def run(watched, steps, made, sums, start=0):
    return [watched.seen(start + step, sums, made) for step in range(1, steps + 1)]


ONE, EVEN = np.eye(E)[3] + 1e-3, np.ones(E)
NONE = np.zeros((LAYERS, E))
SHARED = np.where(np.arange(E) == 3, 7, 1)  # half of all slots


def test_it_is_said_once_a_collapse_and_counted():
    watched, notes = watch()
    shares = np.stack([EVEN, ONE, EVEN, ONE])
    columns = run(watched, 3 * WINDOW, model(k=1), site(shares))
    assert len(notes) == 1 and columns[WINDOW - 2] == {"watch/collapsed": 0} and columns[-1] == {"watch/collapsed": 2}
    assert f"step {WINDOW}: router collapse, ffn/ffn, layers 1, 3: over the last {WINDOW} steps expert 3" in notes[0]
    assert "expert 3 of 8 is the strongest of 99% of the tokens (the most in layer 1), 1.1 are in use" in notes[0]
    for advice in ("raise losses.balance.weight (now 0.01)", "set method.rules.ffn.router.jitter (now 0)",
                   "lower optim.learning_rate (now "):  # fmt: skip
        assert advice in notes[0]
    assert run(watched, WINDOW + EVERY, model(k=1), site(EVEN), start=100)[-1] == {"watch/collapsed": 0}
    run(watched, WINDOW + EVERY, model(k=1), site(ONE), start=200)
    assert sum("layers 0, 1, 2, 3" in note for note in notes) == 1, "over again, and back: said once more"


def test_without_a_balance_loss_it_says_how_to_add_one():
    watched, notes = watch(losses=False)
    run(watched, WINDOW, model(k=1, jitter=0.1), site(ONE))
    assert "add a balance loss (--config.losses.balance.weight=0.01)" in notes[0] and "jitter" not in notes[0]


@pytest.mark.parametrize(
    ("what", "made", "sums"),
    [
        ("even", model(k=2), site(EVEN, k=2)),
        ("a shared expert among two", model(k=2), site(SHARED, 2, first=EVEN)),
        ("skewed", model(k=1), site([5, 3, 1, 1, 0, 0, 0, 0])),
        ("dense", model(k=0), site(EVEN, k=E)),
        ("nearly dense", model(k=3, experts=(3,) * LAYERS), site(np.ones(3), k=2.8)),
        ("single experts", model(k=1, experts=(1,) * LAYERS), site([1.0])),
        ("by task", model("by_task"), site(ONE)),
        ("a gate a task", model("task_gate"), site(ONE)),
        ("fixed", model("fixed"), site(ONE)),
        ("a stage that routes by task", model(k=1, route="task"), site(ONE)),
        ("padding alone", model(k=1), {"ffn/ffn": dict(count=NONE, top1=NONE, active_experts=np.zeros(4))}),
    ],
)  # fmt: skip
def test_no_false_alarm(what, made, sums):
    watched, notes = watch()
    columns = run(watched, 2 * WINDOW, made, sums)
    assert not notes and columns[-1] in ({}, {"watch/collapsed": 0}), what


def test_batches_of_one_task_each_are_no_collapse():
    """A router that gives each task an expert: a batch of one task uses one, the window all."""
    watched, notes = watch()
    for step in range(1, 3 * WINDOW):
        watched.seen(step, site(np.eye(E)[step % E]), model(k=1))
    assert not notes


def test_the_top_two_that_are_always_the_same_and_layers_of_few_experts():
    watched, notes = watch()
    run(watched, WINDOW, model(k=2), site([1, 1, 0, 0, 0, 0, 0, 0], k=2))
    assert "2.0 are in use" in notes[0]
    watched, notes = watch()
    run(watched, WINDOW, model(k=2), site(SHARED, 2, first=ONE))
    assert "is the strongest of 99%" in notes[0], "its partners differ, and have no weight"
    watched, notes = watch()
    padded = np.array([[1, 0, -1, -1, -1, -1, -1, -1]] * 2 + [list(EVEN)] * 2, float)
    run(watched, WINDOW, model(k=1, experts=(0, 2, 2, 8, 8)), site(padded))
    assert "layers 1, 2: " in notes[0] and "expert 0 of 2 is the strongest of 100%" in notes[0]


def test_routers_that_follow_the_task_say_so():
    silent = {name for name, router in ROUTERS.items() if not router.COLLAPSES}
    assert silent == {"by_task", "fixed", "task_gate", "labelled_topk", "self_activated"}
    assert all(dataclasses.is_dataclass(router) for router in ROUTERS.values())
