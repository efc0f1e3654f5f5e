"""Operations on finished runs: runs in, one run out. A member a file; `perform.py` opens, asks and writes."""

from molora_jax.surgery.average import Average
from molora_jax.surgery.lora_lego import LoraLego
from molora_jax.surgery.merge_into_base import MergeIntoBase
from molora_jax.surgery.task_arithmetic import TaskArithmetic
from molora_jax.surgery.ties import Ties
from molora_jax.surgery.truncate import Truncate

SURGERIES = {
    "average": Average, "lora_lego": LoraLego, "merge_into_base": MergeIntoBase, "task_arithmetic": TaskArithmetic,
    "ties": Ties, "truncate": Truncate,
}  # fmt: skip
