"""The endpoints, asked in this process: shapes, streams, errors, hang-ups."""

import concurrent.futures
import contextlib
import http.client
import json
import queue
import signal
import threading
import time
import urllib.parse

import pytest

from molora_jax.decode.slots import Draw, Token
from molora_jax.evaluation.run import before
from molora_jax.serving import protocol
from molora_jax.serving.answer import Answer
from molora_jax.serving.app import Server, application
from tests.serving.client import ask
from tests.serving.conftest import NEW

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


@pytest.fixture
def app(engine):
    return application(engine)


def chat(text="Double 4", **fields):
    messages = [{"role": "user", "content": text}]
    return {"model": "run", "messages": messages, "temperature": 0, "max_tokens": NEW} | fields


def test_models_and_health(app):
    models, one, none, health, nowhere, method = ask(
        app, ("/v1/models",), ("/v1/models/run",), ("/v1/models/x",), ("/health",), ("/v1/embeddings", {}), (CHAT,)
    )
    assert models.json["object"] == "list" and [m["id"] for m in models.json["data"]] == ["run", "endless"]
    assert one.json["id"] == "run" and one.json["object"] == "model"
    assert none.status == 404 and none.json["error"]["code"] == "model_not_found"
    assert health.status == 200 and health.json["status"] == "ok" and health.json["slots"] == 4
    assert nowhere.status == 404 and method.status == 405 and "message" in method.json["error"]


def test_chat(app, run, wanted):
    whole, stream = ask(app, (CHAT, chat()), (CHAT, chat(stream=True, stream_options={"include_usage": True})))
    assert whole.status == 200 and whole.json["object"] == "chat.completion" and whole.json["model"] == "run"
    (choice,) = whole.json["choices"]
    assert choice["message"] == {"role": "assistant", "content": wanted["Double 4"], "refusal": None}
    assert choice["finish_reason"] in ("stop", "length") and choice["logprobs"] is None
    prompt, made = len(run.prompt_ids("Double 4")), whole.json["usage"]["completion_tokens"]
    assert whole.json["usage"] == dict(prompt_tokens=prompt, completion_tokens=made, total_tokens=prompt + made)
    assert stream.headers["content-type"].startswith("text/event-stream")
    first, *chunks, usage = stream.events
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert all(chunk["object"] == "chat.completion.chunk" and chunk["id"] == first["id"] for chunk in chunks)
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == wanted["Double 4"]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks][-1] == choice["finish_reason"]
    assert usage["choices"] == [] and usage["usage"] == whole.json["usage"]


def test_completions_read_text_and_ids(app, run):
    ids = run.tokenizer.encode_plain("Is 3 even?")
    fields = dict(model="run", temperature=0, max_tokens=6)
    text, as_ids, two = ask(
        app, (TEXT, {"prompt": "Is 3 even?"} | fields), (TEXT, {"prompt": ids} | fields),
        (TEXT, {"prompt": ["Is 3 even?", "Double 2"], "n": 2} | fields),
    )  # fmt: skip
    assert text.json["object"] == "text_completion"
    assert text.json["choices"] == as_ids.json["choices"]
    assert [c["index"] for c in two.json["choices"]] == [0, 1, 2, 3]
    texts = [c["text"] for c in two.json["choices"]]
    assert texts[0] == texts[1] == text.json["choices"][0]["text"] and texts[2] == texts[3]
    assert two.json["usage"]["prompt_tokens"] == 2 * (len(ids) + len(run.tokenizer.encode_plain("Double 2"))) // 2


def test_seeds_do_not_depend_on_the_neighbours(app, run):
    drawn = chat(temperature=1.2, seed=5, n=2, top_p=0.95)
    (alone,) = ask(app, (CHAT, drawn))
    beside = ask(app, (CHAT, chat("Is 3 even?", temperature=1.5, seed=9)), (CHAT, drawn), (CHAT, chat("Double 6")))[1]
    assert alone.json["choices"] == beside.json["choices"]
    texts = [choice["message"]["content"] for choice in alone.json["choices"]]
    drawn = [run.generate("Double 4", max_new_tokens=NEW, temperature=1.2, top_p=0.95, seed=s) for s in (5, 6)]
    assert texts == drawn and texts[0] != texts[1]


def test_stop(app, run, wanted):
    whole = wanted["Double 4"]
    stop = next(letter for letter in whole[1:] if letter.isascii())
    wanted = before(whole, (stop,))
    one, stream = ask(app, (CHAT, chat(stop=stop)), (CHAT, chat(stop=[stop, "never"], stream=True)))
    assert one.json["choices"][0]["message"]["content"] == wanted != whole
    assert one.json["choices"][0]["finish_reason"] == "stop"
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in stream.events) == wanted


def test_logprobs(app):
    one, stream, text = (
        ask(app, asked)[0]  # one after the other: bits depend on how many rows a step has
        for asked in (
            (CHAT, chat(logprobs=True, top_logprobs=3)), (CHAT, chat(logprobs=True, top_logprobs=3, stream=True)),
            (TEXT, dict(model="run", prompt="Double 4", temperature=0, max_tokens=5, logprobs=2)),
        )
    )  # fmt: skip
    content = one.json["choices"][0]["logprobs"]["content"]
    told = [t for c in stream.events for t in ((c["choices"][0]["logprobs"] or {}).get("content") or [])]
    assert told == content and content
    for token in content:
        assert token["logprob"] <= 0 and len(token["top_logprobs"]) == 3
        assert token["top_logprobs"][0]["logprob"] == max(t["logprob"] for t in token["top_logprobs"])
        assert abs(token["logprob"] - token["top_logprobs"][0]["logprob"]) < 1e-6  # greedy
    logprobs = text.json["choices"][0]["logprobs"]
    assert {len(logprobs[name]) for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")} == {
        len(logprobs["tokens"])
    }
    assert logprobs["text_offset"][0] == 0


def test_a_client_that_hangs_up(app, engine):
    in_stream = lambda reply: len(reply.parts) >= 3  # noqa: E731
    before = lambda reply: True  # noqa: E731
    long = dict(max_tokens=90, n=2, model="endless")
    start = time.monotonic()
    ask(app, (CHAT, chat(stream=True, **long), {"hang_up": in_stream}), (CHAT, chat(**long), {"hang_up": before}))
    while engine.state()["running"] or engine.state()["waiting"]:
        assert time.monotonic() - start < 60
        time.sleep(0.01)
    assert engine.tokens < 4 * 90
    assert len(engine.slots["run"].free) == 4


@pytest.mark.parametrize(
    ("path", "fields", "param", "words"),
    [
        (CHAT, dict(temperature=-1), "temperature", "0.001 to 2"),
        (CHAT, dict(temperature="hot"), "temperature", "'hot'"),
        (CHAT, dict(top_p=0), "top_p", "above 0"),
        *((CHAT, {name: 10**4000}, name, "bits") for name in ("top_p", "min_p", "top_k", "repetition_penalty")),
        (CHAT, dict(temperature=10**4000), "temperature", "0.001 to 2"),
        (CHAT, dict(seed=10**4000), "seed", "an integer"),
        (CHAT, dict(n=0), "n", "1 to 4"),
        (CHAT, dict(n=5), "n", "1 to 4"),
        (CHAT, dict(seed=1.5), "seed", "an integer"),
        (CHAT, dict(stop=[""]), "stop", "none empty"),
        (CHAT, dict(stop=["x" * 600, "y" * 600]), "stop", "1,200 characters"),
        (CHAT, dict(max_tokens=0), "max_tokens", "0"),
        (CHAT, dict(max_tokens=500), "max_tokens", "at most"),
        (CHAT, dict(messages=[]), "messages", "an empty list"),
        (CHAT, dict(messages="hi"), "messages", "a list of turns"),
        (CHAT, dict(messages=[{"role": "king", "content": "x"}]), "messages", "king"),
        (CHAT, dict(messages=[{"role": "user", "content": "x" * 400}]), "messages", "tokens"),
        (CHAT, dict(stream="yes"), "stream", "true or false"),
        (CHAT, dict(stream_options={"include_usage": True}), "stream_options", "stream"),
        (CHAT, dict(stream=True, stream_options={"include_usage": "x"}), "stream_options", "true or false"),
        (CHAT, dict(top_logprobs=3), "top_logprobs", "logprobs: true"),
        (CHAT, dict(logprobs=True, top_logprobs=30), "top_logprobs", "0 to 20"),
        (CHAT, dict(presence_penalty=0.5), "presence_penalty", "not served"),
        (CHAT, dict(temprature=0), "temprature", "unknown field"),
        (CHAT, dict(model=3), "model", "the name of a model"),
        (TEXT, dict(prompt=""), "prompt", "none empty"),
        (TEXT, dict(prompt=[1, 10**6]), "prompt", "token ids"),
        (TEXT, dict(prompt=["a"] * 3, n=2), "n", "at most 4"),
        (TEXT, dict(prompt="a", logprobs=True), "logprobs", "0 to 20"),
        (TEXT, dict(prompt="a", echo=True), "echo", "not served"),
        (TEXT, {}, "prompt", "nothing"),
    ],
)
def test_errors_name_the_field(app, path, fields, param, words):
    body = (chat() if path == CHAT else {"model": "run"}) | fields
    (reply,) = ask(app, (path, body))
    assert reply.status == 400
    error = reply.json["error"]
    assert error["param"] == param and error["type"] == "invalid_request_error" and words in error["message"]


def test_bodies_that_are_none(app):
    broken, array, huge, unknown = ask(
        app, (CHAT, b"{"), (CHAT, [1]), (CHAT, b" " * (9 << 20)), (CHAT, chat(model="other"))
    )
    assert (broken.status, array.status, huge.status, unknown.status) == (400, 400, 413, 404)
    assert broken.json["error"]["param"] is None and "body" in broken.json["error"]["message"]
    error = unknown.json["error"]
    assert error["param"] == "model" and "expected one of run, endless" in error["message"]


def test_half_a_surrogate_pair_is_told_of_in_json(app):
    bodies = [{"\ud800": 1}, chat("\ud800"), chat(user="\ud800"), chat(stop="\ud800"), {"messages": [{"\ud800": {}}]}]
    for reply in ask(app, *((CHAT, body) for body in bodies)):
        assert reply.status == 400 and reply.json["error"]["message"]


def test_names_are_not_quoted_at_length(app):
    for reply in ask(app, (CHAT, chat(**{"x" * 10**6: 1})), (CHAT, chat(model="x" * 10**6))):
        assert reply.status in (400, 404) and len(reply.json["error"]["message"]) < 1000


def test_a_fault_of_ours_has_the_shape_of_an_error(app, engine, monkeypatch, caplog):
    monkeypatch.setattr("molora_jax.serving.protocol.read", lambda *_, **__: {}["a key"])
    (reply,) = ask(app, (CHAT, chat()))
    assert reply.status == 500 and reply.json["error"]["type"] == "server_error" and "'a key'" in caplog.text
    monkeypatch.setattr(engine, "state", lambda: 1 / 0)
    replies = []

    async def health(scope, receive, send):  # starlette answers, and raises it again for the log
        try:
            await app(scope, receive, send)
        except ZeroDivisionError:
            replies.append("raised")

    (reply,) = ask(health, ("/health",))
    assert reply.status == 500 and reply.json["error"]["type"] == "server_error" and replies == ["raised"]


def test_an_answer_without_text_may_be_sent_back(app):
    ask_again = {"role": "user", "content": "Double 2"}
    turns = [{"role": "user", "content": "Double 4"}, {"role": "assistant", "content": ""}, ask_again]
    fine, refused = ask(app, (CHAT, chat(messages=turns)), (CHAT, chat(messages=[{"role": "user", "content": ""}])))
    assert fine.status == 200 and refused.status == 400


def test_logprobs_of_pieces_of_characters(run):
    tokenizer = run.tokenizer
    ids = tokenizer.encode("a🙂b")
    top = tuple((i, -1.0 * n) for n, i in enumerate(ids[1:]))  # three pieces, and a letter
    for kind in ("chat", "text"):
        answer = Answer(run, [5], Draw(), most=len(ids), logprobs=True)
        pieces = [answer.add(Token(i, -0.5, top)) for i in ids]
        asked = protocol.Ask(kind, "run", [answer], True, False, 5, 1, "id", 0, [0])
        told = [protocol.choice(asked, 0, piece, done=False)["logprobs"] for piece in pieces]
        if kind == "chat":
            entries = [entry for logprobs in told for entry in logprobs["content"]]
            assert bytes(sum((entry["bytes"] for entry in entries), [])).decode() == "a🙂b"
            assert entries[1]["token"] == "bytes:\\xf0" and entries[0]["token"] == "a"
        else:
            assert [logprobs["text_offset"] for logprobs in told] == [[0], [1], [1], [1], [1], [2]]
            assert told[0]["top_logprobs"][0].keys() >= {
                "bytes:\\xf0",
                "bytes:\\x9f",
                "bytes:\\x99",
                "bytes:\\x82",
                "b",
            }


@contextlib.contextmanager
def _listening(engine, grace):
    """A server in a thread, and the function that asks it: a path and a body -> `http.client.HTTPResponse`."""
    urls = queue.Queue()
    server = Server(engine, host="127.0.0.1", port=0, grace=grace, started=urls.put)
    thread = threading.Thread(target=server.run)
    thread.start()
    address, opened = urllib.parse.urlparse(urls.get(timeout=60)).netloc, []

    def asked(path, body=None):
        opened.append(http.client.HTTPConnection(address, timeout=60))
        opened[-1].request("POST" if body else "GET", path, body and json.dumps(body))
        return opened[-1].getresponse()

    try:
        yield server, thread, asked
    finally:
        for connection in opened:
            connection.close()
        server.handle_exit(signal.SIGTERM, None)
        server.handle_exit(signal.SIGTERM, None)
        thread.join(60)


def test_an_end_while_the_device_is_busy(app, engine, monkeypatch):
    """Streams end with an event and other answers with 503, at the deadline; until then it listens and says so."""
    slots, go_on = engine.slots["endless"], threading.Event()
    step = slots.step
    monkeypatch.setattr(slots, "step", lambda: step() if go_on.wait(60) else {})  # as one that compiles
    try:
        with _listening(engine, 1.0) as (server, thread, asked), concurrent.futures.ThreadPoolExecutor(1) as pool:
            stream = asked(CHAT, chat(stream=True, model="endless"))
            whole = pool.submit(asked, CHAT, chat("Double 5", model="endless"))
            while engine.state()["running"] + engine.state()["waiting"] < 2:
                time.sleep(0.01)
            start = time.monotonic()
            server.handle_exit(signal.SIGTERM, None)
            health, refused = asked("/health"), asked(CHAT, chat())
            assert health.status == refused.status == 503 and b"closing" in health.read()
            last = stream.read().decode().strip().split("\n\n")[-1]
            assert "shutting_down" in last and whole.result().status == 503
            assert 0.9 < time.monotonic() - start < 10
            thread.join(30)
            assert not thread.is_alive()
    finally:
        go_on.set()


def test_an_end_waits_for_what_runs(engine, endless):
    with _listening(engine, 60.0) as (server, thread, asked):
        stream = asked(CHAT, chat(stream=True, model="endless", max_tokens=40))
        server.handle_exit(signal.SIGTERM, None)
        assert stream.read().decode().strip().endswith("data: [DONE]")
        thread.join(30)
        assert not thread.is_alive()


def test_a_full_queue_says_when_to_come_again(app, engine):
    many = [(CHAT, chat(f"Double {i}", max_tokens=60, n=4, model="endless")) for i in range(6)]  # 4 run, 8 wait
    replies = ask(app, *many)
    refused = [reply for reply in replies if reply.status == 429]
    assert {reply.status for reply in replies} == {200, 429} and len(refused) <= 3  # fewer where some ended meanwhile
    assert all(int(reply.headers["retry-after"]) >= 1 for reply in refused)
    assert refused[0].json["error"]["code"] == "queue_full"


def test_an_engine_that_ends(app, engine):
    engine.close(0)
    engine.thread.join(timeout=60)
    health, refused = ask(app, ("/health",), (CHAT, chat()))
    assert health.status == 503 and health.json["status"] == "closing"
    assert refused.status == 503 and refused.json["error"]["code"] == "shutting_down"
