"""Leaves of a base that are read where they are asked for: the same numbers, and each process its own part."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict

from molora_jax import sharding
from molora_jax.errors import InputError
from molora_jax.io.base import load_base
from tests.io import tiny_files

ROOT = pathlib.Path(__file__).parents[2]
MEASURE = """
import json, sys
from molora_jax import runtime
runtime.configure(several=True)
import jax
from molora_jax import sharding
from molora_jax.io import fetch, huggingface
from molora_jax.io.base import load_base

jax.block_until_ready(jax.numpy.ones(3) + 1)
read, hashed, copy, sha = [0], [], huggingface.Stored._copy, fetch.file_sha256
def counted(self, name, index, out):
    copy(self, name, index, out)
    read[0] += out.nbytes
huggingface.Stored._copy = counted
fetch.file_sha256 = lambda path: (hashed.append(path.name), sha(path))[1]
status = lambda name: next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(name)) * 1024
open("/proc/self/clear_refs", "w").write("5")  # the peak from here on
before = status("VmRSS")
base = load_base("dir:" + sys.argv[1], stored=True)
mesh = sharding.make_mesh(dict(data=1, fsdp=jax.device_count(), expert=1, tensor=1))
params = sharding.put(base.params, sharding.param_shardings(base.config, base.params, mesh))
jax.block_until_ready(params)
share = sum(s.data.nbytes for x in jax.tree.leaves(params) for s in x.addressable_shards)
whole = sum(x.nbytes for x in jax.tree.leaves(params))
print(json.dumps(dict(peak=status("VmHWM") - before, share=share, whole=whole, read=read[0], hashed=hashed,
                      digest=base.digest)))
"""


def sharded(folder, config, seed=0):
    """A model of random weights in four safetensors files with an index."""
    values = tiny_files.hf_tensors(config, seed)
    tiny_files.write_hf_folder(folder, config, values)
    (folder / "model.safetensors").unlink()
    names = sorted(values)
    held = {f"model-{i}-of-4.safetensors": names[i::4] for i in range(4)}
    for file, own in held.items():
        safetensors.numpy.save_file({name: values[name] for name in own}, folder / file)
    weight_map = {name: file for file, own in held.items() for name in own}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_a_part_is_what_the_whole_has_there(tmp_path, monkeypatch):
    monkeypatch.setenv("MOLORA_CACHE", str(tmp_path / "cache"))
    folder = sharded(tmp_path / "model", tiny_files.llama_config(tie_word_embeddings=False))
    whole, stored = (load_base(f"dir:{folder}", dtype="bfloat16", stored=how) for how in (False, True))
    assert whole.digest == stored.digest
    mesh = sharding.make_mesh(dict(data=2, fsdp=2, expert=1, tensor=2))
    shardings = sharding.param_shardings(stored.config, stored.params, mesh)
    put = sharding.put(stored.params, shardings)
    flat, ours = flatten_dict(whole.params, sep="/"), flatten_dict(stored.params, sep="/")
    for path, leaf in flatten_dict(put, sep="/").items():
        np.testing.assert_array_equal(leaf, flat[path])
        assert (ours[path].shape, ours[path].dtype, ours[path].nbytes) == (leaf.shape, leaf.dtype, leaf.nbytes)
    kernel = ours["blocks/down/kernel"]
    for index in (np.s_[1:, 3:5], np.s_[:, :, 7:], np.s_[0:1, 2:4, 1:2], np.s_[...]):
        np.testing.assert_array_equal(kernel[index], flat["blocks/down/kernel"][index])
    np.testing.assert_array_equal(np.asarray(ours["final_norm"]), flat["final_norm"])


def test_a_part_that_is_not_finite_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("MOLORA_CACHE", str(tmp_path / "cache"))
    config = tiny_files.llama_config(tie_word_embeddings=False)
    values = tiny_files.hf_tensors(config)
    values["model.layers.1.mlp.up_proj.weight"][3, 4] = np.nan
    folder = tiny_files.write_hf_folder(tmp_path / "model", config, values)
    base = load_base(f"dir:{folder}", stored=True)
    with pytest.raises(InputError, match=r"layers.1.mlp.up_proj.weight.*NaN"):
        jax.tree.map(np.asarray, base.params)


@pytest.mark.slow
def test_each_of_two_processes_reads_its_share(tmp_path):
    """A base of some hundred MB in four files: what a process reads, and its peak memory over what it had before."""
    config = tiny_files.llama_config(
        num_hidden_layers=8, hidden_size=1024, intermediate_size=3072, num_attention_heads=16, num_key_value_heads=8,
        vocab_size=16384, tie_word_embeddings=False,
    )  # fmt: skip
    folder = sharded(tmp_path / "model", config)
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    env = os.environ | dict(JAX_PLATFORMS="cpu", XLA_FLAGS="", PYTHONPATH=str(ROOT), MOLORA_PROCESSES="2")
    env |= dict(MOLORA_COORDINATOR=f"localhost:{port}")
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", MEASURE, str(folder)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=env | dict(MOLORA_PROCESS=str(i), MOLORA_CACHE=str(tmp_path / f"cache-{i}")),
        )
        for i in range(2)
    ]  # fmt: skip
    said = [process.communicate(timeout=600) for process in processes]
    assert all(process.returncode == 0 for process in processes), said
    found = [json.loads(out.splitlines()[-1]) for out, _ in said]
    for one in found:
        print(one)
        assert one["whole"] > 4e8 and one["share"] < 0.51 * one["whole"], "norms are everywhere, all else is split"
        assert one["read"] == one["share"]
        assert one["peak"] < 1.3 * one["share"], one["peak"] / one["share"]
        assert len(one["hashed"]) == 2
    assert not set(found[0]["hashed"]) & set(found[1]["hashed"])
    assert {one["digest"] for one in found} == {load_base(f"dir:{folder}", stored=True).digest}
