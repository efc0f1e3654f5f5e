"""Made tests/golden/v1.tar.gz with the code of commit e556738: what a user's folder of format 1 looks like.

    git checkout e556738 && python tests/golden/make_v1.py      # only to see how it was done: never run it again

The archive is never made anew. `tests/golden/test_v1.py` opens it with the code of today.
"""

import json
import os
import pathlib
import shutil
import sys
import tarfile
import tempfile

if __name__ == "__main__":  # the tests import its rows and configs: they have devices of their own
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=1"
ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import safetensors.numpy  # noqa: E402

from configs import common  # noqa: E402
from molora_jax import config as config_lib  # noqa: E402
from molora_jax.evaluation.run import load_run  # noqa: E402
from molora_jax.io import tokenizer  # noqa: E402
from molora_jax.training.loop import train  # noqa: E402

PROMPTS = ("Double 3", "Is 4 even?")


def rows(path):
    lines = [{"prompt": f"Double {i}", "target": str(2 * i), "task": "double"} for i in range(60)]
    lines += [{"prompt": f"Is {i} even?", "target": "no" if i % 2 else "yes", "task": "even"} for i in range(60)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def base(folder):
    """A Qwen2 of two layers, tied."""
    folder.mkdir()
    width, ffn, heads, kv, size, vocab = 32, 48, 4, 2, 8, 288
    config = dict(
        model_type="qwen2", hidden_size=width, intermediate_size=ffn, num_hidden_layers=2, num_attention_heads=heads,
        num_key_value_heads=kv, vocab_size=vocab, max_position_embeddings=512, rms_norm_eps=1e-5, rope_theta=10000.0,
        tie_word_embeddings=True, hidden_act="silu",
    )  # fmt: skip
    shapes = {"model.embed_tokens.weight": (vocab, width), "model.norm.weight": (width,)}
    for i in range(2):
        p = f"model.layers.{i}."
        shapes |= {f"{p}{n}_layernorm.weight": (width,) for n in ("input", "post_attention")}
        for n, out in (("q", heads * size), ("k", kv * size), ("v", kv * size)):
            shapes |= {f"{p}self_attn.{n}_proj.weight": (out, width), f"{p}self_attn.{n}_proj.bias": (out,)}
        shapes |= {f"{p}self_attn.o_proj.weight": (width, heads * size), f"{p}mlp.down_proj.weight": (width, ffn)}
        shapes |= {f"{p}mlp.{n}_proj.weight": (ffn, width) for n in ("gate", "up")}
    rng = np.random.default_rng(0)
    weights = {
        n: (0.2 * rng.standard_normal(s) + (1 if "norm" in n else 0)).astype(np.float32) for n, s in shapes.items()
    }
    safetensors.numpy.save_file(weights, folder / "model.safetensors")
    text = tokenizer.byte_tokenizer()
    text.inner.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(dict(bos_token="<|bos|>", eos_token="<|im_end|>", pad_token="<|pad|>", chat_template=text.template))
    )
    (folder / "config.json").write_text(json.dumps(dict(config, vocab_size=288)))
    return folder


def small(adapter_name, **router):
    return dict(adapter=common.adapter(adapter_name, rank=2), experts="3", router=router)


def config(source):
    c = common.get_config()
    c.base.source = source
    c.method.rules = dict(
        attn=common.rule("q,o", **small("lora", name="softmax_topk", k=2, share="attn")),
        ffn=common.rule("ffn", **small("lora", name="sigmoid_topk", k=2, share="ffn")),
    )
    c.losses = dict(balance=common.balance())
    with c.unlocked():
        c.data.update(tasks="jsonl:rows.jsonl", seq_len=96)
        c.optim.decay = "constant"
        c.train.update(steps=8, stop_after=6, batch_size=4, save_every=2, eval_every=2, keep=2)
        c.eval.update(num_items=4, num_generated=2, max_new_tokens=4, batch_size=4)
    config_lib.validate(c)
    return c


def main():
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        rows(pathlib.Path("rows.jsonl"))
        base(pathlib.Path("base"))
        values = {}
        for name, source in (("random", "random:tiny"), ("folder", "dir:base")):
            train(config(source), name, note=print)
            run = load_run(name)
            values[name] = dict(
                step=run.step,
                answers=[run.generate(p, max_new_tokens=8) for p in PROMPTS],
                gates={
                    rule: {scope: np.asarray(g).astype(float).round(6).tolist() for scope, g in scopes.items()}
                    for rule, scopes in run.routing(PROMPTS[0]).items()
                },
            )
            # The last two steps, as this code takes them: a resume must come to the same.
            c = config(source)
            c.train.stop_after = 0
            shutil.copytree(name, f"{name}-on")
            train(c, f"{name}-on", note=print)
            lines = [json.loads(x) for x in pathlib.Path(f"{name}-on/metrics.jsonl").read_text().splitlines()]
            values[name]["losses"] = {line["step"]: line["loss"] for line in lines}
            shutil.rmtree(pathlib.Path(name) / "tensorboard", ignore_errors=True)
            (pathlib.Path(name) / "loss.png").unlink(missing_ok=True)
        pathlib.Path("values.json").write_text(json.dumps(values))
        with tarfile.open(pathlib.Path(__file__).parent / "v1.tar.gz", "w:gz") as tar:
            for name in ("rows.jsonl", "base", "random", "folder", "values.json"):
                tar.add(name, filter=_nobody)
    print(json.dumps({k: {a: b for a, b in v.items() if a != "gates"} for k, v in values.items()}))


def _nobody(member):
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    return member


if __name__ == "__main__":
    main()
