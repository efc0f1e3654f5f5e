"""What the tests of regimes run: three tasks of a few labelled rows, rank 2 on the tiny base, steps of four rows."""

import json
import pathlib
import shutil

import numpy as np
from flax.traverse_util import flatten_dict

from configs import common
from molora_jax import config as config_lib
from molora_jax.runs.checkpoints import load, read_manifest
from molora_jax.runs.metrics import is_timing
from molora_jax.training.loop import train

TASKS = ("parity", "size", "third")
DP = dict(dp_clip=0.5, dp_noise=0.7)


def write(folder, rows: int = 90):
    """A file of labelled texts of three tasks, each of two classes of its own."""
    ask = {"parity": lambda i: ("odd", "even")[i % 2 == 0], "size": lambda i: ("small", "large")[i > rows // 2],
           "third": lambda i: ("yes", "no")[i % 3 > 0]}  # fmt: skip
    lines = [{"text": f"{task} {i}", "label": of(i), "task": task} for i in range(rows) for task, of in ask.items()]
    path = pathlib.Path(folder) / "rows.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return f"jsonl:{path}"


def config(tasks, *, regime, freeze="", losses=None, optim="sgd", sites="q", rank=2, **fields):
    out = common.get_config()
    out.base.source = "random:tiny"
    out.objective = dict(name="classify", pooling="mean")
    out.method.rules = dict(all=common.rule(sites, adapter=common.adapter(rank=rank, alpha=4.0, dropout=0.0)))
    out.data.update(tasks=tasks, seq_len=16, test_share=0.2)
    out.optim.update(name=optim, warmup=0, learning_rate=0.3 if optim == "sgd" else 1e-2, decay="constant")
    out.schedule.s00.freeze = freeze
    out.losses = losses or {}
    out.regime = regime
    out.mesh.update(data=2, fsdp=2, tensor=2)
    out.train.update(dict(steps=12, batch_size=4, save_every=1, keep=99, log_every=100, clip=0.0) | fields)
    out.eval.update(num_items=8, num_generated=0)
    config_lib.validate(out)
    return out


def start(made, workdir):
    notes = []
    return train(made, str(workdir), note=notes.append), notes


def cut(workdir, other, step):
    """A copy of a run as a kill after the save of `step` leaves it: later steps are not there, rows of metrics are."""
    shutil.copytree(workdir, other)
    for folder in (other / "checkpoints").iterdir():
        if folder.name.isdigit() and int(folder.name) > step:
            shutil.rmtree(folder)
    (other / "checkpoints" / "best.json").unlink(missing_ok=True)
    return other


def digests(workdir, step):
    return read_manifest(pathlib.Path(workdir) / "checkpoints" / str(step))["tree"]


def arrays(workdir, step, item="adapters"):
    """`{path: array}` of one item of a step."""
    folder = pathlib.Path(workdir) / "checkpoints" / str(step)
    tree = load(folder, read_manifest(folder), [item])[item]
    return {path: np.asarray(leaf) for path, leaf in flatten_dict(tree, sep="/").items()}


def rows(workdir):
    lines = (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not is_timing(k)} for line in lines]
