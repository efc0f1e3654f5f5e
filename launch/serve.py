"""Serves runs under the OpenAI API, routed mixtures included: continuous batching, streaming, several runs of one base.

python -m launch.serve --workdir=runs/quickstart [--workdir=runs/mola ...] [--port=8000]
curl http://127.0.0.1:8000/v1/chat/completions -H "Content-Type: application/json"
    -d '{"model": "quickstart", "messages": [{"role": "user", "content": "Translate to French: Save changes"}]}'

The name of a model is that of its run's folder. Whoever reaches the port may ask: it listens on this machine alone
unless --host says otherwise.
"""

import ipaddress
import os
import pathlib
import socket
import sys

from launch import flags
from molora_jax.errors import InputError

FLAGS = [
    ("--workdir", dict(required=True, action="append", metavar="DIR", help="the folder of a run; may be repeated")),
    ("--port", dict(type=int, default=8000, metavar="N", help="0: any that is free (default: 8000)")),
    ("--host", dict(default="127.0.0.1", help="the address to listen on (default: 127.0.0.1, this machine alone)")),
    ("--step", dict(default="best", help="best, latest or a number (default: best)")),
    ("--slots", dict(type=int, default=16, metavar="N", help="answers in the making, of each run (default: 16)")),
    ("--queue", dict(type=int, default=256, metavar="N", help="answers that may wait; more get 429 (default: 256)")),
    (
        "--context",
        dict(type=int, default=0, metavar="N", help="most tokens of prompt and answer (the model's)"),
    ),
    ("--grace", dict(type=float, default=30, metavar="SECONDS", help="for running answers at the end (default: 30)")),
    flags.MESH,
]


def check(args):
    ranges = dict(port=(0, 65535), slots=(1, 1024), queue=(0, 1_000_000), context=(0, 2**31 - 1), grace=(0, 86_400))
    for name, (low, high) in ranges.items():
        if not low <= getattr(args, name) <= high:
            raise InputError(f"--{name}", got=str(getattr(args, name)), expected=f"{low} to {high}")
    if args.context == 1:
        raise InputError("--context", got="1", expected="0 (the model's own), or room for a prompt and its answer")
    if args.config:
        raise InputError("--config", got=args.config, expected="nothing: a run has its own config", fix="Leave it out.")


def names(workdirs) -> list[str]:
    """The folders' names, of which no two may be alike."""
    found = [pathlib.Path(path.partition("@")[0]).expanduser().resolve().name for path in workdirs]
    twice = next((name for name in found if found.count(name) > 1), None)
    if twice:
        raise InputError("--workdir", got=f"two folders called {twice}", expected="folders of different names")
    return found


def loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def bound(host: str, port: int) -> socket.socket:
    """A socket that listens, before anything is loaded: a second server is refused, and whoever asks early waits."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((host, port))
        found.listen()  # a port that is only bound can be bound again until one of the two listens
    except OSError as error:  # also a name that nobody knows
        raise InputError(
            "--port", got=f"{host}:{port}, {error.strerror or error}", expected="a free port of this machine",
            fix="Choose another with --port, or any with --port=0.",
        ) from None  # fmt: skip
    return found


def note(text):
    print(text, file=sys.stderr, flush=True)


def opened(args, ids) -> dict:
    """The runs by name; those of one base share its arrays."""
    from molora_jax.evaluation.run import load_run

    runs, mesh = {}, flags.mesh(args.mesh)
    for name, path in zip(ids, args.workdir, strict=True):
        beside = next(iter(runs.values()), None)
        runs[name] = load_run(path, args.step, mesh=mesh, beside=beside)
    return runs


def run(argv):
    _, args = flags.parse(__doc__, FLAGS, argv, need_config=False)
    check(args)
    ids = names(args.workdir)
    listener = bound(args.host, args.port)  # before jax is imported, which takes seconds
    try:
        from molora_jax.serving.app import Server
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in ("starlette", "uvicorn"):
            raise
        raise InputError(
            "launch.serve", got=f"no package {package}", expected="the packages of the extra `serve`",
            fix='Install them: pip install "molora_jax[serve]", or in a clone: pip install -e ".[serve]".',
        ) from None  # fmt: skip
    from molora_jax import runtime

    runtime.configure()
    from molora_jax.serving.engine import Engine

    engine = Engine(opened(args, ids), slots=args.slots, queue=args.queue, context=args.context)
    note(f"compiling the step of {', '.join(ids)} (seconds to a minute, cached for the next start)")
    engine.warm_up()
    engine.start()
    if not loopback(args.host):
        note(f"--host={args.host}: whoever reaches this address may ask; there is no password")

    def started(url):
        print(f"serving {', '.join(ids)} at {url} (Ctrl-C ends)", flush=True)

    server = Server(engine, host=args.host, port=args.port, grace=args.grace, started=started)
    server.run(sockets=[listener])
    engine.close(0)
    engine.thread.join(timeout=5)
    if engine.thread.is_alive():  # in the midst of a step: nothing else ends a thread that compiles, and nobody waits
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
    return 0


if __name__ == "__main__":
    flags.main(run)
