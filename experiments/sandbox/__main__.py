"""Pretrains the base `sandbox:6m`: corpus, tokenizer, a decoder of 5.6 million parameters, what it came to.

python -m experiments.sandbox [--steps=4800] [--decay=1200] [--rows=8] [--workdir=runs/sandbox] [--sources=all|a,b]
    [--items=100] [--pin]

Stop it whenever you like: the same command goes on. A steady learning rate for --steps, then a linear decay to zero
over --decay steps, of --rows rows of 256 tokens each. The base goes to WORKDIR/6m, to be used as dir:WORKDIR/6m;
results.json, results.md and results.png say its loss on held-out documents, beside bigrams and trigrams of the same
tokens. --pin makes it the one that ships (`sandbox:6m`), for those who change this repository.
"""

import json
import pathlib
import shutil

import numpy as np
import tokenizers

from configs import common
from experiments.sandbox import corpus, pretrain, report, text
from experiments.sandbox.ngrams import KneserNey
from launch import flags
from molora_jax.evaluation.progress import Phases
from molora_jax.io import fetch, sandbox
from molora_jax.io.files import write_atomically
from molora_jax.io.parts import whole_folder
from molora_jax.runs.workdir import Workdir

FLAGS = [
    ("--steps", dict(type=int, default=4800, help="optimizer steps at the full learning rate")),
    ("--decay", dict(type=int, default=1200, help="optimizer steps in which the learning rate falls to zero")),
    ("--rows", dict(type=int, default=8, help=f"rows a step, of {text.LENGTH} tokens")),
    ("--rate", dict(type=float, default=2e-3, help="learning rate")),
    ("--sources", dict(default="all", help="all, or some of " + ", ".join(corpus.SOURCES))),
    ("--items", dict(type=int, default=100, help="held-out rows a source that are scored")),
    ("--workdir", dict(default="runs/sandbox", metavar="DIR", help="corpus, checkpoints, and the base in DIR/6m")),
    ("--out", dict(default="experiments/sandbox", metavar="DIR", help="holds results.json, .md and .png")),
    ("--pin", dict(action="store_true", help="make the base the one that ships as sandbox:6m")),
]
NAME = "6m"
HELDOUT = pathlib.Path(__file__).parent / "heldout.jsonl"  # goes with the base that ships
SETTING, TOKENIZER = "corpus.json", "tokenizer.json"
PROMPTS = ("In the beginning", "dog, domestic dog:", "Climate:", "Return the number of", "And the king said unto")


def main(argv):
    _, args = flags.parse(__doc__, FLAGS, argv, need_config=False)
    for name in ("steps", "decay", "rows", "items"):
        if getattr(args, name) < 1:
            raise flags.wrong(f"--{name}", getattr(args, name), "at least 1")
    sources = chosen(args.sources)
    folder = pathlib.Path(args.workdir).absolute()
    with Workdir(folder):
        listed, tokenizer, entries = prepared(folder, sources)
        base = folder / NAME
        if not (base / sandbox.WEIGHTS).is_file() and not pretrained(folder, tokenizer, entries, args):
            return 0
        if args.pin:
            pin(base)
            text.write_heldout(entries["valid"], tokenizer, HELDOUT)
        if not (kept := sandbox.cached(NAME, digests(base)[sandbox.WEIGHTS])).exists():
            with whole_folder(kept) as part:
                shutil.copytree(base, part, dirs_exist_ok=True)
        setting = dict(steps=args.steps, decay=args.decay, rows=args.rows, rate=args.rate, items=args.items)
        found = dict(setting=setting, corpus=listed, sha256=digests(base), curve=report.curve(folder))
        found |= measured(base, entries, args.items)
        report.write(args.out, found)
    print(f"the base: dir:{base}" + (" (sandbox:6m)" if digests(base) == pinned() else ""))
    return 0


def chosen(names: str) -> list[str]:
    found = list(corpus.SOURCES) if names == "all" else [name.strip() for name in names.split(",")]
    for name in found:
        if name not in corpus.SOURCES:
            near = flags.did_you_mean(name, corpus.SOURCES)
            raise flags.wrong("--sources", repr(name), "all, or names among " + ", ".join(corpus.SOURCES), near)
    return [name for name in corpus.SOURCES if name in found]


def prepared(folder: pathlib.Path, sources: list[str]):
    """`(the corpus as it is listed, tokenizer, entries of data.tasks and data.valid)`, made once.

    Raises:
      InputError: the folder holds those of other sources.
    """
    note = folder / SETTING
    if not note.is_file():
        found = corpus.documents(sources)
        tokenizer = text.trained_tokenizer(part for docs in found.values() for _, part, held in docs if not held)
        entries = text.write_rows(found, tokenizer, folder / "rows")
        tokenizer.inner.save(str(folder / TOKENIZER))
        write_atomically(note, json.dumps(dict(corpus=corpus.listed(found), entries=entries), indent=1) + "\n")
    kept = json.loads(note.read_text(encoding="utf-8"))
    if list(kept["corpus"]) != sources:
        raise flags.wrong(
            "--sources", ",".join(sources), f"{','.join(kept['corpus'])}, as in {folder}", "Or another --workdir."
        )
    inner = tokenizers.Tokenizer.from_file(str(folder / TOKENIZER))
    return kept["corpus"], text.as_tokenizer(inner), kept["entries"]


def pretrained(folder, tokenizer, entries, args) -> bool:
    """Two runs, a steady rate and its fall to zero from where the first one ended; whether both are at their end."""
    start, same = pretrain.start(folder / "start", tokenizer), dict(rows=args.rows, rate=args.rate)
    steady = pretrain.config(start, entries, steps=args.steps, decay="constant", **same)
    if not pretrain.trained(steady, folder / "steady"):
        return False
    decay = pretrain.config(
        start, entries, steps=args.decay, decay="linear", init_from=folder / "steady", **same
    )  # fmt: skip
    if not pretrain.trained(decay, folder / "decay"):
        return False
    pretrain.write(folder / "decay", folder / NAME)
    return True


def digests(folder) -> dict[str, str]:
    return {path.name: fetch.file_sha256(path) for path in sorted(pathlib.Path(folder).iterdir())}


def pinned() -> dict[str, str]:
    return json.loads(sandbox.PINNED.read_text(encoding="utf-8")).get(NAME, {}) if sandbox.PINNED.is_file() else {}


def pin(base: pathlib.Path):
    """Puts a base in the place of the one that ships."""
    with pretrain.replaced(sandbox.HERE / NAME) as part:
        shutil.copytree(base, part, dirs_exist_ok=True)
    write_atomically(sandbox.PINNED, json.dumps({NAME: digests(base)}, indent=1) + "\n")


def measured(base: pathlib.Path, entries: dict, items: int) -> dict:
    """`nll`: {source: {model: nats a token}} on the same held-out rows, `samples`: {prompt: text}."""
    from molora_jax.evaluation.run import load_base_run
    from molora_jax.evaluation.score import score

    config = common.get_config()
    config.base.source = f"dir:{base}"
    config.data.update(tasks=entries["train"], valid=entries["valid"], raw=True, seq_len=text.LENGTH, test_share=0.0)
    config.eval.update(num_generated=0)
    run = load_base_run(config)
    examples = run.data.heldout("valid", items)
    nll = {"base": score(run, examples, base=True, phases=Phases()).nll}
    train = run.data.splits["train"]
    rows = [train.tokens(i) for i in range(len(train.length))]
    for name, order in (("bigram", 2), ("trigram", 3)):
        model = KneserNey(rows, order=order, vocabulary=run.tokenizer.vocab_size)
        nll[name] = np.array([model.nll(example.ids).sum() for example in examples])
    tokens = np.array([len(example.ids) - 1 for example in examples])
    task = np.array([example.task for example in examples])
    table = {}
    for source in dict.fromkeys(task):
        here = task == source
        table[str(source)] = {name: round(float(x[here].sum() / tokens[here].sum()), 4) for name, x in nll.items()}
        table[str(source)]["tokens"] = int(tokens[here].sum())
        texts = [run.text(list(example.ids)[1:]) for example in examples if example.task == source]
        table[str(source)]["bytes"] = sum(len(part.encode()) for part in texts)
    samples = {prompt: run.generate(prompt, max_new_tokens=40, temperature=0.7, seed=0) for prompt in PROMPTS}
    return dict(nll=table, samples=samples)


if __name__ == "__main__":
    flags.main(main)
