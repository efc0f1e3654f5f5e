"""The worked example of CONTRIBUTING, a regime from outside the tree: it trains, remembers and goes on."""

import numpy as np

from molora_jax.evaluation.run import load_run
from tests.regimes.small import arrays, config, cut, digests, start, write


def test_the_mean_of_the_ends_of_its_parts(tmp_path):
    data = write(tmp_path)
    start(config(data, regime=dict(name="stages"), steps=4, save_every=2), tmp_path / "plain")
    regime = dict(name="tests.regimes.toy_regime:Swa", parts=2)
    start(config(data, regime=regime, steps=4, save_every=1), tmp_path / "swa")
    ends = [arrays(tmp_path / "plain", step) for step in (2, 4)]
    for path, leaf in arrays(tmp_path / "swa", 4).items():
        np.testing.assert_allclose(leaf, (ends[0][path] + ends[1][path]) / 2, rtol=1e-5, atol=1e-7)
    start(config(data, regime=regime, steps=4, save_every=1), cut(tmp_path / "swa", tmp_path / "again", 3))
    assert digests(tmp_path / "again", 4) == digests(tmp_path / "swa", 4)
    assert load_run(tmp_path / "swa", "latest").config.regime.parts == 2
