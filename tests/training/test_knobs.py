"""What is an argument of the compiled step: runs that differ in seed, rate or loss weights share one program."""

import dataclasses

import jax
import numpy as np
import pytest
from jax import monitoring

from configs import common
from molora_jax import config as config_lib
from molora_jax.evaluation.run import load_run
from molora_jax.io.base import load_base
from molora_jax.io.random_init import random_params
from molora_jax.optim import OPTIMIZERS
from molora_jax.runs import saved
from molora_jax.runs.checkpoints import read_manifest
from molora_jax.runs.workdir import Workdir
from molora_jax.training import loop
from molora_jax.training.step import Knobs
from tests.training.test_stages import write


def config(tasks, **fields):
    out = common.get_config()
    out.base.source = "random:tiny"
    router = dict(name="softmax_topk", k=2, share="ffn")
    out.method.rules = dict(ffn=common.rule("ffn", experts="4", adapter=common.adapter(rank=2), router=router))
    out.losses = dict(balance=common.balance(weight=1e-2))
    out.data.update(tasks=tasks, seq_len=64, test_share=0.2)
    out.optim.update(warmup=2)
    out.train.update(steps=4, batch_size=8, save_every=0, log_every=100)
    with out.unlocked():
        for path, value in fields.items():
            *parents, last = path.split(".")
            group = out
            for parent in parents:
                group = group[parent]
            group[last] = value
    config_lib.validate(out)
    return out


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write(tmp_path_factory.mktemp("data") / "d.jsonl", "text")


def opened(made, folder):
    """The loop's state before anything is compiled."""
    with Workdir(folder) as workdir:
        return loop.TrainingRun(made, workdir, note=lambda text: None)


def test_runs_that_differ_in_arguments_share_a_program_and_its_text(data, tmp_path):
    changes = {"seed": 7, "optim.learning_rate": 3e-3, "losses.balance.weight": 0.5}
    runs = [opened(config(data, **fields), tmp_path / str(i)) for i, fields in enumerate(({}, changes))]
    programs = [run.programs["s00"] for run in runs]
    assert programs[0] == programs[1] and hash(programs[0]) == hash(programs[1])
    knobs = [jax.device_get(run.knobs["s00"]) for run in runs]
    assert knobs[1].seed == 7 and knobs[1].weights == {"balance": np.float32(0.5)}
    texts = []
    for run in runs:
        compiled = run.compiled(run.stages[0])
        state = jax.eval_shape(compiled.start, run.params, 0)
        rows = run.data.train.batch(0)
        texts.append(compiled.step.lower(state, run.params, rows, {}, run.knobs["s00"]).as_text())
    assert texts[0] == texts[1]
    other = opened(config(data, **{"optim.b2": 0.99}), tmp_path / "other")
    assert other.programs["s00"] != programs[0]


def test_another_rate_seed_or_weight_compiles_nothing(data, tmp_path):
    """What XLA compiles is counted, over whole runs: for the second one, nothing."""
    counts = []
    monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: counts.append(1) if event.endswith("backend_compile_duration") else None
    )
    changes = {"seed": 7, "optim.learning_rate": 3e-3, "losses.balance.weight": 0.5}
    try:
        for i, fields in enumerate(({}, changes, {"optim.b2": 0.99})):
            before = len(counts)
            loop.train(config(data, **fields), tmp_path / str(i), note=lambda text: None)
            assert bool(len(counts) - before) == (i != 1), f"run {i} compiled {len(counts) - before} programs"
    finally:
        monitoring.clear_event_listeners()


@pytest.mark.parametrize("decay", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 1, 4])
def test_a_rate_that_is_an_argument_is_the_rate_bit_by_bit(decay, warmup):
    """As of a schedule with the rate in it, whatever double precision the warm-up was worked out in.

    Operation by operation: compiled, XLA may rewrite a product of constants, which moves the last bit.
    """
    for rate in (2e-4, 1e-3, 0.7):
        member = OPTIMIZERS["adamw"](learning_rate=rate, decay=decay, warmup=warmup)
        knobs = Knobs.of(0, member, ())
        one = dataclasses.replace(member, learning_rate=1.0)
        given, constant = one.at(jax.device_put(knobs.rates)).schedule(20), member.schedule(20)
        assert [np.float32(given(i)) for i in range(20)] == [np.float32(constant(i)) for i in range(20)]
        compiled = [float(jax.jit(given)(i)) for i in range(20)]
        np.testing.assert_allclose(compiled, [float(constant(i)) for i in range(20)], rtol=3e-7, atol=2e-7 * rate)


def test_a_random_base_does_not_follow_the_seed_of_the_run(data, tmp_path):
    digests = {opened(config(data, seed=seed), tmp_path / str(seed)).base.digest for seed in (0, 1)}
    assert digests == {load_base("random:tiny").digest} == {load_base("random:tiny@0").digest}
    assert load_base("random:tiny@7").digest == random_params(load_base("random:tiny").config, seed=7)[1]
    config_lib.validate(config(data, **{"base.source": "random:tiny@7"}))
    for source in ("random:tiny@", "random:tiny@x", "random:tiny@-1", "random:tinny@1"):
        with pytest.raises(config_lib.InputError, match="base.source"):
            config(data, **{"base.source": source})


def test_a_run_whose_random_base_followed_its_seed_goes_on_with_that_base(data, tmp_path, monkeypatch):
    """As older versions wrote it: they drew the base of a run of seed 3 from 3."""
    older = random_params(load_base("random:tiny").config, seed=3)[1]
    made = config(data, seed=3, **{"train.steps": 2, "base.source": "random:tiny@3", "train.stop_after": 1})
    loop.train(made, str(tmp_path / "run"), note=lambda text: None)
    assert read_manifest(tmp_path / "run" / "checkpoints" / "1")["run"]["base"]["digest"] == older
    made.base.source, made.train.stop_after = "random:tiny", 0
    assert loop.train(made, str(tmp_path / "run"), note=lambda text: None).step == 2
    assert saved.read_config(tmp_path / "run").base.source == "random:tiny"
    assert load_run(tmp_path / "run", "latest").step == 2
