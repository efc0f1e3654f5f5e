"""SentencePiece vocabularies of GGUF files against the greedy algorithm itself; how the others cut words."""

import numpy as np
import pytest

from molora_jax.errors import InputError
from molora_jax.io import gguf_tokenizer
from molora_jax.io.gguf import Gguf

SPACE = "\u2581"


def file(**more):
    """A random vocabulary over a few letters whose tokens can all be reached, with scores without an order."""
    rng = np.random.default_rng(3)
    letters = ["a", "b", "c", SPACE, "é"]
    pieces = list(letters)
    while len(pieces) < 60:
        made = "".join(rng.choice(pieces, 2))
        if made not in pieces and len(made) < 7:
            pieces.append(made)
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *pieces, "  ", "<end>"]
    kinds = [2, 3, 3, *[6] * 256, *[1] * len(pieces), 4, 3]
    scores = [0.0] * 259 + [0.0] * 5 + list(-rng.permutation(len(pieces) - 5).astype(float)) + [0.0, 0.0]
    metadata = {
        "general.architecture": "gemma2", "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": np.array(scores, np.float32), "tokenizer.ggml.token_type": np.array(kinds, np.int32),
        "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2,
    }  # fmt: skip
    return Gguf("m.gguf", metadata | {f"tokenizer.ggml.{key}": value for key, value in more.items()}, {})


def greedy(gguf, text, prefix):
    """The algorithm of llama.cpp and SentencePiece: the best neighbours are joined, of equals the leftmost."""
    ids = {token: i for i, token in enumerate(gguf.metadata["tokenizer.ggml.tokens"])}
    kinds, scores = (gguf.metadata[f"tokenizer.ggml.{name}"] for name in ("token_type", "scores"))
    symbols = list((SPACE if prefix else "") + text.replace(" ", SPACE))
    while True:
        unions = [(symbols[i] + symbols[i + 1], i) for i in range(len(symbols) - 1)]
        best = [(-scores[ids[union]], i) for union, i in unions if union in ids and kinds[ids[union]] == 1]
        if not best:
            break
        i = min(best)[1]
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
    out = []
    for symbol in symbols:
        found = ids.get(symbol)
        out += [found] if found is not None else [ids[f"<0x{byte:02X}>"] for byte in symbol.encode()]
    return out


@pytest.mark.parametrize("prefix", [True, False])
def test_scores_join_as_sentencepiece_does(prefix):
    made = file() if prefix else file(add_space_prefix=False)
    tokenizer = gguf_tokenizer.tokenizer(made)
    rng = np.random.default_rng(0)
    lengths = []
    for _ in range(300):
        words = ["".join(rng.choice(list("aabbcé"), rng.integers(1, 9))) for _ in range(rng.integers(1, 6))]
        text = " ".join(words)
        ids = tokenizer.encode(text)
        assert ids == greedy(made, text, prefix), text
        assert tokenizer.decode(ids) == text
        lengths.append(len(ids) / len(text))
    assert np.mean(lengths) < 0.85, "joined, not letter by letter"


def test_bytes_specials_and_user_defined_tokens():
    made = file()
    tokenizer = gguf_tokenizer.tokenizer(made)
    tokens = made.metadata["tokenizer.ggml.tokens"]
    assert [tokens[i] for i in tokenizer.encode("☃")][1:] == ["<0xE2>", "<0x98>", "<0x83>"]
    assert tokenizer.decode(tokenizer.encode("☃ab")) == "☃ab"
    ids = tokenizer.encode("a<end>")
    assert tokens[ids[-1]] == "<end>"
    assert tokens.index("  ") in tokenizer.encode("a  b")
    assert (tokenizer.prefix_ids, tokenizer.eos_id) == ((1,), 2)
    assert gguf_tokenizer.tokenizer(file(add_bos_token=False)).prefix_ids == ()


@pytest.mark.parametrize(
    "more, message",
    [
        (dict(scores=np.array([np.nan] * 321, np.float32)), "scores"),
        (dict(scores=np.zeros(3, np.float32)), "scores"),
        (dict(token_type=np.ones(3, np.int32)), "odd lengths"),
        (dict(tokens=["a" * 1000], scores=np.zeros(1), token_type=np.ones(1, int)), "a token of 1000 characters"),
        (dict(bos_token_id=10**6), "bos_token_id"),
    ],
)
def test_broken_vocabularies(more, message):
    with pytest.raises(InputError, match=message):
        gguf_tokenizer.tokenizer(file(**more))


WORDS = {
    "dbrx": ["I", "'ll", " pay", " ", "123", "45", " €!?\n\n", " ", " HelloWorld", " don", "'T"],
    "gpt-4o": ["I'll", " pay", " ", "123", "45", " €!?\n\n", " ", " Hello", "World", " don'T"],
}


@pytest.mark.parametrize("pre", WORDS)
def test_how_words_are_cut(pre):
    """As tiktoken's cl100k_base (OLMo2, Phi-4) and o200k_base (gpt-oss, Phi-4-mini) cut them."""
    cut, _, ignore = gguf_tokenizer._pre_tokenizer(pre)
    text = "I'll pay 12345 €!?\n\n  HelloWorld don'T"
    found = [text[slice(*span)] for _, span in cut.pre_tokenize_str(text)]
    assert found == WORDS[pre] and not ignore
