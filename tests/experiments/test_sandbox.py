"""The sandbox base: its text, its n-grams, the reader of `sandbox:6m`; pretraining itself is slow."""

import collections
import json
import math
import shutil

import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from configs import common
from experiments.sandbox import __main__ as sandbox
from experiments.sandbox import corpus, pretrain, report, text
from experiments.sandbox.ngrams import KneserNey
from molora_jax import config as schema
from molora_jax.backbones.families import TINY
from molora_jax.errors import InputError
from molora_jax.evaluation.run import load_run
from molora_jax.io import base as bases
from molora_jax.io import sandbox as shipped
from molora_jax.runs import saved

WORDS = "the river and the stone stand by the old house where nobody lives, 1234 years  later\n\nit is a tower. ".split(
    " "
)
DOCS = [
    (f"{i}", " ".join(np.random.default_rng(i).choice(WORDS, 300).tolist()), i % 5 == 0) for i in range(20)
]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return text.trained_tokenizer((part for _, part, _ in DOCS), 320)


def test_pieces_are_the_document_and_fill_a_row(tokenizer):
    for _, whole, _ in DOCS[:5]:
        found = text.pieces(whole, tokenizer, 64)
        assert "".join(found) == whole
        ids = [tokenizer.encode(piece) for piece in found]
        assert max(map(len, ids)) <= 64 and min(map(len, ids[:-1])) > 50
        assert sum(ids, []) == tokenizer.encode(whole)  # cut where the tokenizer would have cut
    assert tokenizer.eos_id == 0 and 257 < tokenizer.vocab_size <= 320
    assert tokenizer.decode(tokenizer.encode("unseen: \u00e9\u4e2d\U0001f600")) == "unseen: \u00e9\u4e2d\U0001f600"


def test_kneser_ney_sums_to_one_and_is_the_formula():
    rows = [np.random.default_rng(i).integers(0, 5, 40).tolist() for i in range(3)]
    for order in (2, 3):
        model = KneserNey(rows, order=order, vocabulary=6)  # token 5 was never seen
        for history in np.ndindex(*(6,) * (order - 1)):
            total = sum(math.exp(-model.nll([*history, w])[-1]) for w in range(6))
            assert total == pytest.approx(1)
    # bigrams by hand
    pairs = collections.Counter(pair for row in rows for pair in zip(row, row[1:], strict=False))
    before = collections.Counter(w for _, w in pairs)  # different words before w

    def discount(counts):
        once, twice = (sum(c == k for c in counts.values()) for k in (1, 2))
        return once / (once + 2 * twice) if once else 0.5

    def p(h, w):
        d1, d2 = discount(before), discount(pairs)
        low = max(before[w] - d1, 0) / len(pairs) + d1 * len(before) / len(pairs) / 6
        seen = sum(c for (a, _), c in pairs.items() if a == h)
        types = len([1 for a, _ in pairs if a == h])
        return max(pairs[h, w] - d2, 0) / seen + d2 * types / seen * low

    model = KneserNey(rows, order=2, vocabulary=6)
    got = model.nll([0, 3, 2, 5])
    assert np.exp(-got) == pytest.approx([p(0, 3), p(3, 2), p(2, 5)])


def test_documents_are_held_out_whole_and_the_same_each_time(monkeypatch):
    monkeypatch.setattr(corpus, "LONGEST", 2000)
    docs = [(str(i), "x" * 100) for i in range(100)]
    found = corpus._chosen("a", docs)
    assert found == corpus._chosen("a", docs[::-1]) and sum(len(part) for _, part, _ in found) == 2000
    monkeypatch.setattr(corpus, "LONGEST", 10**9)
    assert 0 < sum(held for *_, held in corpus._chosen("a", [(str(i), "x") for i in range(1000)])) < 50
    assert [name for name, *_ in corpus._chosen("b", docs)] == sorted(name for name, _ in docs)


def test_docstrings_are_read_as_data(tmp_path):
    long = "Says what it does in a sentence that is long enough to be kept, " * 3
    path = tmp_path / "a.py"
    path.write_text(f'raise SystemExit\n\ndef f():\n    """{long}"""\n\ndef g():\n    """Short."""\n')
    (tmp_path / "bad.py").write_text("def (")
    found = dict(corpus._docstrings([("a.py", path), ("b.py", path), ("bad.py", tmp_path / "bad.py")]))
    assert list(found) == ["a.py"] and found["a.py"].strip() == long.strip()


def test_sources_by_name():
    assert sandbox.chosen("python,bible") == ["bible", "python"] and len(sandbox.chosen("all")) == 5
    with pytest.raises(InputError, match="--sources: got 'bibel'.*'bible'"):
        sandbox.chosen("bibel")


def test_the_base_that_ships_is_the_pinned_one():
    base = bases.load_base("sandbox:6m")
    assert base.config.layers == 6 and base.config.vocab == base.tokenizer.vocab_size == 4096
    count = sum(math.prod(leaf.shape) for leaf in base.config.shapes().values())
    assert 4e6 < count < 8e6
    assert (base.folder / "model.safetensors").stat().st_size < 16e6
    assert len(base.tokenizer.encode("1234")) == 4  # digits stand alone
    config = common.get_config()
    config.base.source, config.method.train_base = "sandbox:6m", "all"
    schema.validate(config)
    config.base.source = "sandbox:7m"
    with pytest.raises(InputError, match="sandbox: and one of 6m"):
        schema.validate(config)


def test_a_damaged_base_is_refused(tmp_path, monkeypatch):
    here = tmp_path / "bases"
    shutil.copytree(shipped.HERE, here)
    monkeypatch.setattr(shipped, "HERE", here)
    monkeypatch.setenv("MOLORA_CACHE", str(tmp_path / "cache"))
    assert shipped.folder("6m") == here / "6m"
    weights = here / "6m" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0\1"[:1])
    with pytest.raises(InputError, match="as it was pinned"):
        shipped.folder("6m")
    weights.unlink()
    with pytest.raises(InputError, match="python -m experiments.sandbox"):
        shipped.folder("6m")


@pytest.mark.pictures
def test_the_report_says_all_numbers(tmp_path):
    row = dict(bigram=5.0, trigram=4.5, base=4.0, tokens=100, bytes=400)
    listed = dict(
        version="a 1", licence="MIT", documents=3, held_out=1, characters=10, characters_held_out=2, sha256="ab" * 32
    )
    found = dict(
        setting=dict(steps=2), corpus=dict(bible=listed), nll=dict(bible=row, python=row | dict(base=3.0, tokens=300)),
        samples={"In the": " beginning\n"}, curve=[[100, 8.0], [200, 4.0]],
    )  # fmt: skip
    report.write(tmp_path, found)
    lines = (tmp_path / "results.md").read_text()
    assert "| all | | 5.000 | 4.500 | 3.250 | |" in lines and "- **In the** beginning\\n" in lines
    assert "| bible | 100 | 5.000 | 4.500 | 4.000 | 1.44 |" in lines  # 4 nats / (4 bytes ln 2)
    assert (tmp_path / "results.png").stat().st_size > 1000


def test_a_run_whose_held_out_rows_are_data_valid_alone_opens_without_them():
    """`load_run` checks a config without its files: an interval of evaluation is then of nothing."""
    config = common.get_config()
    config.method.train_base = "all"
    config.data.update(tasks="jsonl:gone.jsonl", valid="jsonl:gone too.jsonl", test_share=0.0)
    config.train.eval_every = 10
    schema.validate(saved.without_inputs(config))


@pytest.mark.slow
def test_pretraining_from_text_to_a_base(tmp_path, tokenizer, monkeypatch):
    """The whole way, tiny: the loss falls, a second call does nothing, the base in bfloat16 is what was trained."""
    monkeypatch.setattr(pretrain, "SHAPE", TINY)
    monkeypatch.setattr(pretrain, "WARMUP", 2)
    monkeypatch.setattr(corpus, "documents", lambda sources: {"python": DOCS})
    monkeypatch.setenv("MOLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(text, "VOCABULARY", 320)
    argv = ["--sources=python", "--steps=6", "--decay=4", "--rows=8", "--items=2"]
    argv += [f"--workdir={tmp_path}/work", f"--out={tmp_path}/out"]
    assert sandbox.main(argv) == 0
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["curve"][-1][1] < found["curve"][0][1] and found["nll"]["python"]["base"] < 6
    weights = tmp_path / "work" / "6m" / "model.safetensors"
    first = weights.read_bytes()
    assert sandbox.main(argv) == 0 and weights.read_bytes() == first
    run, base = load_run(tmp_path / "work" / "decay", "latest"), bases.load_base(f"dir:{tmp_path}/work/6m")
    assert not np.array_equal(run.params["embed"], run.base_params["embed"])
    for path, value in flatten_dict(run.params).items():
        written = flatten_dict(base.params)[path]
        np.testing.assert_array_equal(written, np.asarray(value).astype(ml_dtypes.bfloat16).astype(np.float32))
    assert shipped.cached("6m", sandbox.digests(weights.parent)["model.safetensors"]).is_dir()
    with pytest.raises(InputError, match="--sources"):
        sandbox.main(["--sources=bible", *argv[1:]])
