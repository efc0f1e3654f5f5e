"""Our outputs of the checkpoints of `backbone_cases.py`, and how far they are from transformers'."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from molora_jax.backbones import hf_config
from molora_jax.backbones.model import Model
from molora_jax.objectives.lm import lm
from tests.backbones import backbone_cases
from tests.io import tiny_files

FIXTURE = pathlib.Path(__file__).parents[1] / "fixtures" / "backbones.npz"


def written(folder, case) -> str:
    config = backbone_cases.CASES[case]
    backbone = hf_config.from_hf(config, where="test")
    tensors = {
        name: backbone_cases.value(case, name, leaf.file_shape)
        for leaf in backbone.shapes().values()
        for name, _ in leaf.files()
    }
    return f"dir:{tiny_files.write_hf_folder(folder, config, tensors)}"


def outputs(base):
    model = Model(base.config)
    tokens, targets, types, lengths = backbone_cases.rows()
    valid = np.arange(tokens.shape[1]) < lengths[:, None]
    encoder = not base.config.CAUSAL
    batch = dict(tokens=tokens, positions=np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape))
    batch |= dict(segment_ids=(valid if encoder else np.ones_like(valid)).astype(np.int32))
    batch |= dict(token_type_ids=types) if encoder else dict(targets=targets, loss_weight=np.ones(tokens.shape, "f4"))
    sites = [site for site in (*base.config.sites, "router") if site in base.params["blocks"]]

    @jax.jit
    def run(params, batch):
        def loss(kernels):
            blocks = params["blocks"] | {s: params["blocks"][s] | {"kernel": kernels[s]} for s in sites}
            hidden = model.hidden(params | {"blocks": blocks}, {}, {}, batch)[0]
            if encoder:
                hidden = hidden * valid[..., None]
                return jnp.mean(hidden * backbone_cases.weighting(hidden.shape)), hidden
            return lm(model, params, hidden, batch, tokens.shape[1]) / tokens.size, model.logits(params, hidden)

        return jax.value_and_grad(loss, has_aux=True)({s: params["blocks"][s]["kernel"] for s in sites})

    with jax.default_matmul_precision("highest"):
        (value, output), gradients = jax.device_get(run(base.params, batch))
    return backbone_cases.summary(output, value, gradients)


def errors(case: str, base) -> dict[str, float]:
    """`output`, `loss`, and `gradient`, the largest of the sites."""
    found = outputs(base)
    with np.load(FIXTURE, allow_pickle=False) as file:
        wanted = {name.partition("/")[2]: file[name] for name in file if name.startswith(f"{case}/")}
    assert found.keys() == wanted.keys()
    apart = {name: float(np.linalg.norm(found[name] - x) / np.linalg.norm(x)) for name, x in wanted.items()}
    return {"output": apart.pop("output"), "loss": apart.pop("loss"), "gradient": max(apart.values())}
