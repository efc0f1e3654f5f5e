"""A folder that `launch.export --format=molora` wrote, as products: `rules.X.load=("molora:DIR",)`."""

import json
import pathlib

import numpy as np
from flax.traverse_util import unflatten_dict

from molora_jax import stores
from molora_jax.backbones.compile import compile_model
from molora_jax.config import outside
from molora_jax.io import tensors
from molora_jax.runs import saved
from molora_jax.runs.products import products
from molora_jax.runs.same_base import same_base

FILE = "molora.safetensors"


def read(path: str, decoder, base: dict, *, refuse, note) -> dict:
    """`{(rule, layer, site): (A [R, D_in], s B [R, D_out])}`; `base`, `refuse` and `note` as in `same_base`.

    Raises:
      InputError: no such file, another base, a mixture, trained base leaves, leaves that are not what its config says.
    """
    file = pathlib.Path(stores.at_hand(path)).expanduser() / FILE
    if not file.is_file():
        raise refuse(f"without {FILE}", "a folder that launch.export --format=molora wrote")
    outside.no_code_from(file.parent)
    leaves = tensors.read(file)
    try:
        told = json.loads(tensors.read_metadata(file)["molora"])
        config, theirs = told["config"], told["base"] | {"digest": str(told["base"]["digest"])}
        theirs = {"quant": (config.get("base") or {}).get("quant"), **theirs}
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        raise refuse(f"whose {FILE} has no config of ours", "a file that launch.export wrote") from None
    same_base(theirs, base, refuse=refuse, note=note)
    if any(name.startswith("modules/") for name in leaves):
        raise refuse("which trained heads or base leaves as well", "a run that is adapters alone")
    model = compile_model(saved.validated(config, where=file, need_base=False), decoder)
    own = {name.removeprefix("adapters/"): x for name, x in leaves.items() if name.startswith("adapters/")}
    for name, leaf in own.items():
        if not np.isfinite(np.asarray(leaf, np.float32)).all():
            raise refuse(f"with NaN or Inf in {name}", "finite numbers")
    return products(model, unflatten_dict(own, sep="/"), refuse=refuse)
