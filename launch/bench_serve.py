"""Tokens a second of the serving engine: one request after the other, and many at once; `generate` alone beside them.

python -m launch.bench_serve --workdir=runs/mix [--concurrent=16] [--requests=16] [--tokens=64]

What is timed is the engine without HTTP, after each program was compiled. Prompts are all different; answers end at
--tokens or at their own end.
"""

import queue
import time

from launch import flags
from molora_jax.errors import InputError

FLAGS = [
    ("--workdir", dict(required=True, metavar="DIR", help="the folder of a run")),
    ("--concurrent", dict(type=int, default=16, metavar="N", help="slots, and requests at once (default: 16)")),
    ("--requests", dict(type=int, default=16, metavar="N", help="requests of each measurement (default: 16)")),
    ("--alone", dict(type=int, default=4, metavar="N", help="requests one after the other (default: 4)")),
    ("--tokens", dict(type=int, default=64, metavar="N", help="most tokens of an answer (default: 64)")),
]
WORDS = "river stone light paper green house train music water cloud bread night field glass horse winter".split()


def prompt(i: int) -> str:
    return f"Write a long story about a {WORDS[i % 16]} and a {WORDS[i // 16 % 16]}, number {i}."


def rate(engine, name: str, prompts, *, concurrent: int, tokens: int) -> tuple[float, float]:
    """Tokens a second of so many prompts, at most `concurrent` under way at once: by the clock, and by this process's
    own CPU time, which counts what other jobs do not take."""
    from molora_jax.decode.slots import Draw
    from molora_jax.serving.answer import Answer
    from molora_jax.serving.engine import Request

    run, came, made, left = engine.runs[name], queue.Queue(), 0, list(prompts)[::-1]
    requests = [Request(name, [Answer(run, ids, Draw(), most=tokens)], lambda *piece: came.put(piece)) for ids in left]
    clock, under_way = Clock(), 0
    while requests or under_way:
        while requests and under_way < concurrent:
            engine.submit(requests.pop())
            under_way += 1
        _, piece = came.get()
        if isinstance(piece, Exception):
            raise piece
        made, under_way = made + 1, under_way - bool(piece.finish)
    return clock.rate(made)


class Clock:
    def __init__(self):
        self.start = time.perf_counter(), time.process_time()

    def rate(self, count: int) -> tuple[float, float]:
        return count / (time.perf_counter() - self.start[0]), count / (time.process_time() - self.start[1])


def run(argv):
    _, args = flags.parse(__doc__, FLAGS, argv, need_config=False)
    for name in ("concurrent", "requests", "alone", "tokens"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name}", got=str(getattr(args, name)), expected="at least 1")
    from molora_jax import runtime

    runtime.configure()
    from molora_jax.evaluation.run import load_run
    from molora_jax.serving.engine import Engine
    from molora_jax.text import table

    loaded = load_run(args.workdir)
    engine = Engine({"run": loaded}, slots=args.concurrent, queue=args.requests)
    engine.warm_up()
    engine.start()
    every = [loaded.prompt_ids(prompt(i)) for i in range(args.requests)]
    measure = dict(concurrent=args.concurrent, tokens=args.tokens)
    rate(engine, "run", every[: args.concurrent], concurrent=args.concurrent, tokens=args.tokens)  # compiles the rest
    alone = rate(engine, "run", every[: args.alone], concurrent=1, tokens=args.tokens)
    together = rate(engine, "run", every, **measure)
    texts = [prompt(i) for i in range(args.alone)]
    loaded.generate(texts[0], max_new_tokens=args.tokens)
    clock = Clock()
    made = sum(len(loaded.tokenizer.encode(loaded.generate(text, max_new_tokens=args.tokens))) for text in texts)
    rows = [("requests at once", "tokens/s", "times one", "tokens/CPU s", "times one")]
    for name, (by_clock, by_cpu) in {
        "1": alone, str(args.concurrent): together, "1, by generate": clock.rate(made)
    }.items():  # fmt: skip
        rows.append(
            (name, f"{by_clock:.2f}", f"{by_clock / alone[0]:.1f}", f"{by_cpu:.2f}", f"{by_cpu / alone[1]:.1f}")
        )
    print(table(rows, right=(1, 2, 3, 4)))
    engine.close(0)


if __name__ == "__main__":
    flags.main(run)
