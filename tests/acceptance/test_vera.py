"""VeRA, arXiv 2310.11454: items 1, 2 and 7 of the baselines' list."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from molora_jax.adapters.vera import Vera
from molora_jax.core import random_bases, trees
from molora_jax.core.types import Site
from molora_jax.training import summary
from tests.acceptance.baselines import PEFT, logits, stacked
from tests.acceptance.blocks import ALL, ONE, model, noisy
from tests.battery.cases import SMALL

SITES = tuple(Site(name, *ONE.dims(name), (0, 1), 2) for name in ALL)


def test_acceptance_1_the_start_is_a_change_of_exactly_zero():
    adapter, site = Vera(rank=4), SITES[0]
    p, shared = adapter.init_leaves(jax.random.key(0), site, 0), adapter.init_shared(jax.random.key(0), SITES)
    np.testing.assert_array_equal(p["d"], np.full((2, 4), np.float32(0.1)))
    assert not p["b"].any()
    A, B = shared["basis_A"], shared["basis_B"]
    for basis, bound in ((A, (6 / 48) ** 0.5), (B, (6 / 4) ** 0.5)):  # the widest site has 48 inputs, 48 outputs
        assert basis.shape == (4, 48) and 0.9 * bound < np.abs(basis).max() <= bound


def test_acceptance_2_pefts_logits():
    leaves = lambda site: {  # noqa: E731
        leaf: stacked("vera", site, f"vera_lambda_{leaf}") for leaf in ("d", "b")
    }
    shared = {"basis_A": jnp.asarray(PEFT["vera/vera_A"]), "basis_B": jnp.asarray(PEFT["vera/vera_B"].T)}
    np.testing.assert_allclose(logits("vera", ALL, leaves, shared, rank=5), PEFT["vera/logits"], atol=1e-4)


def test_acceptance_7_bases_are_one_pair_for_all_layers_and_never_train():
    made = model(ALL, (2, 4), ("softmax_topk", dict(k=2)), adapter="vera", decoder=SMALL)
    trainable, fixed = (flatten_dict(x, sep="/") for x in trees.split(noisy(made), made.frozen_patterns()))
    assert set(fixed) == {"mix/shared/basis_A", "mix/shared/basis_B"}
    own = {path: leaf for path, leaf in trainable.items() if "/router/" not in path}
    for path, leaf in own.items():
        layer, site = path.split("/")[1:3]
        E, (_, d_out) = {"000-000": 2, "001-001": 4}[layer], SMALL.dims(site)
        assert leaf.shape == (1, E, 3 if path.endswith("/d") else d_out)
    table = summary.rules_table(made, noisy(made), made.frozen_patterns(), 1000).splitlines()
    assert table[0].split()[-1] == "frozen" and table[2].endswith("1.2 kB float32"), "two of 3 x 48 numbers"
    assert sum(leaf.size for leaf in own.values()) == 6 * sum(SMALL.dims(site)[1] + 3 for site in ALL)


def test_bases_follow_from_the_seed_alone_and_a_narrower_rule_has_the_first_columns():
    wide, narrow = (Vera(rank=4).init_shared(jax.random.key(k), SITES[:n]) for k, n in ((0, 7), (5, 4)))
    np.testing.assert_allclose(narrow["basis_A"] * 32**0.5, wide["basis_A"][:, :32] * 48**0.5, rtol=1e-6)
    np.testing.assert_array_equal(narrow["basis_B"], wide["basis_B"][:, :32])
    other = dataclasses.replace(Vera(rank=4), seed=1).init_shared(jax.random.key(0), SITES)
    assert np.abs(other["basis_A"] - wide["basis_A"]).max() > 0.1


def test_a_random_basis_is_the_same_everywhere():
    """Threefry by its paper (Salmon et al. 2011): others would open old runs wrongly."""
    x = np.asarray(random_bases.uniform(7, jnp.arange(200), 301))
    for i, j in ((0, 0), (3, 1), (199, 300)):
        assert x[i, j] == np.float32(2 * (threefry(7, 0, i, j // 2)[j % 2] >> 9) / 2**23 - 1)
    assert x.min() >= -1 and x.max() < 1 and abs(x.mean()) < 0.01 and abs(x.var() - 1 / 3) < 0.01
    assert abs(np.corrcoef(x[:, 0::2].ravel()[:30000], x[:, 1::2].ravel()[:30000])[0, 1]) < 0.02


def threefry(k0, k1, x0, x1):
    """Threefry-2x32 with 20 rounds, in Python's integers."""
    keys, word = (k0, k1, 0x1BD11BDA ^ k0 ^ k1), 0xFFFFFFFF
    x0, x1 = (x0 + keys[0]) & word, (x1 + keys[1]) & word
    for block in range(5):
        for turn in ((13, 15, 26, 6), (17, 29, 16, 24))[block % 2]:
            x0 = (x0 + x1) & word
            x1 = ((x1 << turn | x1 >> (32 - turn)) & word) ^ x0
        x0 = (x0 + keys[(block + 1) % 3]) & word
        x1 = (x1 + keys[(block + 2) % 3] + block + 1) & word
    return x0, x1
