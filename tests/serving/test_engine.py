"""The thread behind the server: what waits, what is refused, what is given up, and how it ends."""

import dataclasses
import queue
import time

import jax
import pytest

import molora_jax
from molora_jax.decode.slots import Draw
from molora_jax.serving.answer import Answer
from molora_jax.serving.engine import Closing, Engine, Full, Request
from tests.serving.conftest import NEW, PROMPTS

LONG = dict(most=90, model="endless")


class Asked:
    """A request and what came back."""

    def __init__(self, engine, prompts=("Double 1.",), *, most=NEW, model="run", **draw):
        self.came, run = queue.Queue(), engine.runs[model]
        answers = [Answer(run, run.prompt_ids(text), Draw(**draw), most=most) for text in prompts]
        self.request = Request(model, answers, lambda number, piece: self.came.put((number, piece)))
        engine.submit(self.request)

    def next(self):
        return self.came.get(timeout=120)

    def texts(self):
        texts, left = ["" for _ in self.request.answers], len(self.request.answers)
        while left:
            number, piece = self.next()
            if isinstance(piece, Exception):
                raise piece
            texts[number] += piece.text
            left -= piece.finish is not None
        return texts


def _until(true):
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_answers_are_those_of_generate(engine, wanted):
    assert Asked(engine, PROMPTS).texts() == list(wanted.values())
    assert engine.state()["running"] == engine.state()["waiting"] == 0


def test_one_that_hangs_up_frees_its_slots(engine, wanted):
    long = [Asked(engine, ["Double 2"] * 4, **LONG), Asked(engine, ["Double 3"], **LONG)]
    _until(lambda: engine.state()["running"] == 4 and engine.state()["waiting"] == 1)
    for asked in long:
        engine.cancel(asked.request)
    _until(lambda: engine.state()["running"] == engine.state()["waiting"] == 0)
    assert Asked(engine).texts() == [wanted["Double 1."]]


def test_a_full_queue(engine):
    with engine.changed:  # none ends meanwhile, however slow this thread is
        waiting = [Asked(engine, [f"Double {i}"] * 4, **LONG) for i in range(3)]  # 4 run, 8 wait
        with pytest.raises(Full) as error:
            Asked(engine, **LONG)
    assert Asked(engine).texts()  # the other run has free slots
    assert error.value.retry_after >= 1
    for asked in waiting:
        engine.cancel(asked.request)
    _until(lambda: engine.state()["running"] == 0)
    Asked(engine).texts()


def test_what_runs_may_end_and_what_waits_is_told(endless):
    engine = Engine({"run": endless}, slots=4, queue=8, context=192)
    engine.start()
    running, waiting = Asked(engine, ["Double 3"] * 4, most=30), Asked(engine)
    running.next()
    engine.close(grace=60)
    with pytest.raises(Closing):
        waiting.texts()
    with pytest.raises(Closing):
        Asked(engine)
    ends = []
    while ends.count("length") < 4:
        ends.append(running.next()[1].finish)
    assert len(ends) == 4 * 30 - 1
    engine.thread.join(timeout=60)
    assert not engine.thread.is_alive() and engine.state()["status"] == "closing"


def test_without_grace_what_runs_is_told(endless):
    engine = Engine({"run": endless}, slots=4, queue=8, context=192)
    engine.start()
    running = Asked(engine, ["Double 3"], most=LONG["most"])
    running.next()
    engine.close(grace=0)
    with pytest.raises(Closing):
        running.texts()
    engine.thread.join(timeout=60)
    assert not engine.thread.is_alive()


def test_a_fault_ends_the_answers_and_not_the_server(engine, wanted, monkeypatch, caplog):
    slots = engine.slots["run"]
    step = slots.step
    monkeypatch.setattr(slots, "step", lambda: (_ for _ in ()).throw(RuntimeError("no memory")))
    with pytest.raises(RuntimeError, match="no memory"):
        Asked(engine).texts()
    assert "a step of run failed" in caplog.text
    monkeypatch.setattr(slots, "step", step)
    assert Asked(engine).texts() == [wanted["Double 1."]]
    assert len(slots.free) == 4


def test_runs_of_one_base_share_its_arrays(run):
    """What `launch.serve` does with several folders."""
    second = molora_jax.load_run(run.workdir, beside=run)
    assert all(a is b for a, b in zip(jax.tree.leaves(run.params), jax.tree.leaves(second.params), strict=True))
    assert jax.tree.leaves(run.adapters)[0] is not jax.tree.leaves(second.adapters)[0]
    other = dataclasses.replace(run, facts={"base_digest": "another"})
    third = molora_jax.load_run(run.workdir, beside=other)
    assert jax.tree.leaves(run.params)[0] is not jax.tree.leaves(third.params)[0]
