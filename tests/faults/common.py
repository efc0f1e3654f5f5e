"""Tiny things that the rows share: a base in a folder, a config on it, one finished run that is copied and damaged."""

import contextlib
import fcntl
import functools
import json
import os
import pathlib
import random
import resource
import shutil
import tempfile

import numpy as np

from configs import common
from molora_jax import config as config_lib
from molora_jax.runs.manifest import read_manifest
from molora_jax.runs.metrics import is_timing

STEPS = 6
ITEMS = ("adapters", "opt", "router_state", "train")


@functools.cache
def folder() -> pathlib.Path:
    """This matrix's folder, shared by its workers; it goes with the matrix."""
    path = pathlib.Path(os.environ.get("MOLORA_FAULTS") or tempfile.mkdtemp(prefix="faults-"))
    path.mkdir(exist_ok=True)
    os.environ.setdefault("MOLORA_CACHE", str(path / "cache"))
    return path


@contextlib.contextmanager
def scratch():
    """A folder for one try."""
    path = pathlib.Path(tempfile.mkdtemp(dir=folder()))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def once(name: str):
    """`(path, made)`: a folder that the first worker who asks fills in; the others wait for it."""
    with open(folder() / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        path = folder() / name
        made = (folder() / f"{name}.made").exists()
        yield path, made
        (folder() / f"{name}.made").touch()


@contextlib.contextmanager
def changed(mapping, **values):
    """Entries of `os.environ`, or attributes of a module, put back afterwards."""
    get = (lambda k: mapping.get(k)) if hasattr(mapping, "get") else (lambda k: getattr(mapping, k))

    def put(key, value):
        if not hasattr(mapping, "get"):
            setattr(mapping, key, value)
        elif value is None:
            mapping.pop(key, None)
        else:
            mapping[key] = value

    old = {key: get(key) for key in values}
    try:
        for key, value in values.items():
            put(key, value)
        yield
    finally:
        for key, value in old.items():
            put(key, value)


def write_base(path: pathlib.Path, seed=0, **changes) -> pathlib.Path:
    from tests.io import tiny_files  # it brings jax, which wrong configs must not see

    config = tiny_files.llama_config(**{"vocab_size": 264} | changes)
    return tiny_files.write_hf_folder(path, config, tiny_files.hf_tensors(config, seed))


def base_folder() -> pathlib.Path:
    """A Hugging Face folder of two random layers, 16 wide."""
    with once("base") as (path, made):
        if not made:
            write_base(path)
    return path


def write_rows(path: pathlib.Path, number=60) -> pathlib.Path:
    lines = [json.dumps({"prompt": f"Double {i}", "target": str(2 * i)}) for i in range(number)]
    path.write_text("\n".join(lines) + "\n")
    return path


def rows_file() -> pathlib.Path:
    with once("rows") as (path, made):
        if not made:
            path.mkdir()
            write_rows(path / "double.jsonl")
    return path / "double.jsonl"


def tiny_config(base=None, *, tasks=None, steps=STEPS, **train):
    """Two rules on two layers: plain LoRA on q, four routed experts on up; dropout, packing and a balance loss."""
    config = common.get_config()
    adapter = common.adapter(rank=2)
    config.base.source = f"dir:{base or base_folder()}"
    config.data.update(tasks=tasks or f"jsonl:{rows_file()}", seq_len=48)
    config.method.rules = dict(
        attn=common.rule("q", adapter=adapter),
        up=common.rule(
            "up", experts="4", adapter=adapter, router=dict(name="softmax_topk", k=2, share="site", jitter=0.1)
        ),
    )
    config.losses = dict(balance=common.balance())
    config.optim.update(learning_rate=1e-3, warmup=2)
    config.train.update(dict(steps=steps, batch_size=8, save_every=2, keep=9, log_every=1000) | train)
    config.eval.update(num_items=4, num_generated=2, max_new_tokens=4, batch_size=4)
    config_lib.validate(config)
    return config


def start(config, workdir) -> tuple[object, list[str]]:
    """Trains in this process: `(result, notes)`."""
    from molora_jax.training.loop import train

    notes = []
    return train(config, str(workdir), note=notes.append), notes


def finished_run() -> pathlib.Path:
    """A run of six steps, saved at 0, 2, 4 and 6, evaluated (and so best) at 4."""
    config = tiny_config(eval_every=4)
    with once("run") as (path, made):
        if not made:
            start(config, path)
    return path


def digests(workdir, step) -> dict:
    """Digest of every leaf of a saved step."""
    tree = read_manifest(pathlib.Path(workdir) / "checkpoints" / str(step))["tree"]
    return {f"{item}/{name}": leaf["digest"] for item in ITEMS for name, leaf in tree[item].items()}


def metric_rows(workdir) -> dict[int, dict]:
    rows = [json.loads(line) for line in (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: {k: v for k, v in row.items() if not is_timing(k)} for row in rows}


def arrays_digest(tree) -> str:
    """One digest for a tree of arrays."""
    import jax

    from molora_jax.io.digest import digest

    return " ".join(digest(np.asarray(x)) for x in jax.tree.leaves(tree))


@contextlib.contextmanager
def limited(kind, more: int | None = None, limit: int | None = None):
    """A soft resource limit: `limit`, or `more` bytes than the process has mapped now."""
    soft, hard = resource.getrlimit(kind)
    if more is not None:
        pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + more
    resource.setrlimit(kind, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(kind, (soft, hard))


def copy_run(source: pathlib.Path, target: pathlib.Path) -> pathlib.Path:
    """A copy to be damaged. Files of checkpoints, which nothing writes in place, are links."""
    for path in source.rglob("*"):
        copy = target / path.relative_to(source)
        if path.is_dir():
            copy.mkdir(parents=True, exist_ok=True)
        elif "tensorboard" not in path.parts and "report" not in path.parts:
            copy.parent.mkdir(parents=True, exist_ok=True)
            (os.link if "checkpoints" in path.parts else shutil.copyfile)(path, copy)
    return target


def put(path: pathlib.Path, content: bytes):
    """Writes a new file: a link's other name keeps its content."""
    path.unlink()
    path.write_bytes(content)


DAMAGES = ("flip", "truncate", "delete", "swap", "empty", "folder", "extend")


def damage(path: pathlib.Path, kind: str, rng: random.Random, others=()) -> str:
    """Damages one file in one of the ways of DAMAGES; "" where that changed nothing."""
    before = path.read_bytes()
    if kind == "delete":
        path.unlink()
    elif kind == "folder":
        path.unlink()
        path.mkdir()
    elif kind == "swap":
        other = rng.choice([p for p in others if p != path] or [path])
        put(path, other.read_bytes())
        put(other, before)
    else:
        at, bit = rng.randrange(len(before) or 1), 1 << rng.randrange(8)
        flipped = before[:at] + bytes([before[at] ^ bit]) + before[at + 1 :] if before else b""
        extended = before + bytes([rng.randrange(256)])
        put(path, {"flip": flipped, "truncate": before[:at], "empty": b"", "extend": extended}[kind])
    same = path.is_file() and path.read_bytes() == before
    return "" if same else f"{kind} {path.name}"
