"""Files from strangers, mutated: a named error or a right load, in bounded memory and time, and no code of theirs runs.

A right load: every parameter is finite and of its declared shape, the tokenizer encodes and decodes; what a mutation
leaves readable is that file's own content, and its digest says so.
"""

import contextlib
import functools
import json
import pathlib
import random
import resource
import shutil

import numpy as np

from launch import flags
from molora_jax import data
from molora_jax.data import cache
from molora_jax.errors import InputError
from molora_jax.io import tensors
from molora_jax.io.base import load_base
from molora_jax.io.tokenizer import byte_tokenizer
from molora_jax.runs import saved, warm_start
from molora_jax.runs.manifest import json_hash
from molora_jax.runs.metrics_file import cut
from tests.faults import mutate
from tests.faults.common import base_folder, finished_run, folder, limited, scratch, tiny_config, write_rows
from tests.faults.report import each, misnamed
from tests.io import tiny_files

MEMORY = 1 << 30  # bytes that a load may map beyond what the process has
TURNS = [{"role": "user", "content": "A b."}, {"role": "assistant", "content": "c"}]
CONFIG_PY = b"""from configs import common


def get_config():
    config = common.get_config()
    config.base.source = "random:tiny"
    config.method.rules = dict(all=common.rule("q,v", adapter=common.adapter(rank=2)))
    return config
"""


def canary() -> pathlib.Path:
    return folder() / "canary"


def bounded(call) -> str:
    """Runs `call`, which may raise InputError alone, under the limit; "" or what is wrong."""
    canary().unlink(missing_ok=True)
    try:
        with limited(resource.RLIMIT_AS, more=MEMORY):
            call()
    except InputError as error:
        wrong = misnamed(error)
        if wrong:
            return wrong
    return "code of the file ran" if canary().exists() else ""


def use(base):
    """What a run does with a base before its first step."""
    leaves = []

    def walk(tree):
        for value in tree.values():
            walk(value) if isinstance(value, dict) else leaves.append(value)

    walk(base.params)
    assert leaves and all(np.isfinite(leaf.astype(np.float32)).all() for leaf in leaves), "not finite"
    assert len(leaves) == len(base.config.shapes()), "leaves are missing"
    text = base.tokenizer
    ids = text.encode("A b.\n")
    assert all(0 <= i < base.config.vocab for i in ids), f"an id of {ids} lies outside the vocabulary"
    text.decode(ids)
    text.encode_chat(TURNS, add_generation_prompt=False)


def _of_base(name, change, *, prepare=lambda path: None):
    """Tries that change one file of a base folder."""

    def tries_of(seed, tries):
        source = base_folder()

        def one(number):
            rng = random.Random(number)
            with scratch() as path:
                base = path / "base"
                shutil.copytree(source, base)
                prepare(base)
                file = base / name
                file.write_bytes(change(file.read_bytes(), rng))
                return bounded(lambda: use(load_base(f"dir:{base}")))

        return each(seed, tries, one)

    return tries_of


def _shards(base):
    whole = tensors.read(base / "model.safetensors")
    names = sorted(whole)
    for index, part in enumerate((names[::2], names[1::2])):
        shapes = {name: whole[name].shape for name in part}
        tensors.write(base / f"part-{index}.safetensors", shapes, np.float32, (whole[name] for name in part))
    weight_map = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(names)}
    (base / "model.safetensors").unlink()
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _generation(base):
    settings = {"eos_token_id": [259, 258], "bos_token_id": 257, "pad_token_id": 256, "temperature": 0.6, "top_p": 0.9}
    (base / "generation_config.json").write_text(json.dumps(settings))


def _template(base):
    settings = json.loads((base / "tokenizer_config.json").read_text())
    (base / "chat_template.jinja").write_text(settings["chat_template"])


safetensors = _of_base("model.safetensors", mutate.safetensors)
index = _of_base("model.safetensors.index.json", mutate.json_bytes, prepare=_shards)
config_json = _of_base("config.json", mutate.json_bytes)
tokenizer_json = _of_base("tokenizer.json", mutate.json_bytes)
tokenizer_config = _of_base("tokenizer_config.json", mutate.json_bytes)
generation_config = _of_base("generation_config.json", mutate.json_bytes, prepare=_generation)
chat_template = _of_base("chat_template.jinja", mutate.bytes_of, prepare=_template)


def gguf(seed, tries):
    raw, _ = tiny_files.llama_gguf()

    def one(number):
        with scratch() as path:
            file = path / "model.gguf"
            file.write_bytes(mutate.gguf(raw, random.Random(number)))
            try:
                return bounded(lambda: use(load_base(f"gguf:{file}")))
            finally:
                shutil.rmtree(folder() / "cache" / "converted", ignore_errors=True)

    return each(seed, tries, one)


@functools.cache
def _row_lines():
    messages = {"messages": [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Good day."}]}
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
    return [
        {"prompt": "Double 3", "target": "6"}, {"prompt": "Double 4", "target": "8", "task": "double"}, messages,
        {**messages, "tools": tools}, {"instruction": "Add", "input": "1 2", "output": "3"},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]},
        {"prompt": "a", "completion": "b"},
    ]  # fmt: skip


def jsonl(seed, tries):
    """Any row at all: it is used, or it is bad (named, or skipped and counted)."""
    config, tokenizer = tiny_config(), byte_tokenizer()

    def one(number):
        rng = random.Random(number)
        with scratch() as path:
            file = write_rows(path / "rows.jsonl", 20)
            lines = file.read_bytes().splitlines()
            lines[rng.randrange(20)] = mutate.json_bytes(json.dumps(rng.choice(_row_lines())).encode(), rng)
            file.write_bytes(b"\n".join(lines) + b"\n")
            config.data.update(tasks=f"jsonl:{file}", bad_rows=rng.choice(("skip", "error")))

            def build():
                with_rows = data.build(config.data, tokenizer=tokenizer, batch_size=8, seed=0)
                ids = np.concatenate([task.ids for task in with_rows.tasks])
                assert ((0 <= ids) & (ids < tokenizer.vocab_size)).all(), "ids outside the vocabulary"

            return bounded(build)

    return each(seed, tries, one)


def parquet(seed, tries):
    """A parquet file, of plain and of nested columns, packed in one way or another: it is used or refused by name."""
    import pyarrow as pa
    import pyarrow.parquet

    config, tokenizer = tiny_config(), byte_tokenizer()
    turns = [[dict(role="user", content=f"q{i}"), dict(role="assistant", content=f"a{i}")] for i in range(300)]
    plain = dict(prompt=[f"Double {i}" for i in range(300)], target=[str(2 * i) for i in range(300)])
    sources = []
    with scratch() as path:
        file = path / "rows.parquet"
        for columns in (plain, dict(messages=turns, number=list(range(300)))):
            for options in (dict(), dict(compression="gzip"), dict(compression="none", use_dictionary=False)):
                pyarrow.parquet.write_table(pa.table(columns), file, **options)
                sources.append(file.read_bytes())
        config.data.tasks = f"parquet:{file}"
        data.build(config.data, tokenizer=tokenizer, batch_size=8, seed=0)  # its threads start outside the limit

    def one(number):
        rng = random.Random(number)
        with scratch() as path:
            file = path / "rows.parquet"
            raw = rng.choice(sources)
            if rng.random() < 0.5:
                file.write_bytes(mutate.bytes_of(raw, rng))
            else:  # in its end, where the names, types, counts and places of all pages are
                size = min(len(raw), 8 + int.from_bytes(raw[-8:-4], "little"))
                file.write_bytes(raw[:-size] + mutate.flip(raw[-size:], rng))
            config.data.update(tasks=f"parquet:{file}", bad_rows=rng.choice(("skip", "error")))

            def build():
                ids = data.build(config.data, tokenizer=tokenizer, batch_size=8, seed=0).tasks[0].ids
                assert ((0 <= ids) & (ids < tokenizer.vocab_size)).all(), "ids outside the vocabulary"

            return bounded(build)

    return each(seed, tries, one)


def config_file(seed, tries):
    """A config of the user's that was damaged. It is code of the user's own, so it may run."""

    def one(number):
        with scratch() as path:
            file = path / "config.py"
            file.write_bytes(mutate.bytes_of(CONFIG_PY, random.Random(number)))
            return bounded(lambda: flags.parse("", [], [f"--config={file}"]))

    return each(seed, tries, one)


def run_config(seed, tries):
    """`config.json` of a workdir."""
    source = finished_run()

    def one(number):
        rng = random.Random(number)
        with scratch() as path:
            (path / "config.json").write_bytes(mutate.json_bytes((source / "config.json").read_bytes(), rng))
            return bounded(lambda: saved.read_config(path))

    return each(seed, tries, one)


def data_cache(seed, tries):
    """A file of the data cache is made anew or right; a pickle in it is not read."""
    arrays = {"ids": np.arange(50, dtype=np.int32), "meta": cache.pack_json({"name": "a"}), "none": np.zeros(0)}
    cache.save("hostile", arrays)
    raw = (cache.folder() / "hostile.npz").read_bytes()

    def one(number):
        file = cache.folder() / "hostile.npz"
        file.write_bytes(mutate.npz(raw, random.Random(number), canary()))
        loaded = []
        wrong = bounded(lambda: loaded.append(cache.load("hostile")))
        same = loaded and (
            loaded[0] is None or all(np.array_equal(loaded[0].get(name), array) for name, array in arrays.items())
        )
        return wrong or ("" if same else f"other arrays: {loaded}")

    return each(seed, tries, one)


def metrics(seed, tries):
    """Rows that are no rows are cut; the picture of the rest is drawn or refused by name."""
    from molora_jax.training.loss_picture import plot_loss

    source = finished_run()

    def one(number):
        rng = random.Random(number)
        with scratch() as path:
            lines = (source / "metrics.jsonl").read_bytes().splitlines(keepends=True)
            at = rng.randrange(len(lines))
            lines[at] = mutate.json_bytes(lines[at], rng) + rng.choice((b"", b"\n"))
            (path / "metrics.jsonl").write_bytes(b"".join(lines))

            def read():
                cut(path / "metrics.jsonl", 6)
                plot_loss(path)

            return bounded(read)

    return each(seed, tries, one)


def manifest(seed, tries):
    """A manifest made by hand, with a checksum that holds: an error, a fallback, or the values as they were."""
    from tests.faults import opened

    source = finished_run()
    good, config = opened.checkpoint(source, 6), tiny_config(eval_every=4)
    with scratch() as path:
        as_it_was = opened.resumed(config, shutil.copytree(source, path / "run"))[0]

    def one(number):
        rng = random.Random(number)
        with scratch() as path:
            run = path / "run"
            shutil.copytree(source, run)
            file = run / "checkpoints" / "6" / "manifest.json"
            body = {k: v for k, v in json.loads(file.read_text()).items() if k != "checksum"}
            body = mutate.tree(body, rng)
            if isinstance(body, dict):
                with contextlib.suppress(ValueError, UnicodeError):
                    body["checksum"] = json_hash(body)
            file.write_bytes(json.dumps(body).encode("utf-8", "surrogatepass"))
            found = []
            if number % 4 == 3:
                return bounded(lambda: warm_start.load(str(run)))
            wrong = bounded(lambda: found.append(opened.newest(run)))
            if wrong or not found:
                return wrong
            step, values, notes = found[0]
            if step == 6 and values != good:  # such as a tree without the optimizer: what does a start say?
                starts = []
                wrong = bounded(lambda: starts.append(opened.resumed(config, run)[0]))
                return wrong or ("other values without a word" if starts and starts[0] != as_it_was else "")
            return "" if step == 6 or any("skipped" in note for note in notes) else f"step {step} without a word"

    return each(seed, tries, one)
