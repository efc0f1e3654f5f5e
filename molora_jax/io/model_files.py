"""The files of a model's folder that are read: one list, for whoever reads, fetches, copies or writes such a folder.

What else lies beside them is of no use here: other copies of the weights, in folders or in other formats.
"""

import pathlib
import shutil

from molora_jax.errors import InputError
from molora_jax.io.files import plain, there

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
TOOL_TEMPLATE = "additional_chat_templates/tool_use.jinja"
TEXTS = (  # what the model, its tokenizer and its answers are
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "chat_template.jinja", TOOL_TEMPLATE,
    "chat_template.json",  # read by others only: it is handed on
)  # fmt: skip


def of_no_use(name: str) -> bool:
    """Of a name relative to the folder."""
    shard = "/" not in name and name.endswith(".safetensors")
    return not shard and name not in (*TEXTS, INDEX)


def copy_texts(source: pathlib.Path, target: pathlib.Path) -> None:
    """Copies those of TEXTS that are there. Raises InputError for one that is no plain file."""
    for name in TEXTS:
        if there(source / name):
            try:
                path = plain(source / name)
            except OSError as error:
                raise InputError(str(source / name), got=error.strerror, expected="a readable file") from None
            (target / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target / name)
