"""Answers a prompt with a trained run, or with the frozen base alone. Standard output is the text, nothing else.

python -m launch.generate --workdir=runs/quickstart --prompt="A sad film. Positive or negative?"
python -m launch.generate --base --prompt="What is the capital of France?" [--config.base.source=...]
python -m launch.generate --workdir=runs/quickstart --messages=talk.json --temperature=0.7 --top_p=0.9 --stop="User:"

The file of --messages is JSON: a list of turns {"role": "user", "content": "..."}, the one to answer last, or an object
with such a list as "messages" and perhaps "tools".
"""

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
    from molora_jax.data.jsonl import BadRow, kind, value
    from molora_jax.data.turns import read_messages as read_turns
    from molora_jax.data.turns import read_tools

    where, expected = f"--messages={path}", 'a list of {"role": ..., "content": ...}, or {"messages": [...]}'
    try:
        raw = plain(pathlib.Path(path).expanduser()).read_bytes()
    except OSError as error:
        raise InputError(where, got=error.strerror or str(error), expected="a readable file") from None
    try:  # as rows of data are read
        found = value(raw)
        if not isinstance(found, (dict, list)):
            raise BadRow(f"a JSON {kind(found)}", expected)
        found = {"messages": found} if isinstance(found, list) else found
        unknown = sorted(found.keys() - {"messages", "tools"})
        if unknown or not found.get("messages"):
            got = f"unknown fields {', '.join(unknown)}"[:80] if unknown else "no turn"
            raise BadRow(got, expected)
        tools = read_tools(found.get("tools"))
        return read_turns(found["messages"], "messages")[0], tools and list(tools)
    except BadRow as error:
        raise InputError(where, got=error.got, expected=error.expected) from None


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
    try:
        text = loaded.generate(
            prompt, max_new_tokens=args.max_new_tokens, temperature=args.temperature, top_p=args.top_p,
            top_k=args.top_k, min_p=args.min_p, repetition_penalty=args.repetition_penalty, stop=args.stop,
            seed=args.seed, cache=not args.no_cache, tools=tools,
        )  # fmt: skip
    except InputError as error:
        if args.messages is None or error.where not in ("prompt", "tools"):
            raise
        got = error.got.replace("prompt[", "messages[")
        raise InputError(f"--messages={args.messages}", got=got, expected=error.expected, fix=error.fix) from None
    print(text)


if __name__ == "__main__":
    flags.main(run)
