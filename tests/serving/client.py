"""A client of an ASGI application in this process: no sockets, no package."""

import asyncio
import contextlib
import json


class Reply:
    """`status`, `headers` (names in lower case), `parts`: the pieces of the body as they were sent."""

    def __init__(self):
        self.status, self.headers, self.parts = None, {}, []

    @property
    def json(self):
        return json.loads(b"".join(self.parts))

    @property
    def events(self) -> list:
        """Of a stream, without the last, which says that it is done."""
        lines = b"".join(self.parts).decode().strip().split("\n\n")
        assert all(line.startswith("data: ") for line in lines)
        done = lines[-1] == "data: [DONE]"
        return [json.loads(line.removeprefix("data: ")) for line in lines[: len(lines) - done]]


async def send(app, path, body=None, *, method=None, hang_up=None) -> Reply:
    """One request. `hang_up(reply)` is asked after every part of the reply, and once before: True ends the connection
    there."""
    raw = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    reply, gone, asked = Reply(), asyncio.Event(), [{"type": "http.request", "body": raw, "more_body": False}]

    async def receive():
        if asked:
            return asked.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def answer(message):
        if gone.is_set():
            raise OSError("the client is gone")
        if message["type"] == "http.response.start":
            reply.status = message["status"]
            reply.headers = {name.decode().lower(): value.decode() for name, value in message["headers"]}
        elif message.get("body"):
            reply.parts.append(message["body"])
        if hang_up is not None and hang_up(reply):
            gone.set()

    if hang_up is not None and hang_up(reply):
        asyncio.get_running_loop().call_later(0.2, gone.set)
    scope = {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "scheme": "http",
        "method": method or ("GET" if body is None else "POST"), "path": path, "raw_path": path.encode(),
        "query_string": b"", "root_path": "", "headers": [(b"content-type", b"application/json")],
        "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80),
    }  # fmt: skip
    with contextlib.suppress(OSError):
        await app(scope, receive, answer)
    return reply


def ask(app, *requests) -> list[Reply]:
    """All at once; a request is the arguments of `send`, the last of them perhaps a dict of options."""

    async def every():
        return await asyncio.gather(*(
            send(app, *request[:-1], **request[-1]) if isinstance(request[-1], dict) and len(request) == 3
            else send(app, *request) for request in requests
        ))  # fmt: skip

    return asyncio.run(every())
