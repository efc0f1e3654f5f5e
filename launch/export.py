"""Writes a run as files that other programs read: peft, vLLM, SGLang, MixLoRA, transformers, llama.cpp.

python -m launch.export --workdir=runs/lora --format=peft --out=exported/lora [--step=best|latest|N]

Formats: peft, vllm, sglang, mixlora, molora (any run, and a torch file that runs it), merged, gguf: docs/export.md.
"""

import sys

from launch import flags

FLAGS = [
    ("--workdir", dict(required=True, metavar="DIR", help="the folder of a run")),
    ("--format", dict(required=True, help="peft, vllm, sglang, mixlora, molora, merged or gguf")),
    ("--out", dict(required=True, metavar="DIR", help="the new folder: not there yet, or empty")),
    ("--step", dict(default="best", help="best, latest or a number (default: best)")),
]


def run(argv):
    _, args = flags.parse(__doc__, FLAGS, argv, need_config=False)
    from molora_jax import runtime

    runtime.configure()
    from molora_jax.export.perform import perform

    note = lambda text: print(f"note: {text}", file=sys.stderr, flush=True)  # noqa: E731
    print(perform(args.workdir, args.format, args.out, step=args.step, note=note))


if __name__ == "__main__":
    flags.main(run)
