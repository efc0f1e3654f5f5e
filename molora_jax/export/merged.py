"""A Hugging Face folder of the base with a run's static adapters in its kernels, float32: `from_pretrained` reads it.

What is merged and how is the surgery `merge_into_base`; a run that routes cannot be, for what it adds depends on the
token.
"""

from molora_jax.errors import InputError
from molora_jax.export.base import Source
from molora_jax.io import huggingface
from molora_jax.surgery.base import Parent
from molora_jax.surgery.merge_into_base import MergeIntoBase


def write(source: Source, folder) -> list[str]:
    parents = (Parent(str(source.opened.folder), source.opened),)
    surgery = MergeIntoBase()
    try:
        surgery.check(parents)
    except InputError as error:
        raise InputError("--format=merged", got=error.got, expected=error.expected, fix=error.fix) from None
    result = surgery.apply(parents)
    huggingface.write_base(folder, result.base)
    return [f"the trained head {name} is not in it" for name in result.modules]
