"""What the battery runs on: a small decoder, a packed batch of real text, and a model from a config.

B = 8 rows (the mesh of data 4 x fsdp 2 divides them), S = 12 positions; two packed examples a row, most rows padded.
"""

import dataclasses
import functools
import itertools
import pathlib
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from configs import common
from launch import flags
from molora_jax import config as schema
from molora_jax import sharding
from molora_jax.adapters import ADAPTERS as ADAPTERS_OF
from molora_jax.backbones.compile import compile_model
from molora_jax.backbones.families import TINY
from molora_jax.catalogue.combinations import small
from molora_jax.catalogue.methods import METHODS
from molora_jax.core import trees
from molora_jax.engines import ALONE, Engine
from molora_jax.io.random_init import random_params
from molora_jax.optim import OPTIMIZERS
from molora_jax.routers import ROUTERS as ROUTERS_OF
from molora_jax.training.step import fresh, make_step

ROOT = pathlib.Path(__file__).parents[2]
SMALL = dataclasses.replace(TINY, layers=2, width=32, ffn_width=48, heads=2, kv_heads=1, head_dim=16, vocab=128)
BASES = {  # other forms of the base, as the random sources have them
    "untied": dataclasses.replace(SMALL, tied=False),
    "qwen3": dataclasses.replace(SMALL, family="qwen3", qk_norm=True, head_dim=24, norm_eps=1e-6),
}
DEEP = dataclasses.replace(SMALL, layers=4)  # MoLA's four groups of depth
TEXT = ["2+3=|5", "cat:|tac", "4+4=|8", "dog:|god", "7-2=|5", "is:|was", "9-9=|0", "go:|went", "1+1=|2", "abc:|cba",
        "6+1=|7", "no:|on", "3+3=|6", "sun:|nus", "8-4=|4", "up:|pu"]  # fmt: skip

ADAPTERS = ("lora", "rslora", "dora")
ROUTERS = {"none": None, "softmax_topk": dict(name="softmax_topk", k=2), "top_p": dict(name="top_p", p=0.6)}
PLACEMENTS = {"projection": "q,k,v,o,gate,up,down", "ffn": "ffn"}
INITS = ("kaiming", "pissa")
PRODUCT = tuple(itertools.product(ADAPTERS, ROUTERS, PLACEMENTS, INITS))
MORE_ROUTERS = {  # of single methods: in the product by shapes, and run with `--all`
    "entropy_hybrid": dict(name="entropy_hybrid", k=1, p=0.6, threshold=0.8),
    "sigmoid_topk": dict(name="sigmoid_topk", k=2, bias_rate=1e-3),
    "recurrent": dict(name="recurrent", k=2, hidden=5),
    "top1": dict(name="top1", gated=True),
    "sparse_projection": dict(name="sparse_projection", k=2),
    "soft_topk": dict(name="soft_topk", hard="never"),  # the naive form evaluates what is trained
    "sinkhorn": dict(name="sinkhorn", k=2, iterations=0),  # the naive form evaluates what is trained
}
# a later router is here with its defaults; those for whole models, for encoders, those that read A x and `by_task`,
# which decides nothing itself, have tests of their own
MORE_ROUTERS |= {
    name: dict(name=name, **dict.fromkeys(member.RANDOM, 0.0))
    for name, member in ROUTERS_OF.items()
    if name not in {*ROUTERS, *MORE_ROUTERS, "x_lora", "sequence_gate", "self_activated", "by_task"}
    if not member.IN_RANK and member.CAUSAL
}
CHECKLIST = (  # of the surveys (docs/surveys.md): an ordinary run has each once
    "noisy_topk", "nonlinear_topk", "dselect_k", "null_experts", "prototypes", "sinkhorn", "relu", "fixed", "task_gate",
    "controlled_threshold",
)  # fmt: skip
VECTORS = ("vera", "ia3", "nola")  # what scales frozen things wants ten times the rate of factors, as in the papers
# adapters of single methods, with the start that they have: by shapes with a router, the rest with `--all`;
# not dylora, whose training draws a rank: its acceptance list holds it
LATER = tuple(itertools.product(("lora_fa", "vera", "ia3", "nola"), ROUTERS, PLACEMENTS, ("kaiming",)))
LATER += tuple(itertools.product(("randlora",), ROUTERS, ("projection",), ("kaiming",)))
PAIRED = ("allora", "adalora", "lora_shared_a", "lora_sparse_a")
LATER += tuple(itertools.product(PAIRED, ROUTERS, PLACEMENTS, ("kaiming",)))
LATER += tuple(itertools.product(("lora_xs",), ROUTERS, PLACEMENTS, ("orthonormal",)))
WIDE = PRODUCT + tuple(itertools.product(ADAPTERS, MORE_ROUTERS, PLACEMENTS, INITS))


def batch(rows=8, length=12):
    """Two examples a row: prompt, answer, the answer alone has a target; what is left of the row is padding."""
    out = {n: np.zeros((rows, length), np.int32) for n in ("tokens", "targets", "segment_ids", "positions")}
    out |= {n: np.zeros((rows, length), np.int32) for n in ("task_ids", "example_ids")}
    out["loss_weight"] = np.zeros((rows, length), np.float32)
    for row in range(rows):
        at = 0
        for segment, text in enumerate(TEXT[2 * row : 2 * row + 2], start=1):
            prompt, answer = text.split("|")
            ids = np.frombuffer((prompt + answer).encode(), np.uint8)
            here = slice(at, at + len(ids) - 1)
            out["tokens"][row, here], out["targets"][row, here] = ids[:-1], ids[1:]
            out["segment_ids"][row, here] = segment
            out["positions"][row, here] = np.arange(len(ids) - 1)
            out["loss_weight"][row, at + len(prompt) - 1 : at + len(ids) - 1] = 1.0
            out["example_ids"][row, here] = 2 * row + segment
            out["task_ids"][row, here] = 3 * (segment - 1)  # in the shipped mixture: morph, factbook
            at += len(ids) - 1
    return out


BATCH = batch()
TARGETS_PER_ROW = int(BATCH["loss_weight"].sum(axis=1).max())


@functools.cache
def base(decoder, dtype="float32"):
    """Random parameters with larger embeddings, so that logits are of order 1 as in a trained model."""
    params = random_params(decoder, seed=1, dtype=dtype)[0]
    for name in ("embed", "head"):
        if name in params:
            params[name] = (params[name] * 10).astype(params[name].dtype)
    return jax.device_put(params)


@functools.partial(jax.jit, static_argnames="model")
def hidden_states(model, params, adapters, state, batch):
    """Final hidden states in evaluation: one program a model, whichever test asks for it."""
    return model.hidden(params, adapters, state, batch)[0]


FILLED = {  # of `jax.numpy`, where each new shape is a program
    "zeros": lambda shape, dtype=None: jax.device_put(np.zeros(shape, dtype or np.float32)),
    "ones": lambda shape, dtype=None: jax.device_put(np.ones(shape, dtype or np.float32)),
    "zeros_like": lambda x, dtype=None: jax.device_put(np.zeros(x.shape, dtype or x.dtype)),
}


def eagerly(make, *args):
    """A start, `make(*args)`, operation by operation and layer by layer: the numbers of one jitted program, to 4e-9.

    Each model would have a program of its own, half of it random numbers: as slow to compile as a training step. Those
    of an operation and a shape are shared by all models.
    """
    layers = lambda f, xs: jax.tree.map(lambda *leaves: np.stack(leaves), *map(f, np.asarray(xs)))  # noqa: E731
    with mock.patch.object(jax.lax, "map", layers), mock.patch.multiple(jnp, **FILLED):
        return jax.device_put(make(*args))


def fresh_adapters(model, key, params):
    return eagerly(model.init_adapters, key, params)


@functools.cache
def base_hidden(model, dtype):
    """Of a model without rules, on the batch."""
    return np.asarray(hidden_states(model, base(model.config, dtype), {}, {}, BATCH), np.float32)


def combination(adapter, router, placement, init, **changes):
    """The config of one point of the product; `changes` are dotted fields."""
    options, rank = (ROUTERS | MORE_ROUTERS)[router], 3 if ADAPTERS_OF[adapter].RANK_BOUND else 16
    rule = common.rule(
        PLACEMENTS[placement],
        adapter=dict(name=adapter, **small(adapter, rank=rank, alpha=6.0), dropout=0.0, init=init),
        experts="4" if options else "1",
        router=options and dict(options),
        down="per_expert" if adapter == "dora" and placement == "ffn" else "once",
    )
    config = common.get_config()
    config.method.rules = dict(mix=rule)
    if options:
        config.losses = dict(balance=common.balance(weight=0.1), entropy=dict(weight=0.05))
    return changed(config, {"base.source": "random:tiny", "optim.warmup": 0, **changes})


def method(name, decoder=SMALL, **changes):
    """The config of a row of the table, without dropout, noise and warm-up; groups of depth past the last layer cut."""
    config = flags.load(ROOT / METHODS[name].config)
    fixed = {f"method.rules.{rule}.adapter.dropout": 0.0 for rule in config.method.rules}
    for rule, value in config.method.rules.items():
        if "router" in value:
            fixed |= {f"method.rules.{rule}.router.{field}": 0.0 for field in ROUTERS_OF[value.router.name].RANDOM}
        if "hard" in value.get("router", {}):  # the naive form evaluates what is trained
            fixed[f"method.rules.{rule}.router.hard"] = "never"
        if "prune" in value.get("router", {}):  # likewise; and a cold softmax multiplies rounding by 1 / temperature
            fixed |= {f"method.rules.{rule}.router.prune": -1.0, f"method.rules.{rule}.router.temperature": 1.0}
        fixed[f"method.rules.{rule}.experts"] = "|".join(value.experts.split("|")[: decoder.layers])
        if value.adapter.name == "dylora":  # the naive form has all ranks
            fixed[f"method.rules.{rule}.adapter.lowest"] = value.adapter.rank
        if value.adapter.name == "mos":  # the pool has a part for each layer, and a table takes no row twice
            mos = value.adapter
            most = mos.private + (mos.budget - mos.private) * decoder.layers
            fixed[f"method.rules.{rule}.adapter.rank"] = min(mos.rank, most)
    return changed(
        config, {"base.source": "random:tiny", "optim.warmup": 0, **fixed, **METHODS[name].overrides, **changes}
    )


FEW = {"q,k,v,o,gate,up,down": "q,o,down", "q,k,v,o": "q,o"}  # what enters attention, what leaves it, and `down`


def shortened(name):
    """Changes of a method's config for an ordinary run: few of the projections, four experts in place of eight.

    LoRA keeps all of its projections.
    """
    changes = {}
    for rule, value in flags.load(ROOT / METHODS[name].config).method.rules.items():
        if name != "lora" and value.sites in FEW:
            changes[f"method.rules.{rule}.sites"] = FEW[value.sites]
        if value.experts == "8":
            changes[f"method.rules.{rule}.experts"] = "4"
    return changes


def changed(config, changes):
    config.unlock()
    for path, value in changes.items():
        group, _, key = path.rpartition(".")
        target = functools.reduce(lambda node, name: node[name], filter(None, group.split(".")), config)
        target[key] = value
    schema.validate(config)
    return config


def random_adapters(model, params, *, seed=3):
    """Every leaf away from its start and from zero; router logits of order 1, changes a part of the base's outputs."""
    scales = {rule.name: rule.adapter.scale() * max(rule.adapter.rank, 1) ** 0.5 for rule in model.rules}
    shapes = jax.eval_shape(model.init_adapters, jax.random.key(0), params)
    shapes, drawn = flatten_dict(shapes, sep="/"), ("A", "B", "W")
    start = {}
    if any(path.rpartition("/")[2] not in drawn for path in shapes):  # else nothing is left of the start
        start = flatten_dict(jax.device_get(fresh_adapters(model, jax.random.key(0), params)), sep="/")
    rng = np.random.default_rng(seed)
    out = {}
    for path, shape in sorted(shapes.items()):
        leaf, noise = path.rpartition("/")[2], rng.standard_normal(shape.shape).astype(np.float32)
        width = dict(A=shape.shape[-1] ** -0.5, B=0.3 / scales[path.split("/")[0]], W=2 * shape.shape[-1] ** -0.5)
        width["lambda"] = width["B"]
        if leaf in ("A0", "B0") or shape.dtype == np.int32:
            out[path] = np.asarray(start[path])
        elif leaf == "m":
            out[path] = np.asarray(start[path]) * (1 + 0.2 * noise)
        elif leaf in width:
            out[path] = noise * np.float32(width[leaf])
        else:  # a later method's leaf: away from its start
            out[path] = np.asarray(start[path]) + 0.3 * noise
    return unflatten_dict(out, sep="/")


def record() -> optax.GradientTransformation:
    """Keeps the last gradient in the optimizer state, so that one compiled step shows everything."""
    zeros = lambda params: jax.tree.map(jnp.zeros_like, params)  # noqa: E731
    return optax.GradientTransformation(zeros, lambda updates, state, params=None: (updates, updates))


class Case:
    """A config on a small decoder: the model, the frozen leaves, and one jitted step that records its gradients."""

    def __init__(
        self, config, decoder=SMALL, *, remat="dots", dtype="float32", mesh=None, engine=None, freeze=(), **options
    ):
        self.config, self.decoder, self.mesh = config, decoder, mesh
        schema.check_model(config, decoder.layers, decoder.dims, decoder.ABSENT)
        model = compile_model(config, decoder, max_segments=3)
        engine = ALONE if engine is None else Engine(engine, mesh)
        self.model = dataclasses.replace(model, remat=remat, engine=engine)
        self.frozen = self.model.frozen_patterns() + tuple(freeze)
        self.params, self.dtype = base(decoder, dtype), dtype
        shapes = jax.eval_shape(self.model.init_adapters, jax.random.key(0), self.params)
        self.shapes = shapes
        vectors = any(rule.adapter.name in VECTORS for rule in config.method.rules.values())
        made = dict(config.optim) | dict(learning_rate=1e-1 if vectors else 1e-2, decay="constant")
        member = OPTIMIZERS[made.pop("name")](**made)
        inner = member.make(100, trees.pairs(self.model, trees.split(shapes, self.frozen)[0]))
        self.optimizer = optax.chain(record(), inner)
        constrain = (lambda x: x) if mesh is None else sharding.constrain(mesh)
        options = dict(accumulate=1, clip=0.0, targets_per_row=TARGETS_PER_ROW) | options
        step = make_step(
            self.model, self.optimizer, member.schedule(100), seed=0, frozen=self.frozen, constrain=constrain, **options
        )
        self.places = out = None
        if mesh is not None:
            shapes = jax.eval_shape(
                lambda p: fresh(self.model, self.optimizer, p, self.frozen, jax.random.key(0)), self.params
            )
            self.places = sharding.state_shardings(shapes, self.model, mesh)
            out = (self.places, sharding.replicated(mesh))
        self.step = jax.jit(step, out_shardings=out)

    def start(self, adapters=None):
        """State of step 0, with these adapters in place of fresh ones."""
        state = eagerly(fresh, self.model, self.optimizer, self.params, self.frozen, jax.random.key(0))
        return state if adapters is None else state.replace(adapters=jax.device_put(adapters))

    def run(self, state, data=None):
        """One step: `(state, metrics, gradients {path: array})`."""
        data = BATCH if data is None else data
        params = self.params
        if self.mesh is not None:
            params = sharding.put(params, sharding.param_shardings(self.model.config, params, self.mesh))
            data = sharding.put_batch(data, self.mesh, len(data["tokens"]))
            state = sharding.put(jax.device_get(state), self.places)
        state, metrics = self.step(state, params, data)
        return state, jax.device_get(metrics), flatten_dict(jax.device_get(state.opt[0]), sep="/")

    def hidden(self, adapters):
        """Hidden states in evaluation."""
        if not adapters:
            return base_hidden(self.model.without_rules(), self.dtype)
        state = self.model.init_router_state()
        return np.asarray(hidden_states(self.model, self.params, adapters, state, BATCH), np.float32)


def mesh8():
    return sharding.make_mesh(dict(data=4, fsdp=2, expert=1, tensor=1))
