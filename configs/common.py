"""Defaults of every run. A method's config starts from `get_config()` and changes what the method is about.

Fields that may be one number or a list are strings (`experts="8"`, `"2|4|6|8"`, `"2*8,4*22"`), because a ConfigDict
holds one type a field; 0 (or "") means "off" where a field is optional. `molora_jax/config/fields.py`
documents and checks every field.
"""

from ml_collections import ConfigDict

ATTENTION = "q,k,v,o"
FFN = "gate,up,down"
TASKS = "morph,translate,emoji,factbook,sentiment,topic,dialog,code,math"


def adapter(name="lora", *, rank=16, alpha=32.0, dropout=0.05, init="kaiming", **more):
    return dict(name=name, rank=rank, alpha=alpha, dropout=dropout, init=init, **more)


def rule(
    sites, *, adapter, router=None, placement=None, layers="all", experts="1", load=(), down="once", shrink=False,
    base_router=None, loaded=None, adapters=None,
):  # fmt: skip
    """One rule. `down` and `shrink` matter for `sites="ffn"` only; without a router there is one expert.

    The sites say the placement (whole FFN or projection); `placement=dict(name="chain", ...)` names another.
    `base_router`: of a base that routes itself, with the placement `base_experts`: "frozen", or "trained".
    `adapters`: kinds side by side, with the placement `block`: `("lora", "ia3", "prompt", "parallel")`. The one that
    `adapter` names has its options; others have their defaults.
    `load`: (DIR of a run, "peft:DIR", "molora:DIR", ...), an expert each; `loaded`: "frozen", or "trained".
    """
    fields = dict(sites=sites, layers=layers, experts=experts, load=load, adapter=adapter, down=down, shrink=shrink)
    members = dict(
        router=router, placement=placement, base_router=base_router, loaded=loaded, adapters=adapters
    )  # fmt: skip
    return fields | {name: member for name, member in members.items() if member is not None}


def balance(**changes):
    """The balance loss; the defaults are Switch's: one value a layer and site, 1 at uniform routing."""
    fields = dict(
        weight=1e-2, over="site", reduce="mean", times_experts=True, per_example=False,
        normalise="slots", counts="hard", accumulate="micro",
    )  # fmt: skip
    return {**fields, **changes}


def surgery(name, **options):
    """A surgery on the runs `inputs`, folders DIR or DIR@step; its rules are those of the first one."""
    config = get_config()
    config.surgery = dict(name=name, inputs=(), **options)
    return config


def get_config():
    return ConfigDict(
        dict(
            seed=0,
            base=dict(
                source="pkg:smollm2-135m-instruct",
                dtype="float32",
                quant="none",  # kernels of projections and experts: int8, nf4 (docs/models.md)
            ),
            data=dict(
                tasks=TASKS,  # task names, rg:NAME, bb:NAME and files jsonl:PATH, by commas; in a path a comma is \\,
                valid="",  # jsonl:PATH, ...: these rows are evaluated, every row of `tasks` trains; "" splits `tasks`
                test_share=0.05,  # rows held out by a hash for test, and as many for valid; 0.0 trains on all
                format="auto",  # of files: messages, prompt_completion, choice, alpaca, sharegpt; "auto": by fields;
                # labelled (text, label) for classify, preference (prompt, chosen, rejected) for preference
                file_tasks=True,  # a file whose rows name several tasks is several; False: one (runs of older versions)
                fields="",  # names of a file's own: "prompt=question,target=answer"
                raw=False,  # rows are plain text (`text`, or prompt and target as they stand), without a template
                template_args="",  # of the chat template, as JSON: "enable_thinking=false"
                train_on="last",  # assistant turns with a loss: the "last", or "all"
                seq_len=128,  # tokens a row; examples are packed into rows
                temperature=3.0,  # p(task) ~ size ** (1 / temperature)
                system="",  # system turn; "" leaves it to the model's chat template
                overlong="skip",  # "skip" (counted), "truncate" the prompt from the left, or "error"
                bad_rows="error",  # jsonl: "error", or "skip" (counted)
            ),
            method=dict(
                rules=dict(),
                train_base="",  # base leaves that train as copies of their own: embed,head,norms; "all" without rules
            ),
            objective=dict(name="lm"),  # how a batch becomes a loss: lm, classify, preference, distill
            losses=dict(),
            optim=dict(
                name="adamw", learning_rate=2e-4, weight_decay=0.0, decay="cosine", warmup=10,
                b1=0.9, b2=0.999, eps=1e-8,
            ),
            surgery=dict(),  # of launch.surgery: dict(name, inputs, options)
            # steps=0: to the end; an objective here is the stage's own
            schedule=dict(s00=dict(steps=0, tasks="", freeze="", set=dict(), route="", objective=dict())),
            regime=dict(name="stages"),  # how training is organised: stages, federated, continual (docs/regimes.md)
            mesh=dict(data=-1, fsdp=1, expert=1, tensor=1, dcn=1),
            engine="auto",  # where experts live: replicate, gather, all_to_all, ragged_all_to_all (docs/parallelism.md)
            expert_parallel=dict(
                capacity=0.0,  # rows a device sends to each peer, times the mean; 0 never drops
                rank_space=False,  # exchange rank-R rows: every device keeps all A
            ),
            train=dict(
                steps=200,
                epochs=0.0,  # above 0 it sets `steps`: an epoch is as many examples as all tasks have
                stop_after=0,  # absolute step at which to stop cleanly; the schedule is unchanged
                batch_size=8,  # rows an optimizer step
                accumulate=1,  # micro-steps an optimizer step
                clip=1.0,  # global gradient norm; 0 is off
                eval_every=0,
                patience=0,  # evaluations in a row without a lower valid NLL that end the run; 0 is off
                save_every=50,
                keep=2,
                log_every=10,
                tracker="",  # or wandb (extra `track`): the numbers of metrics.jsonl go there too
                remat="dots",  # none, dots, full
                attention="xla",  # or fused: cuDNN's on one NVIDIA GPU in half precision, else the same as xla
                hang_seconds=3600.0,  # so long without a step or a save: the process writes its stacks and ends; 0: off
                exact=False,  # the same bits on 1, 2, 4 and 8 devices (docs/parallelism.md says at what cost)
                init_from="",
            ),
            eval=dict(
                num_items=32,
                num_generated=16,
                max_new_tokens=16,
                batch_size=16,
                without="",  # experts to open a run without, by commas: names of loaded runs or of tasks, or numbers
            ),
        )
    )  # fmt: skip
