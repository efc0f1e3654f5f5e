"""The command `molora` (`python -m molora_jax` is the same): the launchers by name.

    molora train --config=mixlora --workdir=runs/mixlora

A launcher is a file of `launch/` with a function `run(argv)`; nothing lists them. Help loads
neither jax nor a launcher.
"""

import importlib
import sys

import molora_jax
from molora_jax import pipes
from molora_jax.config import shipped
from molora_jax.config.fields import did_you_mean, one_of, wrong


def main(argv=None) -> int:
    return pipes.quietly(lambda: _main(argv))


def _main(argv) -> int:
    argv = sys.argv[1:] if argv is None else argv
    commands = shipped.commands()
    name = argv[0] if argv else "--help"
    if name in ("-h", "--help"):
        print(usage(commands))
        return 0
    if name == "--version":
        print(f"molora_jax {molora_jax.__version__}")
        return 0
    if name not in commands:
        fix = did_you_mean(name, commands) or "See molora --help."
        print(f"error: {wrong('molora', repr(name), one_of(commands), fix)}", file=sys.stderr)
        return 2
    for package in ("configs", "launch"):
        shipped.put_up(package)
    flags = importlib.import_module("launch.flags")
    sys.argv = [f"molora {name}", *argv[1:]]
    return flags.main(importlib.import_module(f"launch.{name}").run)


def usage(commands) -> str:
    """Every command and every shipped config in a line."""
    width = max(map(len, (*commands, *shipped.configs())))

    def lines(files):
        for name, file in files.items():
            yield f"  {name:{width}}  {shipped.summary(file)}"

    return "\n".join([
        "usage: molora COMMAND [--config=NAME or FILE.py] [--config.a.b=value ...] [flags]", "",
        "Fine-tuning language models with mixtures of LoRA experts.", "",
        "commands (molora COMMAND --help lists the flags):", *lines(commands), "",
        "configs that ship (--config=NAME):", *lines(shipped.configs()), "",
        "Every config starts in seconds with --config.base.source=random:tiny --config.train.steps=3.",
    ])  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
