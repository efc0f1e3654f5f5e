"""(IA)3, arXiv 2205.05638: items 1 and 2 of the baselines' list, its merge, and mixtures of its vectors."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common
from molora_jax import config as schema
from molora_jax.adapters.ia3 import Ia3
from molora_jax.core.types import Site
from molora_jax.errors import InputError
from molora_jax.surgery.merge_into_base import merged_kernel
from tests.acceptance.baselines import PEFT, base, logits, stacked
from tests.acceptance.blocks import ONE, model, noisy, output
from tests.battery import cases

SITES = ("k", "v", "down")


def leaves(site):
    return {"l": stacked("ia3", site, "ia3_l", lambda x: x.reshape(1, -1))}


def test_acceptance_1_vectors_start_at_one_on_the_side_that_they_scale():
    for name, width in (("k", 14), ("gate", 14), ("down", 20)):
        made = Ia3().init_leaves(jax.random.key(0), Site(name, 20, 14, (0,), 3), 0)
        np.testing.assert_array_equal(made["l"], np.ones((3, width)))


def test_acceptance_2_pefts_logits_with_biases():
    """k and v have biases, which are scaled too; down's input is scaled, its output is not."""
    np.testing.assert_allclose(logits("ia3", SITES, leaves, rank=0, alpha=0.0), PEFT["ia3/logits"], atol=1e-4)


def test_merged_kernels_and_biases_have_the_same_logits():
    backbone, params = base()
    blocks = jax.tree.map(np.array, params["blocks"])
    for site in SITES:
        at = Site(site, *backbone.dims(site), (0, 1), 1)
        for layer in (0, 1):
            own = jax.tree.map(lambda x, layer=layer: x[layer], leaves(site))
            rule = dataclasses.make_dataclass("Rule", ["adapter"])(Ia3())
            kernel, gain = merged_kernel(blocks[site]["kernel"][layer], [(rule, at, own, {})])
            blocks[site]["kernel"][layer] = kernel
            if "bias" in blocks[site]:
                blocks[site]["bias"][layer] *= gain
    assert "bias" in blocks["k"]
    merged = {**params, "blocks": blocks}
    got = logits("ia3", (), leaves, params=merged, rank=0, alpha=0.0)
    np.testing.assert_allclose(got, PEFT["ia3/logits"], atol=1e-4)


def test_k_scales_its_output_and_down_its_input():
    made = model(("k", "down"), 1, adapter="ia3")
    adapters = noisy(made)
    own = adapters["mix"]["000-000"]
    params = dict(cases.base(ONE))
    params["blocks"] = params["blocks"] | {
        "k": {"kernel": params["blocks"]["k"]["kernel"] * own["k"]["l"]},
        "down": {"kernel": params["blocks"]["down"]["kernel"] * jnp.swapaxes(own["down"]["l"], 1, 2)},
    }
    np.testing.assert_allclose(output(made, adapters), output(made.without_rules(), {}, params=params), atol=1e-5)


def test_a_routed_ffn_applies_w_d_once_and_a_chain_has_nothing_to_scale():
    config = common.get_config()
    router = dict(name="softmax_topk", k=2)
    config.method.rules = dict(all=common.rule("ffn", adapter=dict(name="ia3"), router=router, experts="4"))
    schema.validate(config)
    made = [model(("ffn",), 3, ("softmax_topk", dict(k=2)), adapter="ia3") for _ in range(2)]
    rule = dataclasses.replace(made[1].rules[0], down="per_expert")
    made[1] = dataclasses.replace(made[1], rules=(rule,))
    once, each = (output(m, noisy(m)) for m in made)
    np.testing.assert_allclose(once, each, rtol=1e-5, atol=1e-5)
    config.method.rules.all.placement = dict(name="chain")
    with pytest.raises(InputError, match="without row factors"):
        schema.validate(config)
    del config.method.rules.all.placement
    config.method.rules.all.adapter.rank = 8
    with pytest.raises(InputError, match="method.rules.all.adapter.rank"):
        schema.validate(config)
