"""Chat templates as transformers renders them, and the loop of the process that renders those of strangers.

The file is also run as a script, by `templates.py`: it imports jinja2 and the standard library only. Requests and
answers are frames on standard input and output: 8 bytes of length, then JSON. A request is `{"template", "day",
"count", "careful"}` and so many conversations, a frame each: the template's variables. Each is answered by a frame,
`{"text", "spans"}` or `{"error"}`. The first frame says that the process is ready.

The environment is the one of transformers 5.24 (`utils/chat_template_utils.py`): the immutable sandbox, its whitespace
rules, `{% generation %}`, loop controls, `tojson`, `strftime_now`, `raise_exception`, and `dict` and `namespace`
without a way to Python's internals.
"""

import contextlib
import datetime
import functools
import json
import os
import signal
import sys
import time

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.runtime
import jinja2.sandbox
import jinja2.utils

SECONDS = 10  # of one rendering
MEMORY = 512 << 20  # bytes of the process
OUTPUT = 10_000_000  # characters of one rendering

_THOUGHTS = ("reasoning_content", "thinking", "reasoning")  # names of a turn's reasoning; templates read the first


class TooLong(Exception):
    pass


class Generation(jinja2.ext.Extension):
    """`{% generation %} ... {% endgeneration %}` around what the model writes: its spans are recorded."""

    tags = {"generation"}

    def __init__(self, environment):
        super().__init__(environment)
        environment.extend(track=None)  # (blocks so far, spans) during a rendering

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_record"), [], [], body).set_lineno(line)

    def _record(self, caller):
        text = caller()
        blocks, spans = self.environment.track
        start = blocks.length
        spans.append((start, start + len(text)))
        return text


class _Blocks(list):
    """The text so far, in pieces, with its length."""

    length = 0

    def add(self, block):
        self.append(block)
        self.length += len(block)
        if self.length > OUTPUT:
            raise TooLong(f"more than {OUTPUT:,} characters of text")


class _Dict:
    """`dict(...)` in a template, without the attributes of the type."""

    def __call__(self, *args, **kwargs):
        return dict(*args, **kwargs)

    def fromkeys(self, *args, **kwargs):
        return dict.fromkeys(*args, **kwargs)


class _Namespace(jinja2.utils.Namespace):
    """`namespace(...)` that stores no names with an underscore in front."""

    def __init__(*args, **kwargs):
        self, args = args[0], args[1:]  # so that `namespace(self=...)` works
        names = dict(*args, **kwargs)
        for name in names:
            _Namespace._check(name)
        jinja2.utils.Namespace.__init__(self, names)

    def __setitem__(self, name, value):
        _Namespace._check(name)
        jinja2.utils.Namespace.__setitem__(self, name, value)

    @staticmethod
    def _check(name):
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace cannot store {name!r}")


def _refuse(message):
    raise jinja2.exceptions.TemplateError(message)


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _moment(day):
    """`day`: ISO text, read as its midnight; None is now."""
    return datetime.datetime.fromisoformat(day) if day else datetime.datetime.now()


@functools.lru_cache(maxsize=16)
def _compile(template: str, day: str | None):
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals.update(
        raise_exception=_refuse, strftime_now=lambda form: _moment(day).strftime(form), dict=_Dict(),
        namespace=_Namespace,
    )  # fmt: skip
    return environment.from_string(template)


def _turn(turn: dict) -> dict:
    """A turn as transformers hands it to a template: no nulls, and reasoning under each name that templates read."""
    turn = {key: value for key, value in turn.items() if value is not None}
    thoughts = next((turn[name] for name in _THOUGHTS if name in turn), None)
    return turn if thoughts is None else {"thinking": thoughts, **turn, "reasoning_content": thoughts}


def render(template: str, day: str | None, variables: dict) -> tuple[str, list]:
    """`(text, spans)`: spans are the `[start, end)` characters of the `{% generation %}` blocks.

    Raises whatever the template raises: it is foreign code.
    """
    compiled = _compile(template, day)
    blocks, spans = _Blocks(), []
    compiled.environment.track = (blocks, spans)
    variables = {"tools": None, "documents": None, **variables}
    variables["messages"] = [_turn(turn) for turn in variables["messages"]]
    for block in compiled.generate(variables):
        blocks.add(block)
    return "".join(blocks), spans


def attempt(template: str, day: str | None, variables: dict) -> dict:
    """`render` as an answer of the protocol."""
    try:
        text, spans = render(template, day, variables)
        return {"text": text, "spans": spans}
    except Exception as error:  # noqa: BLE001 - the template is foreign code and can raise anything
        with contextlib.suppress(Exception):  # its text may be unreadable too
            return {"error": f"{type(error).__name__}: {error}"[:500]}
        return {"error": type(error).__name__}


def dumps(value) -> bytes:
    """JSON. Half surrogate pairs pass, as ASCII."""
    return json.dumps(value).encode()


def frame(raw: bytes) -> bytes:
    return len(raw).to_bytes(8, "little") + raw


def _limit():
    # A rendering that never ends, or a parent that is gone: the alarm ends the process, inside C code too.
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    try:
        import resource
    except ImportError:  # not on Windows: there the parent's clock alone
        return
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _read(source) -> bytes:
    """The next frame, empty at the end."""
    return source.read(int.from_bytes(source.read(8), "little"))


def _serve(source, sink):
    """Answers are sent in groups of 20 ms (a send each costs as much as the rendering), the first one alone."""
    alarm = getattr(signal, "alarm", lambda seconds: None)
    while head := _read(source):
        request, sent = json.loads(head), 0.0
        for conversation in [_read(source) for _ in range(request["count"])]:
            alarm(SECONDS + 2)
            try:
                answer = attempt(request["template"], request["day"], json.loads(conversation))
            except (ValueError, RecursionError) as error:
                answer = {"error": f"{type(error).__name__}: {error}"}
            try:
                raw = dumps(answer)
            except MemoryError:
                raw = dumps({"error": "MemoryError: "})
            sink.write(frame(raw))
            now = time.monotonic()
            if now - sent > 0.02 or request["careful"]:
                sink.flush()
                sent = now
        sink.flush()
        alarm(0)


if __name__ == "__main__":
    _limit()
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # nothing else writes between the frames
    with contextlib.suppress(BrokenPipeError):
        out.write(frame(dumps("ready")))
        out.flush()
        _serve(sys.stdin.buffer, out)
    os._exit(0)
