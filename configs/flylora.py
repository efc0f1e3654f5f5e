"""FlyLoRA: a frozen sparse random A chooses which ranks of one LoRA act; B alone trains (arXiv 2510.08396).

    python -m launch.train --config=configs/flylora.py --workdir=runs/flylora

The claim: with no router to train and A's that hardly overlap, tasks disturb each other less, in one adapter and after
merging. Values of the script: all seven projections, 32 ranks (`experts="32"`, rank 1), 8 active, density 8/32, alpha
64 over the total rank (alpha = 64 / 32 = 2 at rank 1), no dropout, bias rate 1e-3. Where text and code differ:
`select="abs"` is the paper's text (the package: `select=signed`), `input_grad=True` is the gradient of what is computed
(the package sends none: `adapter.input_grad=False`). A row has round(density D) entries, not D // (r // k). Not as
there: the load bias moves once a step, by the whole batch without padding, never in evaluation. `seed` and `density` of
adapter and router are one matrix: change both, or the config is refused. Runs of one seed share A, so the mean of their
B's is the mean of their changes where the same ranks act.

As it stands, with `--config.train.steps=30 --config.train.batch_size=4` (jax 0.10, two CPU cores): mean loss of the
first five steps 5.28, of the last five 3.29. The busiest rank of a site is chosen 1.5 to 4 times as often as the mean
(4 is every time), at the last step as at the first: 30 steps of u = 1e-3 move no bias far.
"""

from configs import common


def get_config():
    config = common.get_config()
    config.method.rules = dict(
        all=common.rule(
            f"{common.ATTENTION},{common.FFN}",
            experts="32",
            adapter=common.adapter(
                "lora_sparse_a", rank=1, alpha=2.0, dropout=0.0, density=0.25, seed=0, input_grad=True
            ),
            router=dict(
                name="sparse_projection", k=8, density=0.25, seed=0, select="abs", bias_rate=1e-3, share="site"
            ),
        )
    )
    return config
