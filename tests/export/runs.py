"""Runs of every kind that goes out, on tiny random bases, and what the run itself says for a few tokens."""

import functools

import jax
import numpy as np

from configs import common
from molora_jax.evaluation.run import load_run
from tests.surgery.make import new_run

IDS = [5, 77, 130, 4, 200, 31, 9, 300]


def rules(sites="q,v,down", name="lora", *, rank=4, alpha=8.0, experts="1", router=None, rule=None, **more):
    adapter = common.adapter(name, **{"rank": rank, "alpha": alpha, "dropout": 0.0} | more)
    return dict(all=common.rule(sites, adapter=adapter, experts=experts, router=router, **(rule or {})))


def _ia3(sites):
    return rules(sites, "ia3", rank=0, alpha=0.0)


X_LORA = dict(name="x_lora", share="site", mix="softmax", top_k=0, temperature=1.5, depth=2, width=12, gain=1.3)
EXPERTS = dict(sites="ffn", rule=dict(placement=dict(name="base_experts", factors="own")))
TWO = rules("q,k", rank=3, alpha=3.0) | {"more": rules("q,up", rank=2, alpha=8.0)["all"]}
STATIC = {  # name -> (rules, base)
    "lora": (rules(), "random:tiny"),
    "two": (TWO, "random:tiny"),
    "layers": (rules("q,gate", rule=dict(layers="0-1")), "random:tiny"),
    "rslora": (rules(name="rslora"), "random:tiny"),
    "dora": (rules(name="dora"), "random:tiny"),
    "pissa": (rules(init="pissa"), "random:tiny"),
    "lora_fa": (rules(name="lora_fa"), "random:tiny"),
    "lora_xs": (rules(name="lora_xs", init="lora_xs"), "random:tiny"),
    "adalora": (rules(name="adalora"), "random:tiny"),
    "ia3": (_ia3("k,v,down"), "random:tiny"),
    "vera": (rules("q,v,down", "vera", rank=8, alpha=0.0), "random:tiny"),
    "qwen3": (rules("q,k,v,o"), "random:tiny-qwen3"),
    "untied": (rules("q,k,v,o,gate,up,down"), "random:tiny-untied"),
}
EXPERT = {
    "experts": (rules(**EXPERTS), "random:tiny-moe"),
    "experts+q": (rules(**EXPERTS) | {"attn": rules("q,v", rank=3)["all"]}, "random:tiny-moe"),
    "shared": (
        rules(sites="ffn", rule=dict(placement=dict(name="base_experts", factors="shared_outer"))), "random:tiny-moe"
    ),
}  # fmt: skip
TRAINED_ROUTER = (
    rules(sites="ffn", rule=dict(placement=dict(name="base_experts", factors="one"), base_router="trained")),
    "random:tiny-moe",
)
BALANCED = dict(losses=dict(balance=common.balance(weight=0.01)))
MIXED = {
    "x_lora": (rules("q,v,down", experts="3", router=X_LORA), "random:tiny"),
    "x_lora_attn": (rules("q,o", experts="3", router=X_LORA | dict(share="attn", depth=1, mix="raw")), "random:tiny"),
    "x_lora_model": (rules("q,v", experts="2", router=X_LORA | dict(share="model", depth=1)), "random:tiny"),
    "x_lora_topk": (
        rules("q,up", experts="3", router=X_LORA | dict(mix="softmax_topk", top_k=2, share="site", depth=1)),
        "random:tiny",
    ),
}  # fmt: skip


def made(folder, case, *, seed=0, **more):
    """The folder of a run; every float leaf is random."""
    which, source = case
    return new_run(folder, which, source=source, seed=seed, **more)


def logits(run, ids=IDS) -> np.ndarray:
    """`[S, V]` float32 of a run's folder."""
    run = load_run(run, warn=lambda text: None) if not hasattr(run, "model") else run
    return said(run.model, run.params, run.adapters, run.router_state, ids)


def said(model, params, adapters, state, ids=IDS, **more) -> np.ndarray:
    """`[S, V]` float32 of a model. Equal models, such as the plain ones of all runs on a base, share a program."""
    tokens = np.asarray([ids], np.int32)
    batch = {"tokens": tokens, "segment_ids": np.ones_like(tokens), "positions": np.arange(len(ids))[None]}
    params, adapters, state = jax.device_get((params, adapters, state))  # one that lies on a mesh has programs apart
    return np.asarray(_logits(model, params, adapters, state, batch | more)[0])


@functools.partial(jax.jit, static_argnums=0)
def _logits(model, params, adapters, state, batch):
    return model.config.logits(params, model.hidden(params, adapters, state, batch)[0])


def _routed(sites, router, name="lora", *, experts="4", rule=None, **more):
    return rules(sites, name, experts=experts, router=router, rule=rule, **more), "random:tiny"


def _top2(share="site", **more):
    return dict(name="softmax_topk", k=2, share=share) | more


def _chain(**options):
    return dict(placement=dict(name="chain", iterations=2) | options)


_ATTENTION = rules("q,o", rank=2)["all"]
ROUTED = {  # what `molora_torch.py` computes: every router and placement that it knows, and kinds of adapters
    "mixlora": (rules("ffn", experts="4", router=_top2()) | {"attn": _ATTENTION}, "random:tiny"),
    "mola": _routed("q,v,down", _top2(init="kaiming"), experts="2|2|3|4"),
    "loramoe": _routed("gate,up,down", _top2(k=0)),
    "switch": _routed("ffn", _top2(k=1, renormalise=False)),
    "shrink": _routed("ffn", _top2(renormalise=False), rule=dict(shrink=True)),
    "dora": _routed("q,down", _top2(), "dora"),
    "dora_ffn": _routed("ffn", _top2(), "dora", rule=dict(down="per_expert")),
    "ia3": _routed("k,v,down", _top2(k=0), "ia3", rank=0, alpha=0.0),
    "pissa": _routed("q,up", _top2(), init="pissa"),
    "hydralora": _routed("q,k", _top2("attn", k=0), "lora_shared_a"),
    "attn": _routed("o", _top2("attn")),
    "top_p_model": _routed("q,up", dict(name="top_p", p=0.5, share="model")),
    "top_p": _routed("ffn", dict(name="top_p", p=0.4, share="site", max_experts=3)),
    "top1": _routed("gate,up,down", dict(name="top1", share="ffn")),
    "top1_gated": _routed("ffn", dict(name="top1", gated=True, bias=False)),
    "biased": _routed("ffn", dict(name="biased_topk", k=2, bias_rate=0.1)),
    "biased_sigmoid": _routed("q", dict(name="biased_topk", k=2, score="sigmoid", renormalise=True, bias_rate=0.1)),
    "smora": _routed("v,down", dict(name="sigmoid_topk", k=3), rank=1, experts="6"),
    "adamole": _routed("ffn", dict(name="learned_threshold", ceiling=2.0)),
    "dynmole": _routed("ffn", dict(name="entropy_hybrid", k=1, p=0.6, threshold=0.98)),
    "renyi": _routed("q", dict(name="entropy_hybrid", kind="renyi", q=1.4, threshold=0.98)),
    "ld_mole": _routed("q,down", dict(name="sparsegen", hidden=8)),
    "rmoe": _routed("ffn", dict(name="recurrent", k=2, hidden=8, share="ffn")),
    "flylora": _routed("q", dict(name="sparse_projection", k=2), "lora_sparse_a", rank=1, experts="6"),
    "comol": _routed("q,up", dict(name="core_space"), "comol"),
    "coe": _routed("ffn", _top2(), rule=_chain()),
    "coe_once": _routed("ffn", _top2(k=0), rule=_chain(gating="once", nonlinearity="gelu")),
    "x_lora": MIXED["x_lora"],
    "x_lora_attn": MIXED["x_lora_attn"],
    "static": STATIC["two"],
}  # fmt: skip
REFUSED = {  # what it has no mathematics for -> what it says
    "sequence": (_routed("q,v", dict(name="sequence_gate")), "sequence_gate"),
    "experts": ((EXPERT["experts"][0] | {"x": MIXED["x_lora_model"][0]["all"]}, "random:tiny-moe"), "beside x_lora"),
    "forward": (_routed("q", _top2(), "allora", form="forward"), "forward"),
}
