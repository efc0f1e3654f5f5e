"""The battery's own footing: the way in which it takes later members equals the equations that it writes out."""

import dataclasses

import numpy as np
import pytest

from molora_jax.adapters import ADAPTERS
from molora_jax.backbones.model import Model
from molora_jax.core.rules import Rule
from molora_jax.losses import LOSSES
from molora_jax.routers import ROUTERS
from tests.battery import cases, members, reference
from tests.battery.cases import BATCH, SMALL, base, random_adapters


def renamed(member):
    """The same member under another name, as a later one would come."""
    other = dataclasses.make_dataclass("Later", [], bases=(type(member),), frozen=True)
    return other(**dataclasses.asdict(member))


@pytest.mark.parametrize(
    ("sites", "share"),
    [
        pytest.param(("ffn",), "site", id="ffn-site"),
        pytest.param(("q", "down"), "model", id="q,down-model"),
        pytest.param(("ffn",), "model", id="ffn-model", marks=pytest.mark.slow),
        pytest.param(("q", "down"), "site", id="q,down-site", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("adapter", [*cases.ADAPTERS, "mos"])  # later ones are asked anyway
def test_later_members_equal_those_written_out(adapter, sites, share):
    router = ROUTERS["top_p"](p=0.6, share=share)
    init = "orthonormal" if ADAPTERS[adapter].CORE else "pissa" if ADAPTERS[adapter].SUBTRACTS else "kaiming"
    rule = Rule("mix", sites, (3, 4), ADAPTERS[adapter](rank=2, alpha=4.0, dropout=0.0, init=init), router)
    model = Model(SMALL, (rule,), (), "dots", 3)
    later = dataclasses.replace(rule, adapter=renamed(rule.adapter), router=renamed(router))
    if share == "model":
        model = dataclasses.replace(model, rules=(dataclasses.replace(rule, experts=(4, 4)),))
        later = dataclasses.replace(later, experts=(4, 4))
    adapters = random_adapters(model, base(SMALL))
    args = list(map(reference.as_float64, (base(SMALL), adapters)))
    written, decided = reference.forward(np, model, *args, BATCH)
    asked, asked_decided = reference.forward(np, dataclasses.replace(model, rules=(later,)), *args, BATCH)
    np.testing.assert_allclose(asked, written, rtol=1e-5, atol=1e-5)
    assert decided.keys() == asked_decided.keys() and len(decided) == (1 if share == "model" else 2 * len(sites))
    for key, d in decided.items():
        np.testing.assert_array_equal(d.selected, asked_decided[key].selected)
    for name in ("balance", "entropy"):
        loss = LOSSES[name]()
        np.testing.assert_allclose(
            members.loss(model, loss, asked_decided, BATCH), getattr(reference, name)(np, decided, loss), rtol=1e-5
        )


def test_random_factors_are_away_from_their_start():
    rule = Rule("mix", ("q",), (4, 4), ADAPTERS["dora"](rank=2, alpha=4.0), ROUTERS["softmax_topk"]())
    model = Model(SMALL, (rule,), (), "dots", 3)
    leaves = random_adapters(model, base(SMALL))["mix"]["000-001"]
    norm = np.linalg.norm(base(SMALL)["blocks"]["q"]["kernel"], axis=1)[:, None]
    assert np.abs(leaves["q"]["m"] / norm - 1).mean() > 0.05
    assert all((np.abs(leaves["q"][leaf]) > 0).all() for leaf in "AB") and np.abs(leaves["router"]["q"]["W"]).max() > 0
