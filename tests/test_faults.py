"""The fault matrix in small (`python -m tests.faults`): every row with tries there, and the runner itself."""

import json
import subprocess
import sys

import pytest

from tests.faults import runner
from tests.faults.__main__ import main
from tests.faults.report import CHANNEL, each
from tests.faults.table import ROWS, SELFTEST

SMALL = [row for row in ROWS if row.tries]


@pytest.fixture(scope="module")
def results(request):
    """One worker in an ordinary run: a second one pays the imports and the first compiles again."""
    workers = 2 if request.config.getoption("--all") else 1
    return {result.row.name: result for result in runner.run(SMALL, workers=workers)}


@pytest.mark.parametrize("name", [row.name for row in SMALL])
def test_promise(name, results):
    result = results[name]
    assert not result.failures, "\n".join(f"seed {failure.seed}: {failure.what}" for failure in result.failures)


def test_a_row_that_dies_hangs_or_raises_is_a_failure_and_the_others_go_on(monkeypatch):
    """The runner's own faults: seeds 1, 3 and 5 of `selftest` hang, die and raise."""
    monkeypatch.setattr(runner, "ROWS", (SELFTEST,))
    (result,) = runner.run([SELFTEST], workers=1)
    assert [failure.seed for failure in result.failures] == [1, 3, 5]
    assert "no end after" in result.failures[0].what and "died" in result.failures[1].what
    assert result.failures[2].what.startswith("ValueError at selftest.py")
    assert result.as_dict().keys() >= {"promise", "tries", "failures"} and result.as_dict()["failures"] == 3


def test_a_slow_try_is_a_failure(monkeypatch):
    monkeypatch.setattr(CHANNEL, "seconds", -1.0)
    assert "took" in each(4, 1, lambda number: "")[0].what


def test_the_command_says_what_it_did():
    command = [sys.executable, "-m", "tests.faults", "--only=rows.unusable", "--json", "--tries=2", "--workers=1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=runner.ROOT, check=False)
    (row,) = json.loads(done.stdout)
    assert done.returncode == 0 and (row["tries"], row["failures"]) == (2, 0) and "usable row" in row["promise"]


def test_a_row_without_a_try_in_small_says_so():
    with pytest.raises(SystemExit, match="kills.points: tried with --full only"):
        main(["--only=kills.points"])
    with pytest.raises(SystemExit, match="no such row"):
        main(["--only=kill"])


def test_every_row_has_its_line_in_the_docs():
    text = (runner.ROOT / "docs" / "reliability.md").read_text()
    assert [row.name for row in ROWS if f"`{row.name}`" not in text] == []
