"""Every file of a workdir and of the caches, damaged: a named error, a fallback with a warning, or the same results.

The damaged copy is opened in this process, as a resume and as an evaluation would, and compared with the whole one.
"""

import functools
import json
import os
import random
import shutil

import numpy as np

from molora_jax import data
from molora_jax.data import cache
from molora_jax.errors import InputError
from molora_jax.io.base import load_base
from molora_jax.io.tokenizer import byte_tokenizer
from tests.faults import opened
from tests.faults.common import (
    DAMAGES,
    arrays_digest,
    changed,
    copy_run,
    damage,
    digests,
    finished_run,
    folder,
    metric_rows,
    scratch,
    start,
    tiny_config,
)
from tests.faults.report import each, misnamed
from tests.io import tiny_files

RECORDS = ("config.json", "identity.json", "checkpoints/best.json")


def _files(path):
    return sorted(p for p in path.rglob("*") if p.is_file())


def checkpoint(seed, tries):
    """A file of the newest step: the step is skipped by name, or nothing that counts has changed."""
    source = finished_run()
    good = {step: opened.checkpoint(source, step) for step in (4, 6)}

    def one(number):
        rng = random.Random(number)
        with scratch() as path:
            run = copy_run(source, path / "run")
            files = _files(run / "checkpoints" / "6")
            done = damage(rng.choice(files), rng.choice(DAMAGES), rng, files)
            try:
                step, values, notes = opened.newest(run)
            except InputError as error:
                return misnamed(error)
        if values != good[step]:
            return f"{done}: other values, step {step}"
        skipped = any("checkpoint 6 is skipped" in note for note in notes)
        return "" if skipped == (step == 4) else f"{done}: step {step}, {notes}"

    return each(seed, tries, one)


def _damaged_record(run, number):
    """Damages one of the small files that say what the run is, or a manifest; returns what was done."""
    rng = random.Random(number)
    names = [*RECORDS, "checkpoints/6/manifest.json"]
    path = run / names[number % len(names)]
    kind = DAMAGES[number // len(names) % len(DAMAGES)]
    if kind == "flip" and rng.random() < 0.7:
        return _altered(path, rng)
    return damage(path, kind, rng, [run / name for name in names])


def _altered(path, rng) -> str:
    """A number or a word of a JSON file becomes another: it still reads, as a hand or a stray bit would leave it."""
    tree, leaves = json.loads(path.read_text()), []

    def walk(node, at):
        for key, value in node.items():
            walk(value, f"{at}.{key}") if isinstance(value, dict) else leaves.append((node, key, f"{at}.{key}"))

    walk(tree, "")
    wanted = [leaf for leaf in leaves if rng.random() < 0.5 or leaf[1] in ("alpha", "k", "dtype", "step")] or leaves
    holder, key, at = rng.choice(wanted)
    old = holder[key]
    if isinstance(old, bool):
        holder[key] = not old
    elif isinstance(old, (int, float)):
        holder[key] = old * 2 if old else 1
    elif isinstance(old, str):
        holder[key] = {"float32": "bfloat16", "bfloat16": "float32"}.get(old, old[:-1] if old else "a")
    else:
        holder[key] = [] if old else [1]
    path.unlink()
    path.write_text(json.dumps(tree))
    return f"{path.name}: {at[1:]} was {str(old)[:40]!r}, is {str(holder[key])[:40]!r}"


def evaluated(seed, tries):
    """`load_run` of a run one of whose records is damaged: the same model and step, or it is said."""
    source = finished_run()
    good = {step: opened.loaded(source, step) for step in (4, 6)}
    assert opened.loaded(source) == good[4], "the best step is 4"

    def one(number):
        with scratch() as path:
            run = copy_run(source, path / "run")
            done = _damaged_record(run, number)
            try:
                with opened.heard() as said:
                    found = opened.loaded(run)
            except InputError as error:
                return misnamed(error)
        step = found["step"]
        told = any(word in said.getvalue() for word in (*RECORDS, "best.json", "skipped"))
        if found != good[step]:
            other = [key for key in found if found[key] != good[step][key]]
            return "" if told else f"{done}: other {', '.join(other)}, without a word"
        return "" if step == 4 or told else f"{done}: step {step} in place of 4, without a word"

    return each(seed, tries, one)


def resumed(seed, tries):
    """A start on a run one of whose records is damaged: the same state and identity, or it is said."""
    source = finished_run()
    config = tiny_config(eval_every=4)
    with scratch() as path:
        good = {6: opened.resumed(config, copy_run(source, path / "six"))[0]}
        four = copy_run(source, path / "four")
        shutil.rmtree(four / "checkpoints" / "6")
        good[4] = opened.resumed(config, four)[0]

    def one(number):
        with scratch() as path:
            run = copy_run(source, path / "run")
            done = _damaged_record(run, number)
            try:
                with opened.heard() as said:
                    found, notes = opened.resumed(config, run)
            except InputError as error:
                return misnamed(error)
        said = said.getvalue() + "\n".join(notes)
        if found != good.get(found["step"]):
            return f"{done}: another state at step {found['step']}, without a word"
        return "" if found["step"] == 6 or "skipped" in said else f"{done}: step {found['step']}, without a word"

    return each(seed, tries, one)


def metrics(seed, tries):
    """A start on a run whose metrics.jsonl is damaged: what is lost is said, the rest stays, the run is as it was."""
    source = finished_run()
    config, wanted, state = tiny_config(eval_every=4), metric_rows(source), digests(source, 6)

    def one(number):
        rng = random.Random(number)
        with scratch() as path:
            run = copy_run(source, path / "run")
            kinds = [kind for kind in DAMAGES if kind != "swap"]
            file = run / "metrics.jsonl"
            done = damage(file, kinds[number % len(kinds)], rng)
            try:
                with opened.heard() as said:
                    result, notes = start(config, run)
            except InputError as error:
                return "" if "metrics.jsonl" in str(error) else misnamed(error, "metrics.jsonl")
            if result.step != 6 or digests(run, 6) != state:
                return f"{done}: the state has changed"
            lost = sorted(set(wanted) - set(metric_rows(run)))
            told = "metrics.jsonl" in said.getvalue() + "\n".join(notes)
            return f"{done}: rows {lost} are lost without a word" if lost and not told else ""

    return each(seed, tries, one)


def lock(seed, tries):
    """The lock file of a run that nobody holds, damaged: a start goes on, or says what is in the way."""
    source = finished_run()
    config = tiny_config(eval_every=4)

    def one(number):
        kinds = [kind for kind in DAMAGES if kind != "swap"]
        with scratch() as path:
            run = copy_run(source, path / "run")
            damage(run / "lock", kinds[number % len(kinds)], random.Random(number))
            try:
                found, _ = opened.resumed(config, run)
            except InputError as error:
                return misnamed(error, str(run))
        return "" if found["step"] == 6 else f"resumed at {found['step']}"

    return each(seed, tries, one)


def verify(seed, tries):
    """`launch.verify`: status 1 exactly where a step is not valid."""
    from launch import verify as command

    source = finished_run()

    def one(number):
        rng = random.Random(number)
        with scratch() as path:
            run = copy_run(source, path / "run")
            done = ""
            if number % 4:
                files = _files(run / "checkpoints" / rng.choice(("2", "4", "6")))
                done = damage(rng.choice(files), rng.choice(DAMAGES), rng, files)
            checkpoints = opened.Checkpoints(run / "checkpoints", keep=9)
            broken = not all(checkpoints.valid(step)[0] for step in checkpoints.steps())
            with opened.heard() as said:
                try:
                    status = command.run([f"--workdir={run}", "--json"])
                except SystemExit as ended:
                    status = ended.code
                except InputError as error:
                    return misnamed(error)
        if bool(status) != broken:
            return f"{done or 'nothing damaged'}: status {status}; {said.getvalue()[-200:]}"
        return ""

    return each(seed, tries, one)


def data_cache(seed, tries):
    """A damaged file of tokenised data is made again, with a warning."""
    with scratch() as path, changed(os.environ, MOLORA_CACHE=str(path / "cache")):  # other rows write to the shared one
        return _data_cache(seed, tries)


def _data_cache(seed, tries):
    config, tokenizer = tiny_config(), byte_tokenizer()

    def ids():
        task = data.build(config.data, tokenizer=tokenizer, batch_size=8, seed=0).tasks[0]
        return np.concatenate([task.ids, task.offsets, task.context, task.split]).tolist()

    wanted = ids()
    (file,) = cache.folder().glob("*.npz")
    whole = file.read_bytes()

    def one(number):
        file.write_bytes(whole)
        done = damage(file, DAMAGES[number % len(DAMAGES)], random.Random(number), [_gguf_file()])
        try:
            with opened.heard() as said:
                found = ids()
        except InputError as error:
            return misnamed(error)
        finally:
            _gguf_file.cache_clear()  # a swap took it
            if file.is_dir():
                file.rmdir()
        if found != wanted:
            return f"{done}: other ids"
        gone = not done or done.startswith(("delete", "extend"))  # what follows a zip is no part of it
        return "" if gone or "building it again" in said.getvalue() else f"{done}: nothing was said"

    return each(seed, tries, one)


@functools.cache
def _gguf_file():
    path = folder() / "model.gguf"
    path.write_bytes(tiny_files.llama_gguf()[0])
    return path


def _base_values(file):
    base = load_base(f"gguf:{file}")
    text = base.tokenizer
    turns = [{"role": "user", "content": "A b."}]
    return [
        base.config, arrays_digest(base.params), base.digest, text.inner.to_str(), text.bos, text.eos, text.pad,
        text.encode_chat(turns, add_generation_prompt=True),
    ]  # fmt: skip


def converted(seed, tries):
    """Any file of a converted base, or of the remembered digests, damaged: an error that names it, or the same base."""
    file = _gguf_file()
    with scratch() as path:  # a cache of this row's own
        with changed(os.environ, MOLORA_CACHE=str(path / "cache")):
            wanted = _base_values(file)
            shutil.copytree(path / "cache", path / "whole")

            def one(number):
                rng = random.Random(number)
                shutil.rmtree(path / "cache")
                shutil.copytree(path / "whole", path / "cache")
                files = _files(path / "cache")
                done = damage(files[number % len(files)], DAMAGES[number // len(files) % len(DAMAGES)], rng, files)
                try:
                    found = _base_values(file)
                except InputError as error:
                    return misnamed(error, str(path / "cache"))
                return "" if found == wanted else f"{done}: another base without a word"

            return each(seed, tries, one)
