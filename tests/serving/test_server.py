"""`launch.serve` itself: its mistakes, and (slow) a real server asked by the `openai` client, soaked, and ended."""

import concurrent.futures
import contextlib
import os
import pathlib
import queue
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import urllib.request

import pytest

from launch import serve
from molora_jax.errors import InputError

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize("package", ["starlette", "uvicorn"])
def test_without_the_extra(package, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == package or name == "molora_jax.serving.app"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=rf'no package {package}.*pip install "molora_jax\[serve\]"'):
        serve.run(["--workdir=runs/a", "--port=0"])


def test_a_port_in_use_is_found_before_jax_is_imported(monkeypatch):
    monkeypatch.setitem(sys.modules, "molora_jax.serving.app", None)  # who imports it fails otherwise
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"--port: got 127.0.0.1:{port}"):
            serve.run(["--workdir=runs/a", f"--port={port}"])


def test_of_two_servers_that_start_at_once_the_second_is_refused():
    with serve.bound("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(InputError, match=f"--port: got 127.0.0.1:{port}"):
            serve.bound("127.0.0.1", port)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--port=70000"], "--port: got 70000; expected 0 to 65535"),
        (["--slots=0"], "--slots"),
        (["--queue=-1"], "--queue"),
        (["--context=1"], "--context"),
        (["--workdir=b/a"], "two folders called a"),
        (["--port=0", "--host=no.such.host.invalid"], "--port: got no.such.host.invalid"),
    ],
)
def test_bad_flags(flags, words):
    with pytest.raises(InputError, match=re.escape(words)):
        serve.run(["--workdir=a", *flags])


def test_a_run_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match="workdir"):
        serve.run([f"--workdir={tmp_path / 'none'}", "--port=0"])


@contextlib.contextmanager
def _server(*flags):
    """The URL of a server process, and the process."""
    command = [sys.executable, "-u", "-m", "launch.serve", "--port=0", *flags]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        assert line.startswith("serving "), line
        yield re.search(r"http://\S+/v1", line)[0], process
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def served(run, tmp_path_factory):
    """A server of two runs of one base, and its clients."""
    import openai

    other = tmp_path_factory.mktemp("other") / "second"
    shutil.copytree(run.workdir, other)
    with _server(f"--workdir={run.workdir}", f"--workdir={other}", "--slots=8", "--queue=600") as (url, process):
        yield url, openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=300), process


def _chat(client, text, **options):
    messages = [{"role": "user", "content": text}]
    options = dict(model="run", temperature=0, max_tokens=12) | options
    return client.chat.completions.create(messages=messages, **options)


@pytest.mark.slow
def test_the_openai_client(run, served):
    import openai

    url, client, _ = served
    assert [model.id for model in client.models.list()] == ["run", "second"]
    wanted = run.generate("Double 7", max_new_tokens=12)
    assert _chat(client, "Double 7").choices[0].message.content == wanted
    assert _chat(client, "Double 7", model="second").choices[0].message.content == wanted
    chunks = list(_chat(client, "Double 7", stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == wanted
    assert chunks[-1].usage.completion_tokens > 0
    told = _chat(client, "Double 7", logprobs=True, top_logprobs=2).choices[0].logprobs.content
    assert all(len(token.top_logprobs) == 2 for token in told)
    two = _chat(client, "Double 7", n=2, temperature=1.0, seed=3)
    assert [c.message.content for c in two.choices] == [
        run.generate("Double 7", max_new_tokens=12, temperature=1.0, seed=seed) for seed in (3, 4)
    ]
    text = client.completions.create(model="run", prompt=["a", "b"], max_tokens=3, temperature=0)
    assert [choice.index for choice in text.choices] == [0, 1]
    with pytest.raises(openai.BadRequestError) as error:
        _chat(client, "Double 7", temperature=-1)
    assert error.value.param == "temperature"
    with pytest.raises(openai.NotFoundError) as error:
        _chat(client, "Double 7", model="third")
    assert error.value.code == "model_not_found"
    with urllib.request.urlopen(url.removesuffix("/v1") + "/health") as health:
        assert health.status == 200


@pytest.mark.slow
def test_a_soak_of_500_requests(run, served):
    """Streams and whole answers, two models, clients that hang up, 24 at once: answers are those of `generate`."""
    _, client, _ = served
    texts = [f"Double {i}" + " please" * (i % 5) for i in range(20)]
    wanted = run.generate(texts, max_new_tokens=12)

    def ask(i):
        model, stream = ("run", "second")[i % 2], i % 3 == 0
        if i % 11 == 0:  # hangs up
            with _chat(client, texts[i % 20], model=model, stream=True, max_tokens=100) as chunks:
                next(iter(chunks))
            return None
        answer = _chat(client, texts[i % 20], model=model, stream=stream)
        return (
            "".join(c.choices[0].delta.content or "" for c in answer) if stream else answer.choices[0].message.content
        )

    with concurrent.futures.ThreadPoolExecutor(24) as pool:
        found = list(pool.map(ask, range(500)))
    assert all(text is None or text == wanted[i % 20] for i, text in enumerate(found))
    assert sum(text is not None for text in found) == 454


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_after_the_running_answer(run, number):
    import openai

    with _server(f"--workdir={run.workdir}", "--slots=2") as (url, process):
        client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=120)
        came, begun = queue.Queue(), threading.Event()

        def read():
            for chunk in _chat(client, "Double 7", stream=True, max_tokens=60):
                came.put(chunk)
                begun.set()

        reader = threading.Thread(target=read)
        reader.start()
        assert begun.wait(60)
        process.send_signal(number)
        reader.join(60)
        assert process.wait(60) == 0
        chunks = list(came.queue)
        assert chunks[-1].choices[0].finish_reason in ("stop", "length")
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert text == run.generate("Double 7", max_new_tokens=60)
