"""One tiny mixture with random leaves for all tests of this folder, written without training, and an engine for it.

`endless` is the same run with a tokenizer that names no end token: its answers have all of their tokens. Prompts of
these tests are at most 96 tokens in the template, so that few programs compile; what `generate` says of them is asked
for once.
"""

import copy
import dataclasses

import pytest

import molora_jax
from configs import common
from molora_jax.serving.engine import Engine
from tests.surgery.make import new_run

PROMPTS = [f"Double {i}" + "." * (i % 4) for i in range(8)] + ["Is 3 even?"]
NEW = 8  # tokens of an answer


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serving") / "run"
    router = dict(name="softmax_topk", k=2, share="site")
    rules = dict(all=common.rule("q,down", adapter=common.adapter(), experts="4", router=router))
    return molora_jax.load_run(new_run(folder, rules, seed=4))


@pytest.fixture(scope="session")
def endless(run):
    tokenizer = copy.copy(run.tokenizer)
    tokenizer.end_ids = ()
    return dataclasses.replace(run, tokenizer=tokenizer)


@pytest.fixture(scope="session")
def wanted(run):
    """Prompt -> its greedy answer, by `generate`."""
    return dict(zip(PROMPTS, run.generate(PROMPTS, max_new_tokens=NEW), strict=True))


@pytest.fixture
def engine(run, endless):
    found = Engine({"run": run, "endless": endless}, slots=4, queue=8, context=192)
    found.start()
    yield found
    found.close(0)
    found.thread.join(timeout=60)
    assert not found.thread.is_alive()
