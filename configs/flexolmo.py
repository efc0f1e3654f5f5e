"""FlexOlmo: experts that data owners train apart, joined without joint training, each left out at will (2507.07024).

    python -m launch.train    --config=configs/flexolmo.py --workdir=runs/flexolmo
    python -m launch.evaluate --workdir=runs/flexolmo --config.eval.without=code,math

The claim: owners who share no data train an expert each next to the same frozen base and its frozen row in the router;
the experts and their rows are then put together, without a further step, and any of them can be left out in use.

As it stands six tasks of the mixture are six owners and three are public, whose documents give the base's row. All
owners are in one run, but a token sees the base and the expert of its task alone (`route="apart"`), so no owner's data
reach another's leaves. Owners who are really apart have a run each, with a config file of their own:

    from configs import flexolmo

    def get_config():                                         # and the same with math
        return flexolmo.get_config(owners=("code",))

    def get_config():                                         # of --config.train.steps=1: nothing trains
        return flexolmo.get_config(load=("runs/code", "runs/math"))

`load` takes plain LoRA runs as well, whose rows then start from documents (`documents=32`, `owners` in the order of
`load`); `tune=True` trains the rows of the joined run, the paper's router tuning. Without `load` experts start fresh.

Experts are LoRA on whole feed-forward blocks, not FFNs; a document's embedding is the base's own. The base normalises
before its blocks, so gates are renormalised (off as published). `--config.method.rules.ffn.router.top_k=5` keeps five
of seven, the base among them.

As it stands, with `--config.train.steps=30 --config.train.batch_size=4 --config.method.rules.ffn.router.documents=8`
(jax 0.10, two CPU cores): mean `lm_loss` of the first five steps 5.15, of the last five 3.09.

Measured with `python -m experiments.flexolmo --steps=150 --seeds=2` (four layers, three owners, two seeds):
held-out NLL over the owners' domains 2.57 joined, 3.67 of the base, 2.70 of averaged LoRAs, 2.67 of their ensemble;
an owner left out takes its domain back to about the base's loss (morph, code) or above it (math). Rows that start at
random join as well as those from documents.
"""

from configs import common

OWNERS = ("morph", "translate", "emoji", "factbook", "code", "math")
PUBLIC = ("sentiment", "topic", "dialog")


def get_config(owners=OWNERS, public=PUBLIC, load=(), documents=0, tune=False):
    """`load`: workdirs of owners' runs or, with `documents` above 0, of plain LoRA runs of rank at most 16."""
    config = common.get_config()
    config.data.tasks = ",".join((*owners, *public))
    config.method.rules = dict(
        ffn=common.rule(
            "ffn",
            experts=str(len(load) or len(owners)),
            load=tuple(load),
            adapter=common.adapter(rank=16, alpha=32.0),
            router=dict(
                name="document_rows", share="ffn", top_k=0, renormalise=True, public=",".join(public), scale=1.0,
                documents=documents if load else 32, bias=True, merge_bias="drop",
            ),
        )
    )  # fmt: skip
    config.losses = dict(z_loss=dict(weight=1e-3))
    frozen = "*/router/*" if load and not tune else ""
    config.schedule.s00.update(tasks=",".join(owners), freeze=frozen, route="" if load else "apart")
    return config
