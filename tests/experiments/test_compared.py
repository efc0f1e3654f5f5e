"""The sandbox's protocol: its tasks, its statistics, and a leaderboard that chooses rates; runs are faked."""

import json
import math
import shutil

import numpy as np
import pytest
from scipy import stats

from experiments.claims import __main__ as claims
from experiments.claims.claims import CLAIMS, judged, steps
from experiments.leaderboard import __main__ as board
from experiments.leaderboard import compared, rates, tasks, verdicts, work
from molora_jax.errors import InputError

ROWS, DRAW = tasks.rows(), compared.draw


def test_tasks_are_many_and_their_inputs_never_straddle_splits():
    assert len(tasks.TASKS) >= 8 and len(tasks.FAMILIES) >= 3
    for task in tasks.TASKS:
        found = {split: [row for row in ROWS[split] if row["task"] == task] for split in tasks.SPLITS}
        assert len(found["train"]) >= 2400 and len(found["test"]) == 300 and len(found["valid"]) == 200
        prompts = [{row["prompt"] for row in found[split]} for split in tasks.SPLITS]
        assert not prompts[0] & prompts[1] and not prompts[0] & prompts[2] and not prompts[1] & prompts[2]
    # the same inputs in all domains, in the same split
    inputs = lambda split, task: {r["prompt"].split(": ")[1] for r in ROWS[split] if r["task"] == task}  # noqa: E731
    for split in tasks.SPLITS:
        assert len({frozenset(inputs(split, task)) for task in tasks.DOMAINS}) == 1


def test_domains_conflict_and_answers_are_right():
    answers = {}
    for row in ROWS["test"]:
        words = row["prompt"].split(": ")[-1].removesuffix(" =>").split(" ")
        said = row["target"].removeprefix(" ").split(" ")
        if row["task"] == "north":
            assert said == sorted(words)
        elif row["task"] == "south":
            assert said == sorted(words)[::-1]
        elif row["task"] == "east":
            assert said == list(reversed(words))
        elif row["task"] == "west":
            assert [words[0], *said] == [*words, words[0]]
        elif row["task"] == "add":
            assert int(said[0]) == sum(int(word.strip(",")) for word in words)
        elif row["task"] == "larger":
            assert int(said[0]) == max(int(word.strip(",")) for word in words)
        if row["task"] in tasks.DOMAINS:
            answers.setdefault(" ".join(words), []).append(row["target"])
    assert all(len(given) == 4 for given in answers.values())
    assert np.mean([len(set(given)) for given in answers.values()]) > 3.9  # the same letters, another answer


def test_a_fact_is_tested_by_a_way_to_ask_that_it_was_not_trained_with():
    def name(row):
        asks = ("Where", "What", "To")
        return next(word for word in row["prompt"].split() if word[0].isupper() and word not in asks)

    place = {name(row): row["target"] for row in ROWS["train"] if row["task"] == "recall"}
    tested = [row for split in ("valid", "test") for row in ROWS[split] if row["task"] == "recall"]
    assert tested and all(place[name(row)] == row["target"] for row in tested)


def test_rows_are_always_the_same(tmp_path):
    heldout = tmp_path / "heldout.jsonl"
    heldout.write_text('{"text": "In the beginning"}\n')
    entries = tasks.write(tmp_path / "a", heldout)
    tasks.write(tmp_path / "b", heldout)
    for split in tasks.SPLITS:
        assert (tmp_path / "a" / f"{split}.jsonl").read_bytes() == (tmp_path / "b" / f"{split}.jsonl").read_bytes()
    assert entries["test"] == f"jsonl:{tmp_path}/a/test.jsonl"
    last = json.loads((tmp_path / "a" / "test.jsonl").read_text().splitlines()[-1])
    assert last == {"task": "pretraining", "text": "In the beginning"}
    assert "pretraining" not in (tmp_path / "a" / "train.jsonl").read_text()


def test_a_difference_is_a_paired_t_test():
    rng = np.random.default_rng(0)
    one, other = rng.normal(size=5), rng.normal(size=5)
    d = verdicts.difference(list(one - other))
    oracle = stats.ttest_rel(one, other)
    assert d.p == pytest.approx(oracle.pvalue) and d.mean == pytest.approx(np.mean(one - other))
    low, high = oracle.confidence_interval(0.95)
    assert (d.mean - d.width, d.mean + d.width) == pytest.approx((low, high))
    alone = verdicts.difference([0.3])
    assert math.isnan(alone.p) and math.isnan(alone.width) and verdicts.difference([]) is None


def test_holm_and_verdicts():
    # 0.01 x 4, 0.02 x 3, 0.03 x 2 is not below the one before it, 0.5 x 1
    corrected = verdicts.holm({"a": 0.02, "b": 0.01, "c": 0.5, "d": 0.03, "e": math.nan})
    assert corrected["b"] == pytest.approx(0.04) and corrected["a"] == pytest.approx(0.06)
    assert corrected["d"] == pytest.approx(0.06) and corrected["c"] == 0.5 and math.isnan(corrected["e"])
    of = lambda mean, width, p: verdicts.Difference(mean, width, p, 5)  # noqa: E731
    found = {
        "good": of(-0.3, 0.1, 1e-4), "bad": of(0.3, 0.1, 1e-4), "same": of(0.001, 0.01, 0.8),
        "unclear": of(-0.1, 0.2, 0.2), "none": None, "one": of(-0.3, math.nan, math.nan),
    }  # fmt: skip
    assert verdicts.verdicts(found) == {
        "good": "better", "bad": "worse", "same": "equal", "unclear": "open", "none": "", "one": "open",
    }  # fmt: skip


class Fake:
    """In place of child processes. The loss is least at 3e-3; MoLA is better by 0.2 at every seed; 1e-2 diverges."""

    def __init__(self, monkeypatch):
        self.asked, self.shift, self.drawn = [], 0.0, None
        monkeypatch.setattr(work, "jobs", self.jobs)
        monkeypatch.setattr(compared, "draw", self.draw)

    def draw(self, *what):
        self.drawn = what  # a second each: drawn once, at the end

    def jobs(self, configs, workdir):
        self.asked.append(workdir.name.rsplit("-", 1)[0])
        return {name: self.job(config) for name, config in configs.items()}

    def job(self, config):
        if not config.method.rules and not config.method.train_base:
            return dict(nll=dict.fromkeys(tasks.TASKS, 5.0), beside={"pretraining": 3.0}, items={}, answer_tokens={})
        if config.optim.learning_rate > 5e-3:
            return {"nll": {}}
        routed = any("router" in rule for rule in config.method.rules.values())
        loss = 1 + abs(math.log10(config.optim.learning_rate / 3e-3)) + 0.01 * config.seed - 0.2 * routed + self.shift
        return dict(
            nll=dict.fromkeys(tasks.TASKS, loss), beside={"pretraining": 3.5}, blocks=[loss] * 20, digest="d",
            peak_mb=900, seconds=1.0, first5=5.0, last5=loss, active_experts=None, items={}, answer_tokens={},
        )  # fmt: skip

    def take(self):
        taken, self.asked = self.asked, []
        return taken


def start(tmp_path, *argv, methods="lora,mola"):
    where = (f"--out={tmp_path}/out", f"--workdir={tmp_path}/work", "--base=sandbox:6m", "--cost_steps=0")
    return board.main([*where, f"--methods={methods}", "--tables=rank", *argv])


@pytest.mark.pictures
def test_every_row_chooses_its_rate_and_goes_on_from_the_file_alone(tmp_path, monkeypatch):
    fake, out = Fake(monkeypatch), tmp_path / "out"
    assert start(tmp_path, "--seeds=2") == 0
    assert fake.take() == ["base", "lora-grid", "lora", "mola-grid", "mola", "lora", "mola"]
    tree = json.loads((out / "results.json").read_text())
    assert [row["rate"] for row in tree["grid"]] == ["0.003", "0.003"]
    assert tree["grid"][0]["losses"]["0.01"] is None and tree["grid"][0]["losses"]["0.001"] > 1
    shutil.rmtree(tmp_path / "work")
    assert start(tmp_path, "--seeds=3") == 0 and fake.take() == ["lora", "mola"]
    text = (out / "results.md").read_text()
    line = next(line for line in text.splitlines() if line.startswith("| MoLA"))
    cells = [cell.strip() for cell in line.split("|")]
    assert cells[2:4] == ["3", "0.003"] and "better than LoRA" in cells and "-0.200 \u00b1 0.000 (0.000)" in cells
    assert "+0.500 \u00b1 0.000" in cells
    DRAW(*fake.drawn)
    assert (out / "results.png").stat().st_size > 1000
    # the same bits again, or not
    assert start(tmp_path, "--check=1") == 0
    fake.shift = 1e-4
    assert start(tmp_path, "--check=1") == 1
    with pytest.raises(InputError, match="seed 4: not in"):
        start(tmp_path, "--check=4")


def test_wrong(tmp_path):
    with pytest.raises(InputError, match="tasks that come one after the other"):
        start(tmp_path, methods="mora_cl")
    with pytest.raises(InputError) as caught:
        start(tmp_path, "--check=-1")
    assert caught.value.where == "--check"


def test_a_rate_at_the_end_of_the_grid_is_told():
    losses = {"0.001": 2.0, "0.003": 1.0, "0.01": None}
    assert rates.best(losses) == "0.003" and not rates.at_edge("0.003", losses)
    assert rates.at_edge("0.01", losses) and rates.mean({"nll": {}}) is None


def runs(**losses):
    """`{method: {seed: result}}` of equal losses on all tasks, a list of seeds a method."""
    return {m: {i: dict(nll=dict.fromkeys(tasks.TASKS, x), beside={"pretraining": x}) for i, x in enumerate(xs)}
            for m, xs in losses.items()}  # fmt: skip


def test_a_claim_holds_where_every_step_of_its_order_does():
    base, claim = {"beside": {"pretraining": 0.0}}, CLAIMS["dynmole"]
    lora = [2.0, 2.1, 1.9, 2.0, 2.05]
    told = lambda mola, best: judged(steps(claim, runs(lora=lora, mola=mola, dynmole=best), base))  # noqa: E731
    less = lambda xs, by: [x - by + 0.001 * i for i, x in enumerate(xs)]  # noqa: E731
    assert told(less(lora, 0.2), less(lora, 0.4)) == "holds"
    assert told(less(lora, 0.2), less(lora, 0.1)) == "does not hold"  # the first step goes the other way
    assert told([2.3, 1.8, 1.9, 2.2, 1.7], less(lora, 0.9)) == "cannot be told"
    assert judged(steps(claim, runs(lora=lora, mola=lora, dynmole=[1.0]), base)) != "holds"
    used = {task: 2.0 - 0.5 * (task in tasks.EASY) for task in tasks.TASKS}
    runs_of = lambda shift: {s: dict(nll={}, experts_by_task=used | {"add": 2.0 + 0.01 * s + shift}) for s in range(5)}  # noqa: E731
    assert judged(steps(CLAIMS["dynamic_moe"], {"dynamic_moe": runs_of(0.0)}, base)) == "holds"
    assert judged(steps(CLAIMS["dynamic_moe"], {"dynamic_moe": runs_of(-2.5)}, base)) == "does not hold"
    local = lambda value: {s: dict(consistency=dict(value=value + 0.01 * s, permuted=0.3)) for s in range(3)}  # noqa: E731
    order = dict(mixlora=local(0.5), mixlora_unbalanced=local(0.6), mixlora_balanced=local(0.4))
    (*_, first), (*_, second) = steps(CLAIMS["consistency"], order, base)
    assert first.mean == pytest.approx(-0.1) and second.mean == pytest.approx(-0.1)
    values = steps(CLAIMS["loramoe"], runs(lora=[1.0, 2.0], loramoe=[0.5, 1.0]), base)
    assert values[0][2].mean == pytest.approx(-0.75)


@pytest.mark.pictures
def test_pages_of_claims(tmp_path, monkeypatch, capsys):
    fake = Fake(monkeypatch)
    argv = ["--claims=mixlora", f"--results={tmp_path}/out", f"--out={tmp_path}/claims", f"--workdir={tmp_path}/work"]
    assert claims.main(argv) == 0 and fake.take() == []
    assert "mixlora: not told: fewer than two seeds of mixlora, lora" in capsys.readouterr().out
    assert claims.main([*argv, "--run", "--seeds=3"]) == 0
    text = (tmp_path / "claims" / "mixlora.md").read_text()
    assert text.startswith("# MixLoRA is better than LoRA on many tasks at once: holds")
    assert "| MixLoRA minus LoRA | 3 | -0.200" in text and "--claims=mixlora --run" in text
    assert (tmp_path / "claims" / "mixlora.png").stat().st_size > 1000
    with pytest.raises(InputError, match="--claims: got 'mixlor'"):
        claims.main(["--claims=mixlor"])
