"""The leaderboard: its tables, its one file, its intervals. Runs are faked; a real one is slow."""

import json
import shutil
import signal

import pytest

from experiments.leaderboard import __main__ as board
from experiments.leaderboard import report, tables, work
from experiments.leaderboard.results import key
from launch import flags
from molora_jax.backbones.families import TINY
from molora_jax.errors import InputError
from tests.tiny import write_task

BASE = "--config.base.source=random:tiny"


class Fake:
    """In place of child processes: counts what is asked of it, fails where it is told to."""

    def __init__(self, monkeypatch):
        self.asked, self.broken = [], set()
        monkeypatch.setattr(work, "jobs", self.jobs)
        monkeypatch.setattr(work.bench, "measure", self.measure)

    def jobs(self, configs, workdir):
        self.asked.append(workdir.name)
        return {name: self.job(config, workdir) for name, config in configs.items()}

    def job(self, config, workdir):
        if workdir.name.split("-")[0] in self.broken:
            raise work.Failed("status 1: it broke")
        scores = {"nll": {"double": 2.0 + 0.1 * config.seed, "even": 1.0}, "items": {}, "answer_tokens": {}}
        if not config.method.rules:
            return scores
        return scores | dict(peak_mb=1000, seconds=1.0, first5=3.0, last5=2.0, active_experts=None)

    def measure(self, sides, options):
        self.asked.append("cost")
        ratio = dict(median=1.5, min=1.4, max=1.6)
        return {"ratio": ratio, "machine": {}, "a": {"cpu_seconds": ratio}}

    def take(self):
        taken, self.asked = self.asked, []
        return taken


def start(tmp_path, *argv):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    status = board.main([f"--out={tmp_path}/out", f"--workdir={tmp_path}/work", BASE, *argv])
    assert before == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    return status


def test_goes_on_from_the_results_file_alone(tmp_path, monkeypatch, drawn):
    fake, out = Fake(monkeypatch), tmp_path / "out"
    usual = ("--budget=4x512", "--methods=lora,mos", "--items=2")
    fake.broken = {"mos"}
    assert start(tmp_path, *usual, "--seeds=1") == 1
    # LoRA stands in both tables with one run; the costs are of LoRA once and of MoS in two forms
    asked = fake.take()
    assert [name.split("-")[0] for name in asked] == ["base", "lora", "mos", "mos", "cost", "cost", "cost"]
    tree = json.loads((out / "results.json").read_text())
    assert len(tree["runs"]) == 1 and len(tree["failed"]) == 2
    assert all("mos, seed 0: status 1: it broke" in message for message in tree["failed"].values())
    assert "mos, seed 0: status 1: it broke" in (out / "results.md").read_text()

    fake.broken = set()
    shutil.rmtree(tmp_path / "work")
    assert start(tmp_path, *usual, "--seeds=2") == 0
    # what failed, and what the second seed adds; nothing that was there
    assert sorted(name.split("-")[0] for name in fake.take()) == ["lora"] + ["mos"] * 4
    with drawn():
        assert start(tmp_path, *usual, "--seeds=2") == 0 and fake.take() == []
    tree = json.loads((out / "results.json").read_text())
    assert tree["failed"] == {} and len({run["key"] for run in tree["runs"]}) == len(tree["runs"]) == 6
    text = (out / "results.md").read_text()
    # seeds 0 and 1: means over tasks 1.5 and 1.55; t(0.975, 1) s / sqrt(2) = 12.706 * 0.025
    assert text.count("| 1.525 \u00b1 0.318 |") == 4 and text.count("| +0.000 \u00b1 0.000 |") == 2
    assert (out / "results.png").stat().st_size > 1000
    # a start for one method writes the rows of the others as well, and a variant is in no table of methods
    asked = ("--budget=4x512", "--items=2", "--tables=rank", "--cost_steps=0")
    assert start(tmp_path, *asked, "--methods=lora,mola_triangle", "--seeds=1") == 0
    assert [name.split("-")[0] for name in fake.take()] == ["mola_triangle"]
    again = (out / "results.md").read_text()
    assert again == text and json.loads((out / "results.json").read_text())["runs"][-1]["method"] == "mola_triangle"
    # a step of LoRA is the unit, whatever a pair of it with itself measured; that is said as the column's noise
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    steps = {(row[0], row[4]) for row in cells if len(row) > 5 and row[0] in ("LoRA", "MoS")}
    assert steps == {("LoRA", "1"), ("MoS", "1.50")}
    assert text.count("paired with itself it measured 1.50 (1.40 to 1.60)") == 2


def test_results_of_another_setting_are_refused(tmp_path, monkeypatch):
    Fake(monkeypatch)
    start(tmp_path, "--budget=4x512", "--methods=lora", "--seeds=1", "--items=2")
    for argv, line in (
        (["--budget=5x512", "--items=2"], 'budget: was "4x512", now "5x512"'),
        (["--budget=4x512", "--items=3"], "items: was 2, now 3"),
        (["--budget=4x512", "--items=2", "--config.optim.learning_rate=1"], "optim.learning_rate: was absent"),
    ):
        with pytest.raises(InputError, match="another setting") as caught:
            start(tmp_path, "--methods=lora", "--seeds=1", *argv)
        assert line in str(caught.value)
    (tmp_path / "out" / "results.json").write_text("{}")
    with pytest.raises(InputError, match="fields"):
        start(tmp_path, "--budget=4x512", "--methods=lora", "--items=2")


BAD = [
    (["--budget=40"], "--budget", "STEPSxTOKENS"),
    (["--budget=0x512"], "--budget", "STEPSxTOKENS"),
    (["--budget=4x500"], "--budget", "a multiple of data.seq_len = 128"),
    (["--budget=4x512", "--methods=mixlore"], "--methods", "'mixlora'"),
    (["--budget=4x512", "--methods=lora,lora"], "--methods", "every method once"),
    (["--budget=4x512", "--tables=ranks"], "--tables", "'rank'"),
    (["--budget=4x512", "--seeds=0"], "--seeds", "at least 1"),
    (["--budget=4x512", "--config=configs/lora.py"], "--config", "--methods names the configs"),
    (["--budget=4x512", "--config.train.steps=3"], "--config.train.steps", "Budget, tables and seeds"),
    (["--budget=4x512", "--config.data.seq=3"], "config.data.seq", "'seq_len'"),
]


@pytest.mark.parametrize(("argv", "where", "text"), BAD, ids=[" ".join(argv) for argv, *_ in BAD])
def test_wrong(tmp_path, argv, where, text):
    with pytest.raises(InputError) as caught:
        start(tmp_path, *argv)
    assert caught.value.where == where and text in str(caught.value)


def test_equal_rank_keeps_the_scale():
    entry = tables.entry("rank", "mixlora", TINY, [], 1)
    rules = entry.configs[0].method.rules
    assert entry.rank == 16 and not entry.cannot
    assert (rules.ffn.adapter.rank, rules.ffn.adapter.alpha) == (8, 16.0)  # of the top 2
    assert (rules.attn.adapter.rank, rules.attn.adapter.alpha) == (16, 32.0)


def test_equal_parameters_within_5_percent_or_the_reason():
    wanted = tables.entry("params", "lora", TINY, [], 1)
    assert wanted.changes == {}
    for name in ("mixlora", "mola", "mos", "smora", "coe"):
        entry = tables.entry("params", name, TINY, [], 1)
        assert bool(entry.cannot) == (abs(entry.trainable / wanted.trainable - 1) > 0.05), name
    assert tables.entry("params", "mos", TINY, [], 1).changes == {"method.rules.all.adapter.budget": "16"}
    nine = tables.entry("params", "x_lora", TINY, [], 1)
    assert "each task" in nine.cannot and nine.configs[0].method.rules.mix.experts == "9"


def test_variants_are_their_method_but_for_what_the_claim_is_about():
    made = {m: tables.entry("params", m, TINY, board.budget("6x512", 128), 1) for m in ("lora", *tables.VARIANTS)}
    plain, twice, triangle = made["lora"], made["lora_twice"], made["mola_triangle"]
    assert plain.configs[0].train.steps == 6 and twice.configs[0].train.steps == 12
    assert twice.trainable == plain.trainable and twice.title == "LoRA with twice the samples"
    counts = triangle.configs[0].method.rules.all.experts
    assert (
        counts == triangle.changes["method.rules.all.experts"] and counts.split("|") == sorted(counts.split("|"))[::-1]
    )
    assert not tables.VARIANTS.keys() & set(tables.check_methods("all"))


def test_a_run_is_known_by_what_it_is():
    configs = [tables.settled("lora", {}, [("seed", seed), ("train.steps", "40")]) for seed in ("0", "1", "0")]
    assert key(configs[0]) == key(configs[2]) != key(configs[1])
    assert key(flags.override(configs[0], [("train.log_every", "3")])) == key(configs[0])


def test_interval_by_hand():
    mean, half = report.t_interval([1.0, 2.0, 3.0])  # s = 1, t(0.975, 2) = 4.302653
    assert mean == 2.0 and abs(half - 4.302653 / 3**0.5) < 1e-5
    assert report.t_interval([1.0])[1] != report.t_interval([1.0])[1], "one value has no interval"


@pytest.mark.slow
def test_a_real_run(tmp_path):
    """Eight rows a step: the child has the eight devices of the tests."""
    task = write_task(tmp_path / "task.jsonl")
    data = (f"--config.data.tasks=jsonl:{task}", "--config.data.seq_len=96")
    argv = ("--budget=3x768", "--methods=mixlora", "--seeds=1", "--items=4", "--tables=rank", "--cost_steps=1", *data)
    assert start(tmp_path, *argv) == 0
    tree = json.loads((tmp_path / "out" / "results.json").read_text())
    (run,), (cost,) = tree["runs"], tree["costs"]
    assert run["nll"].keys() == tree["base"]["nll"].keys() == {"double", "even"}
    assert run["active_experts"] == 2 and run["peak_mb"] > 100 and cost["ratio"]["median"] > 0
    assert not list((tmp_path / "work").glob("mixlora*")), "the row is what is kept"
