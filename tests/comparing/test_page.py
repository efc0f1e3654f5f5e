"""launch.report: what the page says and does not say, that it asks for nothing, and how it looks in a browser."""

import html.parser
import json
import re
import shutil
import subprocess

import matplotlib.image
import pytest

from launch import report
from molora_jax.comparing import facts, page
from molora_jax.errors import InputError
from tests.comparing.folders import config, write_report, write_run

HOSTILE = "<script>alert(1)<"
PROMPT = 'Say <img src=x onerror=alert(2)> & "so"'
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
OWN = re.compile(r"(^|\.)(google\.com|googleapis\.com|gstatic\.com|gvt1\.com)$")  # with them the page has nothing to do


class Tags(html.parser.HTMLParser):
    """Names and attributes of all tags, and the text outside of `style`."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self._style = [], "", False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._style = tag == "style"

    def handle_endtag(self, tag):
        self._style = False

    def handle_data(self, data):
        self.text += "" if self._style else data


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """A hostile name and prompt, a harder run, and one without evaluation; the page of all."""
    folder = tmp_path_factory.mktemp("runs")
    answers = {"double": [dict(prompt=PROMPT, target="<b>4</b>", base="?", tuned="4")]}
    made = config()
    write_run(folder / HOSTILE, made)
    write_report(folder / HOSTILE, ("double", PROMPT), answers=answers)
    other = config(batch_size=4)
    with other.unlocked():
        other.optim.learning_rate, other.data.system = 7e-4, "<i>be brief</i>"
    rows = [json.loads(line) for line in (folder / HOSTILE / "metrics.jsonl").read_text().splitlines()]
    rows[-1] |= {"watch/collapsed": 3, "lost": "5-7"}
    write_run(folder / "b$x$ & y", other, nll=2.0, rows=rows)
    write_report(folder / "b$x$ & y", ("double", PROMPT), shift=0.5)
    write_run(folder / "plain", config(), step=30, patience=dict(waited=2, lowest=1.0, rounds=2, stopped=True))
    assert (
        report.run([*(f"--workdir={folder / n}" for n in (HOSTILE, "b$x$ & y", "plain")), f"--out={folder}/r.html"])
        is None
    )
    return folder, (folder / "r.html").read_text()


def test_nothing_of_a_run_becomes_markup_and_nothing_is_asked_for(three):
    _, text = three
    seen = Tags(text)
    names = {tag for tag, _ in seen.tags}
    assert not names & {"script", "iframe", "object", "b", "i"} and "default-src 'none'" in text
    for tag, attributes in seen.tags:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href"):
            assert attributes.get(name, "data:").startswith("data:"), (tag, attributes)
    assert not re.search(r"url\(|@import|https?://", re.sub(r"base64,[\w+/=]+", "", text))
    for shown in (HOSTILE, PROMPT, "<b>4</b>", "<i>be brief</i>", "b$x$ & y"):
        assert shown in seen.text
    images = [a for tag, a in seen.tags if tag == "img"]
    assert len(images) >= 4 and all(a["alt"] for a in images)


def test_what_it_says(three):
    _, text = three
    said = Tags(text).text
    assert "30 of 40 steps, ended by train.patience" in said and "40 of 40 steps" in said
    assert "plain: not evaluated: python -m launch.evaluate --workdir=" in said
    assert "router collapse from step 40 on, in up to 3 layers" in said and "no metrics of the steps 5-7" in said
    assert "optim.learning_rate" in said and "0.0007" in said and "train.batch_size" in said
    assert "optim.b1" not in said and "data.seq_len" not in said, "what is equal is left out"
    assert "100 (9.09%)" in said and "0.500" in said and "jax" in said
    assert f"Difference to {HOSTILE}" in said and "+0.500 (+0.500 to +0.500)" in said and "+0.0%" in said
    assert 'class="worse">+0.500' in text and 'class="better"' not in text


def test_one_run_no_evaluation_no_step(tmp_path):
    write_run(tmp_path / "only", config(), rows=[])
    report.run([f"--workdir={tmp_path / 'only'}", f"--out={tmp_path / 'deep' / 'r.html'}"])
    said = Tags((tmp_path / "deep" / "r.html").read_text()).text
    for text in ("No run has trained a step yet", "not evaluated", "nothing to compare its config with"):
        assert text in said


@pytest.mark.parametrize("damage", ["{", "[]", '{"tasks": {"a": {"items": 1, "nll": "x"}}, "routing": {}, "step": 1}',
                                    '{"tasks": {}, "routing": {"ffn": 3}, "step": 1}'])  # fmt: skip
def test_a_damaged_report_is_told(tmp_path, damage):
    write_run(tmp_path / "a", config())
    (tmp_path / "a" / "report").mkdir()
    (tmp_path / "a" / "report" / "report.json").write_text(damage)
    (run,) = facts.read([tmp_path / "a"])
    assert run.report is None and "its report.json cannot be read" in run.missing


def test_a_folder_of_runs_stands_for_all(tmp_path):
    for name in ("b", "a"):
        write_run(tmp_path / "grid" / name, config())
    (tmp_path / "grid" / "runs.json").write_text('{"runs": ["b", "a"]}')
    runs = facts.read([tmp_path / "grid"])
    assert [run.name for run in runs] == ["b", "a"]
    assert "Nothing: the configs are equal in every field." in page._differences(runs)


def test_bad_input(tmp_path):
    write_run(tmp_path / "a", config())
    for arguments, message in (
        ([f"--workdir={tmp_path}/none", "--out=r.html"], "which does not exist"),
        ([f"--workdir={tmp_path / 'a'}", f"--workdir={tmp_path}/./a", "--out=r.html"], "--workdir: got .* twice"),
        ([f"--workdir={tmp_path / 'a'}", "--out=r.pdf"], "--out: got 'r.pdf'; expected a file FILE.html"),
        ([f"--workdir={tmp_path / 'a'}", f"--out={tmp_path}/a/config.json/r.html"], "--out.*expected a file that can"),
        ([f"--workdir={tmp_path / 'a'}"], "required"),
    ):
        with pytest.raises(InputError, match=message):
            report.run(arguments)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium (Debian: apt-get install chromium)")
@pytest.mark.parametrize("width", [1200, 500])
def test_in_a_browser(three, tmp_path, width):
    """It renders without an error of the console, asks nobody for anything, and is not wider than the window."""
    folder, text = three
    probe = "<script>document.title = document.documentElement.scrollWidth</script>"  # of the test's copy alone
    (tmp_path / "r.html").write_text(text)
    (tmp_path / "p.html").write_text(text.replace("default-src 'none'", "script-src 'unsafe-inline'") + probe)
    start = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},3000", "--hide-scrollbars",
        "--host-resolver-rules=MAP * ~NOTFOUND",
    ]  # fmt: skip
    log = tmp_path / "net.json"
    shot = [f"--screenshot={tmp_path / 'r.png'}", "--enable-logging=stderr", f"--log-net-log={log}"]
    done = subprocess.run([*start, *shot, f"file://{tmp_path}/r.html"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and "CONSOLE" not in done.stderr, done.stderr
    hosts = set(re.findall(r'"url":"(?:https?|wss?)://([^/"?:]+)', log.read_text()))
    assert not {host for host in hosts if not OWN.search(host)}, "beside what the browser asks its maker for itself"
    image = matplotlib.image.imread(tmp_path / "r.png")[..., :3]
    assert (
        image.shape[1] == width
        and (image[:300] < 0.5).any()
        and len(set(map(tuple, image[::40, ::40].reshape(-1, 3)))) > 5
    )
    dom = subprocess.run(
        [*start, "--dump-dom", f"file://{tmp_path}/p.html"], capture_output=True, text=True, timeout=600
    )
    assert int(re.search(r"<title>(\d+)</title>", dom.stdout)[1]) <= width
