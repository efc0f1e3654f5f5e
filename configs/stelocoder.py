"""SteloCoder: an expert a source language, then one small gate that tells the language (arXiv 2310.15539).

    python -m launch.train --config=configs/stelocoder.py --workdir=runs/stelocoder

The claim: code translation from several languages by one model that is not told which, nearly as good as the expert of
each. Stage s00 trains the experts on short pairs, each task its own, s01 on whole programs; s02 freezes them and trains
the gate, from the loss of the language model alone. Experts sit at attention and at `down`, the scale is 8. Each
stage has a fresh optimizer and a schedule of its own (`restart`), at the paper's rate for its first epoch.

Translation pairs are yours to give, a file a language and level, the same languages in the same order:

    from configs import stelocoder

    def get_config():
        return stelocoder.get_config(snippets=("jsonl:cpp.jsonl", "jsonl:java.jsonl"),
                                     programs=("jsonl:cpp_long.jsonl", "jsonl:java_long.jsonl"))

Without files five tasks of the mixture stand for five languages, at one level. Outside training one expert is used for
the whole text; in decoding the prompt chooses it (`hard="never"` mixes).

As it stands, with `--config.train.steps=30 --config.train.batch_size=4` (jax 0.10, one CPU core): mean loss of the
first five steps 5.44, of the last five of the experts' stages 4.00; of the gate's first five 4.44, of its last five
4.96. All steps are warm-up here, and the gate's ten show no fall: the batches differ by more than it moves.
"""

from configs import common

STAND_INS = ("morph", "translate", "emoji", "code", "math")
RATES = (9e-5, 5e-5, 5e-5)  # snippets, programs, gate


def stage(tasks, rate, **fields):
    return dict(steps=0, tasks=",".join(tasks), set=dict(optim=dict(learning_rate=rate))) | fields


def get_config(snippets=STAND_INS, programs=()):
    """`snippets`, `programs`: tasks of each language, short ones and long ones (the latter may be left out)."""
    config = common.get_config()
    # expert e is that of the tasks whose place is e, modulo the number of experts: so both levels of a language meet
    config.data.tasks = ",".join((*snippets, *programs))
    config.method.rules = dict(
        mix=common.rule(
            f"{common.ATTENTION},down",
            experts=str(len(snippets)),
            adapter=common.adapter(rank=4, alpha=32.0),
            router=dict(name="sequence_gate", share="model", init="kaiming", hard="eval", pool_padding=False),
        )
    )
    config.optim.update(dict(restart=True, decay="cosine", warmup=10, weight_decay=0.05))
    experts = dict(freeze="*/router/*", route="task")
    config.schedule = dict(
        s00=stage(snippets, RATES[0], **experts),
        s01=stage(programs or snippets, RATES[1], **experts),
        s02=stage((), RATES[2], freeze="*/A,*/B", route=""),
    )
    return config
