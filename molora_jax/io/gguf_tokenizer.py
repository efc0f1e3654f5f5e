"""The tokenizer in a GGUF file's metadata: byte-level BPE (`gpt2`) or SentencePiece's BPE (`llama`).

A `gpt2` file has its merges and names its pre-tokenizer (`tokenizer.ggml.pre`). A `llama` file has scores in place of
merges: of all neighbours whose union is a token, those with the best score are joined first, so each way to cut a token
into two is a merge of its rank. Characters without a token become the tokens `<0x00>` ... of their bytes.
"""

import numpy as np
import tokenizers

from molora_jax.errors import InputError
from molora_jax.io.gguf import Gguf
from molora_jax.io.guard import guarded
from molora_jax.io.tokenizer import Tokenizer

_PRE_OF = {  # architecture -> tokenizer.ggml.pre of all its models, where a file does not say it
    "qwen2": "qwen2", "qwen3": "qwen2", "gpt-oss": "gpt-4o",
}  # fmt: skip
_NORMAL, _UNKNOWN, _SPECIAL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6  # tokenizer.ggml.token_type
_SPACE, _LONGEST = "\u2581", 512
_ELSEWHERE = "Load this model as hf:ORG/NAME or dir:PATH, where tokenizer.json says it all."
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_WORD_END = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_WORDS_4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_WORD_END}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_WORD_END}|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {  # tokenizer.ggml.pre -> how text is cut before any merge
    "llama-bpe": _WORDS % "{1,3}", "smaug-bpe": _WORDS % "{1,3}", "dbrx": _WORDS % "{1,3}", "qwen2": _WORDS % "",
    "gpt-4o": _WORDS_4O,
}  # fmt: skip
_PRE = ("smollm", "gpt-2", *_SPLITS)


def _pre_tokenizer(pre):
    """`tokenizer.ggml.pre` -> (pre-tokenizer, normalizer, ignore_merges), or None where it is unknown."""
    pt = tokenizers.pre_tokenizers
    if pre == "smollm":
        return pt.Sequence([pt.Digits(individual_digits=True), pt.ByteLevel(add_prefix_space=False)]), None, False
    if pre == "gpt-2":
        return pt.ByteLevel(add_prefix_space=False), None, False
    if pre not in _SPLITS:
        return None
    split = pt.Split(tokenizers.Regex(_SPLITS[pre]), "isolated")
    normalizer = tokenizers.normalizers.NFC() if pre == "qwen2" else None
    return pt.Sequence([split, pt.ByteLevel(add_prefix_space=False, use_regex=False)]), normalizer, pre == "llama-bpe"


def tokenizer(gguf: Gguf) -> Tokenizer:
    """The tokenizer in the file's metadata.

    Raises:
      InputError: another kind of tokenizer, an unknown `tokenizer.ggml.pre`, or a broken vocabulary.
    """
    kind = gguf.metadata.get("tokenizer.ggml.model")
    if not isinstance(kind, str) or kind not in ("gpt2", "llama"):
        raise InputError(
            f"{gguf.path}: tokenizer.ggml.model", got=f"{kind!r:.80}", expected="'gpt2' or 'llama'", fix=_ELSEWHERE
        )
    tokens = gguf.get("tokenizer.ggml.tokens", list)
    kinds = gguf.get("tokenizer.ggml.token_type", (np.ndarray, list), np.ones(len(tokens), np.int32))
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) != len(tokens) or len(kinds) != len(tokens):
        raise InputError(f"{gguf.path}: tokenizer", got="repeated tokens or odd lengths", expected="a BPE vocabulary")
    inner, bos_first = (_byte_level if kind == "gpt2" else _scored)(gguf, tokens, kinds, vocab)
    added = [(t, k) for t, k in zip(tokens, kinds, strict=True) if k in (_SPECIAL, _USER_DEFINED)]
    inner.add_tokens([tokenizers.AddedToken(t, special=bool(k == _SPECIAL), normalized=False) for t, k in added])

    def special_id(role):
        index = gguf.metadata.get(f"tokenizer.ggml.{role}_token_id")
        if index is not None and (not isinstance(index, int) or not 0 <= index < len(tokens)):
            raise InputError(f"{gguf.path}: {role}_token_id", got=repr(index), expected=f"an id below {len(tokens)}")
        return index

    def special(role):
        index = special_id(role)
        return None if index is None else tokens[index]

    ends = [special_id(role) for role in ("eos", "eot", "eom")]  # of the text, of a turn, of a message
    listed = gguf.metadata.get("tokenizer.ggml.eos_token_ids", [])
    for index in listed if isinstance(listed, (list, np.ndarray)) else [listed]:
        if not isinstance(index, (int, np.integer)) or not 0 <= index < len(tokens):
            expected = f"ids below {len(tokens)}"
            raise InputError(f"{gguf.path}: eos_token_ids", got=repr(index)[:80], expected=expected)
        ends.append(int(index))
    add_bos = gguf.metadata.get("tokenizer.ggml.add_bos_token", bos_first)
    return Tokenizer(
        inner, bos=special("bos"), eos=special("eos"), pad=special("padding"),
        end_ids=[index for index in ends if index is not None], add_bos=bool(add_bos) and special("bos") is not None,
        template=gguf.metadata.get("tokenizer.chat_template"), where=gguf.path,
    )  # fmt: skip


def _byte_level(gguf, tokens, kinds, vocab):
    """A `gpt2` vocabulary; and whether llama.cpp puts BOS in front where the file does not say it."""
    pre = gguf.metadata.get("tokenizer.ggml.pre", "default")
    if isinstance(pre, str) and pre == "default":  # not said: known where all models of an architecture have the same
        pre = _PRE_OF.get(gguf.metadata.get("general.architecture"), "none, or 'default'")
    parts = _pre_tokenizer(pre) if isinstance(pre, str) else None
    if parts is None:
        raise InputError(
            f"{gguf.path}: tokenizer.ggml.pre", got=f"{pre!r:.80}", expected=f"one of {', '.join(_PRE)}", fix=_ELSEWHERE
        )
    pairs = [tuple(merge.split(" ")) for merge in gguf.get("tokenizer.ggml.merges", list)]
    if any(len(pair) != 2 for pair in pairs):
        raise InputError(f"{gguf.path}: tokenizer", got="a merge that is no pair", expected="a BPE vocabulary")
    pre_tokenizer, normalizer, ignore_merges = parts
    with guarded(f"{gguf.path}: tokenizer", "a BPE vocabulary"):
        inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, pairs, ignore_merges=ignore_merges))
    inner.pre_tokenizer, inner.decoder = pre_tokenizer, tokenizers.decoders.ByteLevel()
    if normalizer is not None:
        inner.normalizer = normalizer
    return inner, pre == "llama-bpe"


def _scored(gguf, tokens, kinds, vocab):
    """A `llama` vocabulary, whose merges follow from its scores."""
    scores = gguf.get("tokenizer.ggml.scores", (np.ndarray, list))
    if len(scores) != len(tokens) or not np.isfinite(np.asarray(scores, np.float64)).all():
        raise InputError(f"{gguf.path}: tokenizer.ggml.scores", got=f"{len(scores)}", expected="a number each token")
    usable = {t for t, k in zip(tokens, kinds, strict=True) if k in (_NORMAL, _USER_DEFINED)}
    longest = max(map(len, usable), default=0)
    if longest > _LONGEST:  # every way to cut it is looked up
        raise InputError(f"{gguf.path}: tokenizer", got=f"a token of {longest} characters", expected=f"<= {_LONGEST}")
    found = []
    for token in usable:
        rank = -float(scores[vocab[token]])
        cuts = ((token[:i], token[i:]) for i in range(1, len(token)))
        found += [(rank, vocab[a], vocab[b], a, b) for a, b in cuts if a in usable and b in usable]
    merges = [(a, b) for *_, a, b in sorted(found)]
    unknown = next((t for t, k in zip(tokens, kinds, strict=True) if k == _UNKNOWN), None)
    bytes_ = any(k == _BYTE for k in kinds)
    with guarded(f"{gguf.path}: tokenizer", "a SentencePiece vocabulary"):
        model = tokenizers.models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=bytes_)
        inner = tokenizers.Tokenizer(model)
    prefix = bool(gguf.metadata.get("tokenizer.ggml.add_space_prefix", True))
    n, d = tokenizers.normalizers, tokenizers.decoders
    inner.normalizer = n.Sequence([*([n.Prepend(_SPACE)] if prefix else []), n.Replace(" ", _SPACE)])
    strip = [d.Strip(" ", 1, 0)] if prefix else []
    inner.decoder = d.Sequence([d.Replace(_SPACE, " "), d.ByteFallback(), d.Fuse(), *strip])
    return inner, True
