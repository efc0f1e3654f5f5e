"""A checkpoint is exported to the same bytes wherever it was trained and wherever it is opened."""

import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from configs import common
from molora_jax import config as config_lib
from molora_jax.export.perform import perform
from molora_jax.io import tensors
from molora_jax.training import loop

ROOT = pathlib.Path(__file__).parents[2]
FORMATS = ("mixlora", "molora")


def bytes_of(folder) -> dict:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


@pytest.mark.parametrize("engine", ["all_to_all", pytest.param("gather", marks=pytest.mark.slow),
                                    pytest.param("replicate", marks=pytest.mark.slow)])  # fmt: skip
def test_one_device_and_eight_export_the_same_bytes_and_every_expert(tmp_path, monkeypatch, engine):
    """Trained with its experts on four devices; a peer's export held one eighth of them, and zeros."""
    config = common.get_config()
    config.base.source, config.engine = "random:tiny", engine
    config.method.rules = dict(ffn=common.rule(
        "ffn", experts="4", adapter=common.adapter(rank=2), router=dict(name="softmax_topk", k=4, share="site")
    ))  # fmt: skip
    config.data.update(tasks="math", seq_len=96)
    config.mesh.update(data=2, expert=4)
    config.optim.warmup = 0
    config.train.update(steps=2, batch_size=8, save_every=0)
    config_lib.validate(config)
    given, save = {}, loop.TrainingRun.save

    def watched(self, state, step, **more):
        given.update(flatten_dict(jax.device_get(state.adapters), sep="/"))
        return save(self, state, step, **more)

    monkeypatch.setattr(loop.TrainingRun, "save", watched)
    loop.train(config, str(tmp_path / "run"), note=lambda text: None)
    for format in FORMATS:
        perform(tmp_path / "run", format, tmp_path / "eight" / format)
    found = tensors.read(tmp_path / "eight" / "molora" / "molora.safetensors")
    for path, leaf in given.items():
        np.testing.assert_array_equal(found[f"adapters/{path}"], leaf, err_msg=path)
        assert np.abs(leaf).reshape(*leaf.shape[:2], -1).max(-1).all(), f"an expert of {path} is 0"
    code = (
        "import sys, jax; from molora_jax.export.perform import perform; assert jax.device_count() == 1\n"
        "for format in sys.argv[3:]: perform(sys.argv[1], format, sys.argv[2] + '/' + format)"
    )
    env = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", code, tmp_path / "run", tmp_path / "one", *FORMATS]
    subprocess.run(command, check=True, env=env, cwd=tmp_path)
    one, eight = bytes_of(tmp_path / "one"), bytes_of(tmp_path / "eight")
    assert one.keys() == eight.keys() and len(one) == 5
    for name in one:
        assert one[name] == eight[name], name
