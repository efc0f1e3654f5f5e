"""What a run believes: another base, tokenizer, template or number of the base's config is refused, or said.

The base is changed behind a finished run's back; the same command, and an evaluation, must notice.
"""

import json
import os

import numpy as np

import molora_jax
from molora_jax import data
from molora_jax.errors import InputError
from molora_jax.io import tensors
from molora_jax.io.base import load_base
from tests.faults import opened
from tests.faults.common import base_folder, changed, copy_run, finished_run, scratch, tiny_config
from tests.faults.report import each, misnamed

NO_CHANGE = "nothing"


def _json(name, **values):
    def change(base):
        path = base / name
        tree = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(tree | values))

    return change


def _template(old, new):
    def change(base):
        path = base / "tokenizer_config.json"
        settings = json.loads(path.read_text())
        assert old in settings["chat_template"]
        settings["chat_template"] = settings["chat_template"].replace(old, new)
        path.write_text(json.dumps(settings))

    return change


def _file_template(base):
    (base / "chat_template.jinja").write_text("{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}")


def _swapped_vocabulary(base):
    path = base / "tokenizer.json"
    tree = json.loads(path.read_text())
    vocabulary = tree["model"]["vocab"]
    vocabulary["D"], vocabulary["2"] = vocabulary["2"], vocabulary["D"]
    path.write_text(json.dumps(tree))


def _merged(base):
    path = base / "tokenizer.json"
    tree = json.loads(path.read_text())
    tree["model"]["vocab"]["ou"] = 260
    tree["model"]["merges"] = ["o u"]
    path.write_text(json.dumps(tree))


def _weights(base):
    file = base / "model.safetensors"
    arrays = {name: np.array(view) for name, view in tensors.read(file).items()}
    next(iter(arrays.values())).reshape(-1)[0] += 1
    tensors.write(file, {k: a.shape for k, a in arrays.items()}, np.float32, iter(arrays.values()))


CHANGES = {
    NO_CHANGE: lambda base: None,
    "weights": _weights,
    "template: its user turn": _template("message['role'] }}", "message['role'] ~ 's' }}"),
    "template: long texts alone": _template(
        "{{ message['content'] }}", "{{ message['content'] if message['content']|length < 3 else 'long' }}"
    ),
    "template: a file in place of it": _file_template,
    "tokenizer: two ids swapped": _swapped_vocabulary,
    "tokenizer: a merge": _merged,
    "special tokens: another end": _json("tokenizer_config.json", eos_token="<|bos|>"),
    "config: rope_theta": _json("config.json", rope_theta=500.0),
    "config: rms_norm_eps": _json("config.json", rms_norm_eps=1e-2),
    "config: hidden_act": _json("config.json", hidden_act="gelu_pytorch_tanh"),
    "generation_config: another end": _json("generation_config.json", eos_token_id=[258]),
}
NAMES = tuple(CHANGES)


def under_a_run(seed, tries):
    """Even seeds start the run again, odd ones open it."""
    source = finished_run()

    def one(number):
        name = NAMES[number // 2 % len(NAMES)]
        with scratch() as path:
            run = copy_run(source, path / "run")
            base = copy_run(base_folder(), path / "base")
            CHANGES[name](base)
            config = tiny_config(base, eval_every=4)
            try:
                with opened.heard() as said:
                    if number % 2:
                        molora_jax.load_run(str(run), config=config)
                        notes = []
                    else:
                        _, notes = opened.resumed(config, run)
            except InputError as error:
                return f"refused unchanged: {error}" if name == NO_CHANGE else misnamed(error)
        text = (said.getvalue() + "\n".join(notes)).lower()
        words = ("base", "tokenizer", "template", "config.json", "end token", "eos")
        told = any(word in line and ("was" in line or "other" in line) for line in text.splitlines() for word in words)
        if name == NO_CHANGE or told:
            return ""
        return f"{name}: {'evaluation' if number % 2 else 'a start'} took it without a word"

    return each(seed, tries, one)


def under_a_cache(seed, tries):
    """Tokenised data of the cache belong to their tokenizer: what is built with it is what is built without."""

    def built(base):
        config = tiny_config(base)
        tokenizer = load_base(config.base.source).tokenizer
        made = data.build(config.data, tokenizer=tokenizer, batch_size=8, seed=0)
        return [made.splits["train"].example(i) for i in range(8)]

    def one(number):
        name = NAMES[number % len(NAMES)]
        with scratch() as path:
            base = copy_run(base_folder(), path / "base")
            with changed(os.environ, MOLORA_CACHE=str(path / "warm")):
                built(base)
                CHANGES[name](base)
                found = built(base)
            with changed(os.environ, MOLORA_CACHE=str(path / "cold")):
                wanted = built(base)
        return "" if found == wanted else f"{name}: the ids of the old one came out of the cache"

    return each(seed, tries, one)
