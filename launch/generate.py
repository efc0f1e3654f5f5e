"""Answers a prompt with a trained run, or with the frozen base alone. Standard output is the text, nothing else.

python -m launch.generate --workdir=runs/quickstart --prompt="A sad film. Positive or negative?"
python -m launch.generate --base --prompt="What is the capital of France?" [--config.base.source=...]
"""

from launch import flags
from molora_jax.errors import InputError

FLAGS = [
    ("--workdir", dict(metavar="DIR", help="the folder of a run")),
    ("--base", dict(action="store_true", help="the base model alone, in place of --workdir")),
    ("--prompt", dict(required=True, metavar="TEXT", help="the user's turn of a chat")),
    ("--step", dict(default="best", help="best, latest or a number (default: best)")),
    ("--max_new_tokens", dict(type=int, default=64, metavar="N", help="most tokens of the answer (default: 64)")),
    ("--temperature", dict(type=float, default=0.0, metavar="T", help="0 takes the likeliest token (default)")),
    ("--seed", dict(type=int, default=0, metavar="N", help="of the draws at a temperature above 0")),
    ("--no_cache", dict(action="store_true", help="recompute everything for each token (slow, the same answer)")),
]


def check(args):
    if bool(args.workdir) == args.base:
        got = "both --workdir and --base" if args.base else "neither --workdir nor --base"
        raise InputError("command line", got=got, expected="one of them")
    if args.base and args.step != "best":
        raise InputError("--step", got=args.step, expected="nothing: the base has no steps", fix="Leave it out.")
    if args.workdir and args.config:
        raise InputError("--config", got=args.config, expected="nothing: a run has its own config", fix="Leave it out.")
    if not args.prompt.strip():
        raise InputError("--prompt", got=repr(args.prompt), expected="some text")


def default_config(args):
    check(args)
    if args.workdir:
        from molora_jax.evaluate.saved import read_config, without_inputs

        return without_inputs(read_config(args.workdir))
    from configs.common import get_config

    return get_config()


def run(argv):
    config, args = flags.parse(__doc__, FLAGS, argv, need_config=False, defaults=default_config)
    check(args)
    from molora_jax import runtime

    runtime.configure()
    from molora_jax.evaluate.run import load_base_run, load_run

    loaded = load_base_run(config) if args.base else load_run(args.workdir, args.step, config=config)
    text = loaded.generate(
        args.prompt, max_new_tokens=args.max_new_tokens, temperature=args.temperature, seed=args.seed,
        cache=not args.no_cache,
    )  # fmt: skip
    print(text)


if __name__ == "__main__":
    flags.main(run)
