"""The default mixture with SmolLM2's tokenizer, and on the random model's byte tokenizer."""

import pytest

from configs.common import get_config
from molora_jax.data import build
from molora_jax.io import fetch, gguf, gguf_tokenizer
from molora_jax.io.tokenizer import byte_tokenizer


@pytest.fixture(scope="module")
def smollm2():  # of the module, so that it is read before the tests' own cache is set
    return gguf_tokenizer.tokenizer(gguf.read(fetch.package_file("smollm2-135m-instruct")))


@pytest.mark.slow
def test_default_mixture(smollm2, own_cache):
    config = get_config().data
    data = build(config, tokenizer=smollm2, batch_size=8, seed=0)
    written = {path: path.stat().st_mtime_ns for path in own_cache.rglob("*.npz")}
    again = build(config, tokenizer=smollm2, batch_size=8, seed=0)
    assert written == {path: path.stat().st_mtime_ns for path in own_cache.rglob("*.npz")} != {}
    assert again.fingerprint == data.fingerprint
    report = data.report()
    assert report["padding"] < 0.10 and report["targets_per_row"] <= 64
    assert sum(row["skipped"] for row in report["tasks"].values()) < 20
    tokenizer = smollm2
    for item in data.heldout("test", 3):
        chat = [dict(role="user", content=item.prompt)]
        assert list(item.context_ids) == tokenizer.encode_chat(chat, add_generation_prompt=True)
        assert list(item.target_ids) == [*tokenizer.encode(item.target), tokenizer.eos_id]


def test_the_random_model_takes_the_default_mixture():
    """Bytes are longer than tokens: much is skipped, and said, but the long tasks have examples too."""
    config = get_config().data
    config.tasks = "translate,factbook,topic,dialog,code"
    data = build(config, tokenizer=byte_tokenizer(), batch_size=8, seed=0)
    assert all(row["train"] > 20 for row in data.report()["tasks"].values())
    assert len(data.train.batch(0)["tokens"]) == 8
