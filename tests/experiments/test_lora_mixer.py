"""The experiment on LoRA-Mixer: its tasks, and what its table and picture are made of. Runs are not trained here."""

import numpy as np
import pytest

from experiments.lora_mixer import __main__ as mixer
from experiments.lora_mixer import report
from experiments.lora_mixer.tasks import BEFORE, TASKS, rows

WANTED = dict(
    upper="DCBAZ", back="zabcd", next="edcba", twice="ddccbbaazz", copy="dcbaz", first="d", last="z", skip="dbz",
    rest="cbaz", dash="d-c-b-a-z", ends="dz",
)  # fmt: skip


def test_answers_are_those_of_the_instruction():
    for name, wanted in WANTED.items():
        assert (TASKS | BEFORE)[name][1]("dcbaz") == wanted, name
    assert not {ask for ask, _ in TASKS.values()} & {ask for ask, _ in BEFORE.values()}, "new ones"
    for name, (ask, answer) in TASKS.items():
        found = rows(name, 200, 3)
        assert found == rows(name, 200, 3) and found[:50] == rows(name, 50, 3) and found != rows(name, 200, 4)
        texts = [row["prompt"].removeprefix(ask.format("")) for row in found]
        assert len(set(texts)) == 200 and all(3 <= len(text) <= 6 for text in texts)
        assert [row["target"] for row in found] == list(map(answer, texts))


def score(right, gates=None):
    out = dict(right=right, tokens=[10.0] * 4, whole=[1.0] * 4, items=[2.0] * 4, nll=[5.0] * 4)
    return out | ({} if gates is None else dict(gates=gates))


@pytest.mark.pictures
def test_the_table_and_the_picture(tmp_path):
    mine = [
        [[0.7, 0.1, 0.1, 0.1]] * 3,
        [[0.1, 0.7, 0.1, 0.1]] * 3,
        [[0.1, 0.1, 0.7, 0.1]] * 3,
        [[0.1, 0.1, 0.1, 0.7]] * 3,
    ]
    runs = {
        str(seed): {"one LoRA": score([5.0 + seed, 5, 5, 5]), "router | top 3": score([8.0, 8, 8, 4], mine)}
        for seed in range(2)
    }
    text = report.write(tmp_path, dict(setting={}, runs=runs))
    lines = text.splitlines()
    assert lines[2] == "| one LoRA | 51.2 (50.0, 52.5) | 55 | 50 | 50 | 50 | 50.0 | 0.500 | - | - |"
    assert lines[3] == "| router, top 3 | 70.0 (70.0, 70.0) | 80 | 80 | 80 | 40 | 50.0 | 0.500 | 70 | 25 25 25 25 |"
    assert (tmp_path / "results.md").read_text() == text and (tmp_path / "results.png").stat().st_size > 1000
    assert report.own(score([1] * 4, mine)) == pytest.approx(0.7)
    np.testing.assert_allclose(report.load(score([1] * 4, mine)), 0.25)


def test_every_router_has_its_rows_and_one_lora_as_many_parameters():
    assert {count for count, *_ in mixer.ROUTERS.values()} == {mixer.FEW, mixer.ROWS}
    assert mixer.FEW * 20 == mixer.ROWS and {sign for _, sign, _ in mixer.ROUTERS.values()} == {1, -1, 0}
    experts, one = mixer.rule()["mix"], mixer.rule(router=False, rank=mixer.E * mixer.RANK)["mix"]
    assert int(experts["experts"]) * experts["adapter"]["rank"] == one["adapter"]["rank"]
    assert (experts["sites"], experts["layers"]) == (one["sites"], one["layers"])
