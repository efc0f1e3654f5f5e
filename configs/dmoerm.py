"""DMoERM: a reward model a category, which fuses experts of single capabilities (arXiv 2403.01197).

    python -m launch.train --config=configs/dmoerm.py --workdir=runs/dmoerm

The claim: preferences are noisy and mean different things in different categories; a reward that is composed of
capabilities, of the right category, agrees with people more than one reward for all, and best-of-N exploits it less.
Three phases: s00 trains a reward for each category on 60 percent of the prompts; s01 an expert for each capability
point, on labels of that point, whose head begins as the category's; s02 freezes both and trains, on the other 40
percent, the two linear maps and the PReLU that make one reward of the points' hidden states.

Rows of your own: pairs (prompt, chosen, rejected) of a task for each category and one for each point, in one file or
several (`molora_jax/data/pairs.py`: rankings as pairs, a judge that is asked twice):

    from configs import dmoerm

    def get_config():
        return dmoerm.get_config(("chat:chat.empathy", "chat:chat.logic", "code:code.style"), "jsonl:pairs.jsonl")

Without rows two tasks of the mixture stand for two categories, each its own one point. The category of an answer is
that of its rows; of new prompts a run of `classify` says it, and `molora_jax/evaluation/rewards.py` gives rewards and
the best of N (experiments/dmoerm has all of it).

Not as there: phase 1 trains a LoRA a category at all projections where the paper trains a language model each (that
would be a run without rules, `method.train_base=all`, whose merged base this config takes); the chat template stands
for its markers; the rates are those of LoRA on a small base. Of its code, which scores the worse answer as right,
starts from random weights, trains on 30 percent, leaves dropout on in s02 and never trains the points' heads, nothing
is copied; the last two are options: leave `set` out of s02, and put `modules/*/points` into `freeze` of s01.

As it stands, with `--config.train.steps=30 --config.train.batch_size=4` (jax 0.10, two crowded CPU cores; two to six
pairs a step): mean loss of the first five and the last five of each phase's ten steps 0.75 and 0.67, 0.88 and 0.68,
0.71 and 0.67 (log 2 is 0.69). On synthetic preferences it was not ahead of one reward a category (experiments/dmoerm).
"""

from configs import common

STAND_INS = ("morph:morph", "sentiment:sentiment")
RATES = (5e-4, 5e-4, 1e-3)  # of the phases


def get_config(points=STAND_INS, data=""):
    """`points`: "category:task" for each; `data`: what `data.tasks` lists, where that is not these tasks' names."""
    config = common.get_config()
    category = [point.split(":", 1)[0] for point in points]
    task = [point.split(":", 1)[1] for point in points]
    categories = list(dict.fromkeys(category))
    own = {c: dict.fromkeys([c, *(t for t, of in zip(task, category, strict=True) if of == c)]) for c in categories}
    config.data.update(tasks=data or ",".join(dict.fromkeys([*categories, *task])))

    def rule(sites, groups, **adapter):
        router = dict(name="by_task", tasks=tuple(groups), share="model")
        return common.rule(sites, experts=str(len(groups)), router=router, adapter=common.adapter(**adapter))

    config.method.rules = dict(
        first=rule(f"{common.ATTENTION},{common.FFN}", [",".join(own[c]) for c in categories], rank=16, alpha=32.0),
        points=rule("q,v", task, rank=32, alpha=32.0),
    )

    def objective(form):
        return dict(name="reward_experts", form=form, points=tuple(points))

    def stage(form, tasks, rate, freeze, rows="", **change):
        return dict(
            steps=0, tasks=",".join(dict.fromkeys(tasks)), freeze=freeze, rows=rows, route="",
            objective=objective(form), set=dict(optim=dict(learning_rate=rate)) | change,
        )  # fmt: skip

    config.objective = objective("fused")
    heads = "modules/reward_experts"
    still = dict(method=dict(rules=dict(first=dict(adapter=dict(dropout=0.0)), points=dict(adapter=dict(dropout=0.0)))))
    config.schedule = dict(
        s00=stage("category", categories, RATES[0], f"points/*,{heads}/points,{heads}/fuse_*", rows="0-60"),
        s01=stage("point", task, RATES[1], f"first/*,{heads}/kernel,{heads}/fuse_*"),
        s02=stage("fused", categories, RATES[2], f"first/*,points/*,{heads}/kernel,{heads}/points", "60-100", **still),
    )
    config.optim.update(restart=True, warmup=4)
    config.train.update(steps=60, batch_size=16, eval_every=0, log_every=1)
    config.eval.update(num_generated=0)
    return config
