"""K-shot experts: a top-2 mixture of LoRAs that a few examples picked, tuned on data that they picked (2408.15915).

    python -m experiments.kshot_experts --rows=FILE.jsonl --workdir=runs/kshot      # picks LoRAs and data, then tunes
    python -m launch.train --config=configs/kshot_experts.py --workdir=runs/kshot_experts

The claim: K labelled examples of a task (5 to 50) are enough to make an expert of it out of open LoRAs and open data,
where LoRAs are picked by how probable they find the examples' reasoning and by how little they resemble each other, and
data by likeness to the examples. This file is the last step alone: at q and v of each layer a gate of its own, the two
best of four experts, renormalised, no balance loss. The four start from LoRAs of ours and train with the gates:

    from configs import kshot_experts

    def get_config():
        return kshot_experts.get_config(load=("runs/a", "runs/b", "runs/c", "runs/d"))

`gate_only=True` trains the gates alone. Without `load` experts start fresh, at A ~ N(0, 0.01^2) and B = 0, and the rate
is 2e-3, as the paper's 5e-5 is for finished LoRAs: 30 steps of it moved no loss that started there. Loaded LoRAs
keep their own alpha / R (the code leaves it out, which is right where both are 16, as here).

As it stands, with `--config.train.steps=30 --config.train.batch_size=4` (jax 0.10, two CPU cores): mean loss of the
first five steps 5.08, of the last five 2.82.

Measured with `python -m experiments.kshot_experts.trial --steps=200 --tune_steps=60 --seeds=2` (four layers, a bank of
eight, K = 10): perplexity tells the two true experts from the six others in both seeds (at most 1.9, at least 37),
exact answers do not; the least alike group ends at a held-out NLL of 0.52, the most alike at 0.48, one LoRA at 0.44.
"""

from configs import common


def get_config(load=(), gate_only=False, rank=16):
    """`load`: workdirs of runs of plain adapters of at most this rank, an expert each."""
    config = common.get_config()
    fresh = dict(name="gaussian", std=0.01)
    config.method.rules = dict(
        mix=common.rule(
            "q,v",
            experts=str(len(load) or 4),
            load=tuple(load),
            loaded="frozen" if gate_only else "trained",
            adapter=common.adapter(rank=rank, alpha=float(rank), init="kaiming" if load else fresh),
            router=dict(name="softmax_topk", k=2, renormalise=True, share="site", init="kaiming"),
        )
    )
    config.optim.update(learning_rate=5e-5 if load else 2e-3, warmup=5)
    return config
