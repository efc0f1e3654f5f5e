"""The HTTP side: an ASGI application over an `Engine` (starlette), and the server that runs it (uvicorn).

Prompts are rendered and encoded in a thread of their own; tokens come from the engine's thread. A client that hangs up,
in a stream or before its answer, frees its slots.
"""

import asyncio
import concurrent.futures
import contextlib
import functools
import json
import logging
import time

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from molora_jax.data import jsonl
from molora_jax.errors import InputError
from molora_jax.serving import protocol
from molora_jax.serving.answer import Piece
from molora_jax.serving.engine import Closing, Engine, Full, Request

LOG = logging.getLogger("molora_jax.serving")
LARGEST_BODY = 8 << 20  # bytes
LOOK = 0.5  # seconds between two looks at the deadline, where no piece comes
FLUSH = 5  # seconds for replies to be sent, at the end
GONE = 499  # what nginx calls a client that closed the connection; nobody reads it


class Reply(JSONResponse):
    """In ASCII: an error that quotes half a surrogate pair can be sent as well."""

    def render(self, content) -> bytes:
        return json.dumps(content, allow_nan=False).encode()


class Events(Response):
    """Server-sent events; the requests behind them are cancelled if the client hangs up."""

    def __init__(self, lines, receive):
        self.lines, self.receive, self.background = lines, receive, None

    async def __call__(self, scope, receive, send):
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]

        async def pump():
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            async with contextlib.aclosing(self.lines):
                async for line in self.lines:
                    await send({"type": "http.response.body", "body": f"data: {line}\n\n".encode(), "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        with contextlib.suppress(OSError):  # the connection is gone
            await unless_gone(self.receive, pump())


async def unless_gone(receive, work):
    """The result of a coroutine, which is cancelled where the client hangs up before (then: None)."""

    async def hung_up():
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(hung_up())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].result() if tasks[0].done() else None
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def application(engine: Engine) -> Starlette:
    """The endpoints. The engine is started by the caller."""
    encoder = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="molora-encode")
    created = int(time.time())

    def card(name):
        return {"id": name, "object": "model", "created": created, "owned_by": "molora_jax"}

    async def models(request):
        return Reply({"object": "list", "data": [card(name) for name in engine.runs]})

    async def model(request):
        name = request.path_params["name"]
        return Reply(card(name)) if name in engine.runs else no_model(name, engine)

    async def health(request):
        state = engine.state()
        return Reply(state, status_code=200 if state["status"] == "ok" else 503)

    async def answer(request, *, kind):
        try:
            body = await _body(request)
            read = functools.partial(protocol.read, kind, body, engine.runs, engine.slots, most=engine.count)
            ask = await asyncio.get_running_loop().run_in_executor(encoder, read)
        except InputError as error:
            return failed(400, str(error), param=None if error.where == "body" else error.where)
        except protocol.NoModel as error:
            return no_model(error.args[0], engine)
        except ClientDisconnect:
            return Response(status_code=GONE)
        except HTTPException:
            raise
        except Exception as error:  # noqa: BLE001  of ours
            return _failure(error)
        pieces = _pieces(engine, ask)
        try:  # the first one here, so that what is refused has a status of its own
            first = await unless_gone(request.receive, anext(pieces))
            if first is None:
                return Response(status_code=GONE)
            if ask.stream:
                return Events(_lines(ask, _with(first, pieces)), request.receive)
            whole = await unless_gone(request.receive, _whole(ask, _with(first, pieces)))
            return Response(status_code=GONE) if whole is None else Reply(whole)
        except Exception as error:  # noqa: BLE001
            return _failure(error)
        finally:
            if not ask.stream:
                await pieces.aclose()

    routes = [
        Route("/health", health),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
        Route("/v1/chat/completions", functools.partial(answer, kind="chat"), methods=["POST"]),
        Route("/v1/completions", functools.partial(answer, kind="text"), methods=["POST"]),
    ]

    async def http_problem(request, error):
        return failed(error.status_code, f"{request.method} {request.url.path}: {error.detail}", headers=error.headers)

    async def fault(request, error):  # of ours; starlette raises it again, so that the log has it
        return failed(500, "a fault of the server; its log says why")

    return Starlette(routes=routes, exception_handlers={HTTPException: http_problem, Exception: fault})


def failed(status: int, message: str, *, headers=None, **fields) -> Reply:
    if status >= 500:
        fields.setdefault("kind", "server_error")
    return Reply(protocol.problem(message, **fields), status_code=status, headers=headers)


def no_model(name, engine):
    message = f"model: got {name!r:.60}; expected one of {', '.join(engine.runs)}."
    return failed(404, message, param="model", code="model_not_found")


def _failure(error) -> Reply:
    if isinstance(error, Full):
        fields = dict(kind="rate_limit_error", code="queue_full", headers={"Retry-After": str(error.retry_after)})
        return failed(429, f"the queue is full; try again in {error.retry_after} s", **fields)
    if isinstance(error, Closing):
        return failed(503, str(error), code="shutting_down", headers={"Retry-After": "10"})
    LOG.error("an answer failed", exc_info=error)
    return failed(500, "the answer failed; the server's log says why")


async def _body(request):
    """Raises InputError where it is no JSON, HTTPException where it is too large."""
    raw = bytearray()
    async for part in request.stream():
        raw += part
        if len(raw) > LARGEST_BODY:
            raise HTTPException(413, f"a body of more than {LARGEST_BODY >> 20} MB")
    try:
        return jsonl.value(bytes(raw))  # as strictly as a row of data: no field twice, no NaN, no half characters
    except jsonl.BadRow as error:
        raise InputError("body", got=error.got, expected=error.expected) from None


async def _pieces(engine: Engine, ask):
    """`(number, Piece)` as they come; raises what the engine says. Left early, the request is cancelled."""
    loop, came = asyncio.get_running_loop(), asyncio.Queue()

    def send(number, piece):
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(came.put_nowait, (number, piece))

    request = Request(ask.model, ask.answers, send)
    engine.submit(request)
    left = len(ask.answers)
    try:
        while left:
            number, piece = await _next(engine, came)
            if isinstance(piece, Exception):
                raise piece
            left -= bool(piece.finish)
            yield number, piece
    finally:
        if left:
            engine.cancel(request)


async def _next(engine: Engine, came: asyncio.Queue):
    """What comes next; `Closing` where the deadline passes before, whatever the engine's thread is busy with."""
    while came.empty():
        if engine.late:
            return 0, Closing()
        with contextlib.suppress(TimeoutError):
            return await asyncio.wait_for(came.get(), LOOK)
    return came.get_nowait()


async def _with(first, pieces):
    """The first piece, which was taken already, and all others."""
    async with contextlib.aclosing(pieces):
        yield first
        async for piece in pieces:
            yield piece


async def _whole(ask, pieces) -> dict:
    """The one response: every choice's pieces together."""
    texts, tokens, finish = ([[] for _ in ask.answers] for _ in range(3))
    async for number, piece in pieces:
        texts[number].append(piece.text)
        tokens[number].extend(piece.tokens)
        finish[number] = piece.finish
    choices = [
        protocol.choice(ask, i, Piece("".join(texts[i]), tuple(tokens[i]), finish[i]), done=True)
        for i in range(len(ask.answers))
    ]
    return protocol.response(ask, choices, usage=protocol.usage(ask))


async def _lines(ask, pieces):
    """The events of a stream: a chunk a piece, perhaps the usage, `[DONE]`. A fault on the way is an event too."""
    chunk = lambda choices, **more: json.dumps(protocol.response(ask, choices, chunk=True, **more))  # noqa: E731
    async with contextlib.aclosing(pieces):
        for i in range(len(ask.answers) if ask.kind == "chat" else 0):
            delta = {"role": "assistant", "content": ""}
            yield chunk([{"index": i, "delta": delta, "logprobs": None, "finish_reason": None}])
        try:
            async for number, piece in pieces:
                if piece.text or piece.finish or (piece.tokens and ask.top is not None):
                    yield chunk([protocol.choice(ask, number, piece, done=False)])
        except Exception as error:  # noqa: BLE001
            yield _failure(error).body.decode()
            return
    if ask.usage:
        yield chunk([], usage=protocol.usage(ask))
    yield "[DONE]"


class Server(uvicorn.Server):
    """uvicorn's, which ends with status 0 on SIGINT and SIGTERM: nothing new is taken, running answers have `grace`
    seconds. Until then it listens, so that clients are told (503). A second signal ends it at once."""

    def __init__(self, engine: Engine, *, host: str, port: int, grace: float = 30.0, started=lambda url: None):
        """`started(url)` is called when it answers."""
        config = uvicorn.Config(
            application(engine), host=host, port=port, log_level="warning", lifespan="off", access_log=False,
            timeout_graceful_shutdown=FLUSH,
        )  # fmt: skip
        super().__init__(config)
        self.engine, self.grace, self.tell = engine, grace, started
        self.ending = False

    @property
    def url(self) -> str:
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"

    async def startup(self, sockets=None):
        await super().startup(sockets)
        if self.started:
            self.tell(self.url)

    def handle_exit(self, number, frame):
        """As uvicorn's, but without a note of the signal, which it would raise again at the end."""
        again, self.ending = self.ending, True
        self.engine.close(0 if again else self.grace)
        if again:
            self.should_exit = self.force_exit = True

    async def on_tick(self, counter):
        """Whether to leave; asked ten times a second."""
        if self.ending and (self.engine.ended or self.engine.late):
            self.should_exit = True
        return await super().on_tick(counter)
