"""Objectives, modules and stages in the loop: what is compiled once, what a step holds, how a run goes on and opens."""

import json
import types

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from configs import common, stelocoder
from molora_jax import config as config_lib
from molora_jax.config.values import merged
from molora_jax.errors import InputError
from molora_jax.evaluation import report as reports
from molora_jax.evaluation.progress import Phases
from molora_jax.evaluation.run import load_run
from molora_jax.regimes import stage_at
from molora_jax.runs import saved
from molora_jax.runs.checkpoints import load, read_manifest
from molora_jax.runs.verify import verify
from molora_jax.training import programs
from molora_jax.training import run as run_lib
from molora_jax.training.loop import train
from molora_jax.training.setup import setup


def write(path, kind, number=60):
    rows = {
        "text": lambda i: {"prompt": f"Double {i}", "target": str(2 * i)},
        "label": lambda i: {"text": f"number {i}", "label": "odd" if i % 2 else "even"},
        "pair": lambda i: {"prompt": f"Double {i}", "chosen": str(2 * i), "rejected": str(2 * i + i % 20)},
    }[kind]
    path.write_text("".join(json.dumps(rows(i)) + "\n" for i in range(number)))
    return f"jsonl:{path}"


def config(tasks, *, rules=True, objective=None, train_base="", schedule=None, **fields):
    out = common.get_config()
    out.base.source = "random:tiny"
    if rules:
        out.method.rules = dict(all=common.rule("q,v", adapter=common.adapter(rank=2)))
    out.method.train_base = train_base
    out.data.update(tasks=tasks, seq_len=64, test_share=0.2)
    out.optim.update(warmup=0, learning_rate=1e-2, decay="constant")
    out.train.update(dict(steps=4, batch_size=8, save_every=0, log_every=100) | fields)
    out.eval.update(num_generated=0)
    with out.unlocked():
        out.objective = objective or dict(name="lm")
        out.schedule = schedule or out.schedule
    config_lib.validate(out)
    return out


def stage(**fields):
    return dict(dict(steps=0, tasks="", freeze="", set=dict(), route="", objective=dict()), **fields)


def start(made, workdir):
    notes = []
    return train(made, str(workdir), note=notes.append), notes


def digests(workdir, step):
    return {item: tree for item, tree in read_manifest(workdir / "checkpoints" / str(step))["tree"].items()}


LOOKS_BACK = dict(kind="pair", objective=dict(name="preference", form="dpo", reference="start"), train_base="norms",
                  batch_size=16)  # fmt: skip
CLASSES = dict(kind="label", objective=dict(name="classify"), train_base="embed")


@pytest.mark.parametrize("case", [pytest.param(LOOKS_BACK, marks=pytest.mark.slow), CLASSES], ids=["dpo", "classify"])
def test_a_run_with_modules_goes_on_bit_by_bit_and_opens(case, tmp_path):
    case = dict(case)
    data = write(tmp_path / "d.jsonl", case.pop("kind"))
    _, notes = start(config(data, eval_every=2, **case), tmp_path / "whole")
    assert "modules/base" in notes[1] and "copies of base leaves" in notes[1]
    start(config(data, eval_every=2, stop_after=2, **case), tmp_path / "parts")
    start(config(data, eval_every=2, **case), tmp_path / "parts")
    assert digests(tmp_path / "parts", 4) == digests(tmp_path / "whole", 4)
    run = load_run(tmp_path / "whole", "latest")
    assert ("start" in digests(tmp_path / "whole", 4)) == (run.start is not None) == ("dpo" in str(case))
    moved = flatten_dict(run.modules["base"], sep="/")
    base, read = flatten_dict(run.base_params, sep="/"), flatten_dict(run.params, sep="/")
    for path, leaf in moved.items():
        assert np.abs(np.asarray(leaf) - np.asarray(base[path])).max() > 0, path
        np.testing.assert_array_equal(read[path], leaf)
    report = reports.evaluate(run, phases=Phases())
    (task,) = report["tasks"].values()
    assert 0 <= task["accuracy"][1] <= task["accuracy"][0] <= task["accuracy"][2] <= 1 and "accuracy_start" in task
    assert report["labels"] == (["even", "odd"] if "classify" in str(case) else [])
    assert "majority" in reports.text_table(report) and all(p.exists() for p in reports.pictures(run, report))
    assert verify(tmp_path / "whole", deep=True)["ok"] and run.generate("Double 3", max_new_tokens=2) is not None


@pytest.mark.slow
def test_distillation_moves_towards_the_teacher_and_needs_its_vocabulary(tmp_path):
    data = write(tmp_path / "d.jsonl", "text")
    start(config(data), tmp_path / "teacher")
    made = config(data, objective=dict(name="distill", teacher=str(tmp_path / "teacher")))
    prepared = setup(made)
    assert prepared.frozen[str(tmp_path / "teacher")].params is prepared.params, "one base: one copy"
    start(made, tmp_path / "run")
    kl = [json.loads(line)["kl"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert kl[-1] < kl[0] and all(value > 0 for value in kl)
    (tmp_path / "teacher").rename(tmp_path / "moved")
    made.objective.teacher = str(tmp_path / "moved")
    assert start(made, tmp_path / "run")[0].step == 4, "its content counts, not its path"
    made.objective.teacher = str(tmp_path)
    with pytest.raises(InputError, match=r"objective\.teacher.*folder of a run"):
        start(made, tmp_path / "other")


@pytest.mark.parametrize("number", [3, pytest.param(5, marks=pytest.mark.slow)])
def test_stages_of_equal_programs_compile_once(tmp_path, monkeypatch, number):
    """Stages A B A, and A B A B A; A and B differ in what they freeze. Two programs are made, each compiled once."""
    data = write(tmp_path / "d.jsonl", "text")
    made, compiled = [], programs.CompiledStep

    class Counted(compiled):
        def __init__(self, *given):
            super().__init__(*given)
            made.append(self)

    monkeypatch.setattr(programs, "CompiledStep", Counted)
    programs._compiled_step.cache_clear()  # of other tests
    last = number - 1
    stages = {
        f"s{i:02d}": stage(steps=1, freeze="" if i % 2 else "*/A", tasks="d" if i == last else "")
        for i in range(number)
    }
    start(_scheduled(data, stages), tmp_path / "run")
    assert len(made) == 2 and [one.step._cache_size() for one in made] == [1, 1]


def _scheduled(data, stages):
    out = config(data)
    out.train.steps = len(stages)
    with out.unlocked():
        out.schedule = stages
    config_lib.validate(out)
    return out


def test_leaf_shapes_may_change_between_stages(tmp_path):
    """The second stage has another rank on v: q goes on, v starts anew; a step holds the config that its leaves fit."""
    data = write(tmp_path / "d.jsonl", "text")
    out = config(data)
    with out.unlocked():
        out.method.rules = dict(
            q=common.rule("q", adapter=common.adapter(rank=2)), v=common.rule("v", adapter=common.adapter(rank=2))
        )
        changes = dict(method=dict(rules=dict(v=dict(adapter=dict(rank=3)))))
        out.schedule = dict(s00=stage(steps=2), s01=stage(set=changes))
    config_lib.validate(out)
    out.train.stop_after = 2
    start(out, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints"
    out.train.stop_after = 3
    _, notes = start(out, tmp_path / "run")
    out.train.stop_after = 0
    assert start(out, tmp_path / "run")[0].step == 4
    shapes = {n: read_manifest(folder / str(n)) for n in (3, 4)}
    for manifest in shapes.values():
        assert manifest["config"]["method"]["rules"]["v"]["adapter"]["rank"] == 3
        leaves = manifest["tree"]["adapters"]
        assert leaves["v/000-003/v/A"]["shape"][2] == 3 and leaves["q/000-003/q/A"]["shape"][2] == 2
    warned = []
    run = load_run(tmp_path / "run", "latest", warn=warned.append)
    assert run.config.method.rules.v.adapter.rank == 3 and not warned
    assert jax.tree.leaves(run.adapters["v"])[0].shape[2] == 3
    assert verify(tmp_path / "run")["ok"]


@pytest.mark.slow
def test_the_stage_before_is_carried_over(tmp_path):
    data = write(tmp_path / "d.jsonl", "text")
    out = config(data)
    with out.unlocked():
        out.method.rules.all.layers = "0-1"
        changes = dict(method=dict(rules=dict(all=dict(layers="0-3"))), optim=dict(learning_rate=1e-30))
        out.schedule = dict(s00=stage(steps=2), s01=stage(set=changes))
    config_lib.validate(out)
    _, notes = start(out, tmp_path / "run")
    assert any("start anew" in note for note in notes) is False, "every leaf has rows of layers 0 and 1"
    folder = tmp_path / "run" / "checkpoints"
    trees = {n: load(folder / str(n), read_manifest(folder / str(n)), ["adapters"])["adapters"]["all"] for n in (0, 4)}
    assert list(trees[0]) == ["000-001"] and list(trees[4]) == ["000-003"]
    B = trees[4]["000-003"]["q"]["B"]
    assert np.abs(B[:2]).min() > 0 and np.abs(B[2:]).max() < 1e-20, "trained in the first stage; fresh in the second"


@pytest.mark.slow
def test_an_objective_of_a_stage_and_its_head_alone(tmp_path):
    """A linear probe first (adapters frozen), then all; the head of another objective would stay as it is."""
    data = write(tmp_path / "d.jsonl", "label")
    probe = dict(s00=stage(steps=2, freeze="all/*"), s01=stage(objective=dict(name="classify", pooling="mean")))
    _, notes = start(config(data, objective=dict(name="classify"), schedule=probe), tmp_path / "run")
    assert any(note.startswith("of stage s00, to step 2: other leaves train in s01") for note in notes)
    (later,) = [note for note in notes if note.startswith("stage s01, steps 3 to 4:")]
    assert "all      v         0-3     A 512, B 256" in later
    folder = tmp_path / "run" / "checkpoints"
    first, last = (read_manifest(folder / str(n))["config"]["objective"] for n in (0, 4))
    assert first["pooling" if "pooling" in first else "name"] in ("last", "classify") and last["pooling"] == "mean"
    assert load_run(tmp_path / "run", "latest").objective.pooling == "mean"


def test_patterns_that_freeze_nothing_are_refused_and_a_run_that_began_with_them_goes_on(tmp_path, monkeypatch):
    data = write(tmp_path / "d.jsonl", "text")
    made = config(data, schedule=dict(s00=stage(freeze="*/routr/*")))
    words = r"schedule.s00.freeze: got \*/routr/\*, which no leaf matches; expected paths such as all/000-003/q/A, all/"
    with pytest.raises(InputError, match=words):
        start(made, tmp_path / "run")
    with monkeypatch.context() as older:
        older.setattr(programs, "_check_freeze", lambda *_, **__: None)
        start(config(data, schedule=made.schedule, stop_after=2), tmp_path / "run")
    _, notes = start(made, tmp_path / "run")
    assert sum("warning: schedule.s00.freeze" in note for note in notes) == 1
    assert digests(tmp_path / "run", 4)
    told = []
    run = types.SimpleNamespace(newest=None, note=told.append)
    programs._check_freeze(run, ("*/A", "*/routr/*"), {"all": {"q": {"A": 0, "B": 0}}}, field="f")
    got, expected = "got */routr/*, which no leaf matches", "expected paths such as all/q/A, all/q/B"
    assert told == [f"warning: f: {got}; {expected}. Mend the pattern, or leave it out."]


def test_a_run_whose_stages_name_files_is_opened_when_they_are_gone(tmp_path):
    """What a stage was trained on need not be there any more; the run's own words about it stay."""
    files = [tmp_path / f"{name}.jsonl" for name in ("a", "b")]
    for path in files:
        path.write_text('{"prompt": "p", "target": "t"}\n')
    made = stelocoder.get_config(snippets=tuple(f"jsonl:{path}" for path in files))
    made.base.source = "random:tiny"
    config_lib.validate(made)
    tree = made.to_dict()
    for path in files:
        path.unlink()
    opened = saved.validated(tree, where=tmp_path / "config.json")
    assert opened.schedule.s00.tasks == made.schedule.s00.tasks and opened.data.tasks == made.data.tasks


CHANGES = {
    "rank": dict(adapter=dict(rank=4)),
    "experts": dict(experts="4"),
    "sites": dict(sites="q"),
}


@pytest.mark.parametrize("change", [CHANGES["rank"], *(pytest.param(CHANGES[n], marks=pytest.mark.slow)
                                                       for n in ("experts", "sites"))], ids=CHANGES)  # fmt: skip
def test_the_end_of_a_stage_is_evaluated_and_saved_before_the_next_one_changes_its_leaves(tmp_path, change):
    """The second stage has other leaves: the first one's end scores as that of a run without a second stage, is saved
    with the config that its leaves fit, and a run that is stopped there goes on to the same bits."""
    data = write(tmp_path / "d.jsonl", "text")
    made = config(data, eval_every=2, save_every=2)
    with made.unlocked():
        made.method.rules.all.update(dict(experts="2", router=dict(name="softmax_topk", k=1)))
    alone = made.copy_and_resolve_references()
    alone.train.stop_after = 2
    start(alone, tmp_path / "alone")
    with made.unlocked():
        made.schedule = dict(s00=stage(steps=2), s01=stage(set=dict(method=dict(rules=dict(all=change)))))
    config_lib.validate(made)
    start(made, tmp_path / "whole")
    valid = {
        name: json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[1])["valid_nll"]
        for name in ("alone", "whole")
    }
    assert valid["alone"] == valid["whole"]
    kept = digests(tmp_path / "whole", 2)
    assert kept["adapters"] == digests(tmp_path / "alone", 2)["adapters"]
    opened = load_run(tmp_path / "whole", 2)
    assert opened.config.method.rules.all.adapter.rank == 2 and opened.config.method.rules.all.experts == "2"
    made.train.stop_after = 2
    start(made, tmp_path / "parts")
    made.train.stop_after = 0
    start(made, tmp_path / "parts")
    assert digests(tmp_path / "parts", 4) == digests(tmp_path / "whole", 4)
    last = load_run(tmp_path / "parts", 4).config.method.rules.all.to_dict()
    assert last == merged(opened.config.method.rules.all.to_dict(), change)


def test_a_step_of_an_older_version_at_a_stages_end_is_the_next_ones_beginning(tmp_path, monkeypatch):
    """It was saved after the next stage had been entered, and its manifest says so."""
    data = write(tmp_path / "d.jsonl", "text")
    made = config(data, schedule=dict(s00=stage(steps=2), s01=stage(freeze="*/A")))
    start(made, tmp_path / "whole")
    made.train.stop_after = 2
    with monkeypatch.context() as older:
        older.setattr(run_lib, "stage_of", stage_at)
        left = run_lib.TrainingRun.leave

        def leave(run, stage, state):
            state, row = left(run, stage, state)
            return run.enter(stage_at(run.stages, stage.stop), state), row

        older.setattr(run_lib.TrainingRun, "leave", leave)
        start(made, tmp_path / "older")
    assert read_manifest(tmp_path / "older" / "checkpoints" / "2")["stage"] == "s01"
    made.train.stop_after = 0
    start(made, tmp_path / "older")
    assert digests(tmp_path / "older", 4) == digests(tmp_path / "whole", 4)


def test_a_run_opens_from_a_stage_that_lacks_the_head_of_another(tmp_path):
    data = write(tmp_path / "d.jsonl", "pair")
    own, other = (dict(name="preference", form=form) for form in ("reward", "dpo"))
    schedule = dict(s00=stage(steps=2), s01=stage(objective=other))
    made = config(data, objective=own, schedule=schedule, save_every=2, batch_size=16)
    start(made, tmp_path / "run")
    for step, form in ((2, "reward"), (4, "dpo")):
        run = load_run(tmp_path / "run", step)
        assert run.config.objective.form == form and "preference" in run.modules
    assert verify(tmp_path / "run", deep=True)["ok"]
    idle = config(data, objective=own, schedule=dict(s00=stage(objective=other)), batch_size=16)
    start(idle, tmp_path / "idle")
    assert not load_run(tmp_path / "idle", "latest").modules, "nothing trains by the run's own: it has no head"


def test_a_stage_sets_nothing_that_all_stages_share(tmp_path, monkeypatch):
    data = write(tmp_path / "d.jsonl", "text")
    for changes, field in (
        (dict(data=dict(seq_len=32)), "data.seq_len"),
        (dict(seed=7), "seed"),
        (dict(engine="gather"), "engine"),
        (dict(train=dict(batch_size=4)), "train.batch_size"),
        (dict(base=dict(source="random:tiny-untied")), "base.source"),
    ):
        made = config(data, schedule=dict(s00=stage(steps=2), s01=stage(set=changes)))
        with pytest.raises(InputError, match=rf"schedule\.s01\.set\.{field}: got a field that all stages share"):
            start(made, tmp_path / "run")
    with monkeypatch.context() as older:
        older.setattr(programs, "_check_set", lambda *_: None)
        made.train.stop_after = 2
        start(made, tmp_path / "older")
    made.train.stop_after = 0
    result, notes = start(made, tmp_path / "older")
    assert result.step == 4 and sum("warning: schedule.s01.set" in note for note in notes) == 1


def test_a_run_that_only_loads_says_that_nothing_trains(tmp_path):
    data = write(tmp_path / "d.jsonl", "text")
    _, notes = start(config(data, steps=1), tmp_path / "first")
    assert not any("nothing trains" in note for note in notes)
    made = config(data, steps=1)
    made.method.rules.all.load = (str(tmp_path / "first"),)
    _, notes = start(made, tmp_path / "loaded")
    assert any(note.startswith("warning: nothing trains") and "loaded='trained'" in note for note in notes)


def test_a_wrong_teacher_is_told_by_its_field(tmp_path):
    data = write(tmp_path / "d.jsonl", "text")
    for teacher, words in (
        ("random:nix", "got 'random:nix'.*random:tiny-mamba"),
        ("random:tiny-bert", "got a distribution over tokens on"),
        (f"dir:{tmp_path}", "config.json: got No such file"),
    ):
        with pytest.raises(InputError, match=rf"objective\.teacher[:,].*{words}"):
            setup(config(data, objective=dict(name="distill", teacher=teacher)))
