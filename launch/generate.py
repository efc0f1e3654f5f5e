"""Answers a prompt with a trained run, or with the frozen base alone. Standard output is the text, nothing else.

python -m launch.generate --workdir=runs/quickstart --prompt="A sad film. Positive or negative?"
python -m launch.generate --base --prompt="What is the capital of France?" [--config.base.source=...]
python -m launch.generate --workdir=runs/quickstart --messages=talk.json --temperature=0.7 --top_p=0.9 --stop="User:"

The file of --messages is JSON: a list of turns {"role": "user", "content": "..."}, the one to answer last, or an object
with such a list as "messages" and perhaps "tools".
"""

import json
import pathlib

from launch import flags
from molora_jax.errors import InputError
from molora_jax.io.files import plain

FLAGS = [
    ("--workdir", dict(metavar="DIR", help="the folder of a run")),
    ("--base", dict(action="store_true", help="the base model alone, in place of --workdir")),
    ("--prompt", dict(metavar="TEXT", help="the user's turn of a chat")),
    ("--messages", dict(metavar="FILE.json", help="a conversation to answer, in place of --prompt")),
    ("--step", dict(default="best", help="best, latest or a number (default: best)")),
    ("--max_new_tokens", dict(type=int, default=64, metavar="N", help="most tokens of the answer (default: 64)")),
    ("--temperature", dict(type=float, default=0.0, metavar="T", help="0 takes the likeliest token (default)")),
    ("--top_p", dict(type=float, default=1.0, metavar="P", help="draw among the likeliest of this mass (1 is off)")),
    ("--top_k", dict(type=int, default=0, metavar="K", help="draw among so many of the likeliest (0 is off)")),
    ("--min_p", dict(type=float, default=0.0, metavar="P", help="leave out what is less likely than P times the best")),
    ("--repetition_penalty", dict(type=float, default=1.0, metavar="X", help="above 1: fewer repeats (1 is off)")),
    ("--stop", dict(action="append", default=[], metavar="TEXT", help="end the answer before TEXT; may be repeated")),
    ("--seed", dict(type=int, default=0, metavar="N", help="of the draws at a temperature above 0")),
    ("--no_cache", dict(action="store_true", help="recompute everything for each token (slow, the same answer)")),
    flags.MESH,
]


def check(args):
    if bool(args.workdir) == args.base:
        got = "both --workdir and --base" if args.base else "neither --workdir nor --base"
        raise InputError("command line", got=got, expected="one of them")
    if args.base and args.step != "best":
        raise InputError("--step", got=args.step, expected="nothing: the base has no steps", fix="Leave it out.")
    if args.workdir and args.config:
        raise InputError("--config", got=args.config, expected="nothing: a run has its own config", fix="Leave it out.")
    if (args.prompt is None) == (args.messages is None):
        got = "neither --prompt nor --messages" if args.prompt is None else "both --prompt and --messages"
        raise InputError("command line", got=got, expected="one of them")
    if args.prompt is not None and not args.prompt.strip():
        raise InputError("--prompt", got=repr(args.prompt), expected="some text")
    if "" in args.stop:
        raise InputError("--stop", got="''", expected="some text")


def read_messages(path) -> tuple[list, list | None]:
    """(turns, tools) of a file.

    Raises:
      InputError: it cannot be read, or holds no conversation.
    """
    where, expected = f"--messages={path}", 'JSON: a list of {"role": ..., "content": ...}, or {"messages": [...]}'
    try:
        value = json.loads(plain(pathlib.Path(path).expanduser()).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise InputError(where, got=error.strerror or str(error), expected="a readable file") from None
    except (ValueError, RecursionError) as error:
        raise InputError(where, got=f"no JSON ({error})"[:200], expected=expected) from None
    value = value if isinstance(value, dict) else {"messages": value}
    turns, tools, unknown = value.get("messages"), value.get("tools"), value.keys() - {"messages", "tools"}
    lists = isinstance(turns, list) and turns and (tools is None or isinstance(tools, list))
    if unknown or not lists or not all(isinstance(item, dict) for item in [*turns, *(tools or [])]):
        got = f"unknown fields {', '.join(sorted(unknown))}" if unknown else repr(value.get("messages", value))
        raise InputError(where, got=got[:80], expected=expected)
    return turns, tools


def default_config(args):
    check(args)
    if args.workdir:
        from molora_jax.runs.saved import read_config, without_inputs

        return without_inputs(read_config(args.workdir))
    from configs.common import get_config

    return get_config()


def run(argv):
    config, args = flags.parse(__doc__, FLAGS, argv, need_config=False, defaults=default_config)
    check(args)
    mesh = flags.mesh(args.mesh)
    prompt, tools = (args.prompt, None) if args.messages is None else read_messages(args.messages)
    from molora_jax import runtime

    runtime.configure()
    from molora_jax.evaluation.run import load_base_run, load_run

    loaded = (
        load_base_run(config, mesh=mesh) if args.base else load_run(args.workdir, args.step, config=config, mesh=mesh)
    )
    text = loaded.generate(
        prompt, max_new_tokens=args.max_new_tokens, temperature=args.temperature, top_p=args.top_p, top_k=args.top_k,
        min_p=args.min_p, repetition_penalty=args.repetition_penalty, stop=args.stop, seed=args.seed,
        cache=not args.no_cache, tools=tools,
    )  # fmt: skip
    print(text)


if __name__ == "__main__":
    flags.main(run)
