"""The tables of a config: every fixed field, its type and range, and the ranges of well-known options.

Options of a method (`router.k`, `adapter.rank`, `losses.balance.over`, ...) and their ranges come from the member's own
file (`config/members.py`).
"""

import dataclasses
import difflib
from collections.abc import Callable

from molora_jax.errors import InputError

ATTENTION, FFN = ("q", "k", "v", "o"), ("gate", "up", "down")
SSM = ("in_proj", "x_proj", "dt_proj", "out_proj")  # of a state-space block
PROJECTIONS = (*ATTENTION, *FFN, *SSM)
FORMATS = ("auto", "messages", "prompt_completion", "choice", "alpaca", "sharegpt", "labelled", "preference")
TASK_FAMILIES = {"rg": "rg:NAME (reasoning-gym)", "bb": "bb:NAME (BIG-bench)"}
TASKS = ("morph", "translate", "emoji", "factbook", "sentiment", "topic", "dialog", "code", "math")
BASE_PACKAGES = ("smollm2-135m-instruct", "all-minilm-l6-v2")
BASE_SANDBOX = ("6m",)
BASE_RANDOM = ("tiny", "tiny-untied", "tiny-qwen3", "tiny-bert", "tiny-moe", "tiny-mamba")
ENGINES_PLANNED = ("ring", "fssdp")
MESH_AXES = ("data", "fsdp", "expert", "tensor")
MICRO_SHARDS = 8  # of a micro-step with train.exact
REQUIRED = object()


@dataclasses.dataclass(frozen=True)
class Field:
    """A value's type, the text of what is expected, its test, and its default (`REQUIRED`: there is none)."""

    kind: type
    expected: str = ""
    accepts: Callable = lambda value: True
    default: object = REQUIRED

    def __str__(self):
        name = {int: "an integer", float: "a number", bool: "true or false", str: "a string", tuple: "a tuple"}
        return f"{name[self.kind]} {self.expected}".rstrip()


def interval(kind, low=None, high=None, ends="[]"):
    """From `low` to `high`, None for no bound; `ends` says which of the bounds belong: "[]", "(]", "[)", "()"."""

    def holds(value):
        above = low is None or value > low or (value == low and ends[0] == "[")
        return above and (high is None or value < high or (value == high and ends[1] == "]"))

    if high is None:
        text = "" if low is None else f"{'>=' if ends[0] == '[' else '>'} {low}"
    else:
        text = f"{'<=' if ends[1] == ']' else '<'} {high}" if low is None else f"in {ends[0]}{low}, {high}{ends[1]}"
    return Field(kind, text, holds)


def at_least(low, kind=int):
    return interval(kind, low)


def between(low, high):
    return Field(int, f"from {low} to {high:,}", lambda value: low <= value <= high)


def within(low, high=None):
    return interval(type(low), low, high)


def choice(*names):
    return Field(str, "among " + ", ".join(map(repr, names)), lambda value: value in names)


def since(field, default):
    """A field that configs of older versions lack: without it they mean `default`."""
    return dataclasses.replace(field, default=default)


TEXT = Field(str)

FIELDS = {
    "seed": between(0, 2**31 - 1),
    "base": {
        "source": TEXT,
        "dtype": choice("float32", "bfloat16"),
        "quant": since(choice("none", "int8", "nf4"), "none"),
    },
    "data": {
        "tasks": TEXT,
        "valid": since(TEXT, ""),
        "test_share": since(within(0.0, 0.45), 0.05),
        "format": since(choice(*FORMATS), "auto"),
        "file_tasks": since(Field(bool), True),
        "fields": since(TEXT, ""),
        "raw": since(Field(bool), False),
        "template_args": since(TEXT, ""),
        "train_on": since(choice("last", "all"), "last"),
        "seq_len": at_least(8),
        "temperature": Field(float, "> 0, and at least 0.1", lambda value: value >= 0.1),  # size ** (1 / temperature)
        "system": TEXT,
        "overlong": choice("skip", "truncate", "error"),
        "bad_rows": choice("error", "skip"),
    },
    "method": {},  # checked rule by rule
    "objective": {},  # the options of the member
    "losses": {},  # checked member by member
    "optim": {},  # the options of the member
    "surgery": {},  # the options of the member, and its inputs
    "schedule": {},  # checked stage by stage
    "regime": {},  # the options of the member
    "mesh": {
        "data": Field(int, ">= 1, or -1 for all devices that are left", lambda size: size >= 1 or size == -1),
        **{axis: at_least(1) for axis in MESH_AXES[1:]},
        "dcn": since(at_least(1), 1),
    },
    "engine": TEXT,
    "expert_parallel": {"capacity": at_least(0, float), "rank_space": Field(bool)},
    "train": {
        "steps": at_least(1),
        "epochs": since(within(0.0, 1e6), 0.0),
        "stop_after": at_least(0),
        "batch_size": between(1, 1_000_000),
        "accumulate": at_least(1),
        "clip": at_least(0, float),
        "eval_every": at_least(0),
        "patience": since(at_least(0), 0),
        "save_every": at_least(0),
        "keep": at_least(1),
        "log_every": at_least(1),
        "tracker": since(choice("", "wandb"), ""),
        "remat": choice("none", "dots", "full"),
        "attention": choice("xla", "fused"),
        "hang_seconds": since(within(0.0, 1e7), 0.0),
        "exact": Field(bool, default=False),
        "init_from": TEXT,
    },
    "eval": {
        "num_items": at_least(1),
        "num_generated": at_least(0),
        "max_new_tokens": at_least(1),
        "batch_size": at_least(1),
        "without": since(TEXT, ""),
    },
}

RULE = {
    "sites": TEXT,
    "layers": TEXT,
    "experts": TEXT,
    "load": Field(tuple, "of paths"),
    "down": choice("once", "per_expert"),
    "shrink": Field(bool),
    "loaded": since(choice("frozen", "trained"), "frozen"),
    "base_router": since(choice("frozen", "trained"), "frozen"),
    "adapters": since(Field(tuple, "of names of adapters"), ()),
}

LATER = ("objective", "regime", "surgery")  # groups that configs of older versions lack
STAGE = {
    "steps": at_least(0),
    "tasks": TEXT,
    "freeze": TEXT,
    "route": choice("", "task", "apart"),
    "rows": since(TEXT, ""),
}
WHOLE = dict(steps=0, tasks="", freeze="", set={}, route="", objective={})  # the one stage of a plain run


def nearest(name, names):
    """The one of `names` most like `name`, or ""."""
    if not isinstance(name, str) or len(name) > 200:
        return ""
    cutoff = 0.6 if len(name) <= 4 else 0.5  # of few letters half are soon the same: "max" and "mean"
    return next(iter(difflib.get_close_matches(name, [str(k) for k in names], n=1, cutoff=cutoff)), "")


def did_you_mean(name, names):
    guess = nearest(name, names)
    return f"Did you mean {guess!r}?" if guess else ""


def shown(value):
    """A value as text of at most 200 characters; `repr` refuses integers of thousands of digits."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):
        return f"{type(value).__name__} too large to print"
    return text if len(text) <= 200 else text[:197] + "..."


def one_of(names):
    return "one of " + ", ".join(names)


def wrong(where, got, expected, fix=""):
    return InputError(where, got=str(got), expected=expected, fix=fix)
