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
_ADDED = (_SPECIAL, _USER_DEFINED)
_OF, _TEMPLATE = "tokenizer.ggml.", "tokenizer.chat_template"
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
    kind = gguf.get_if_there(f"{_OF}model", str)
    if kind not in ("gpt2", "llama"):
        raise InputError(f"{gguf.path}: {_OF}model", got=f"{kind!r:.80}", expected="'gpt2' or 'llama'", fix=_ELSEWHERE)
    tokens = gguf.get(f"{_OF}tokens", list)
    kinds = np.ones(len(tokens), np.int32)
    if f"{_OF}token_type" in gguf.metadata or kind == "llama":  # whose bytes are known by their type alone
        kinds = gguf.numbers(f"{_OF}token_type", whole=True)
    if kind == "gpt2" and not np.isin(kinds, _ADDED).any():  # the file does not say which tokens are special
        kinds = [_SPECIAL if t.startswith("<|") and t.endswith("|>") else _NORMAL for t in tokens]
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) != len(tokens) or len(kinds) != len(tokens):
        raise InputError(f"{gguf.path}: tokenizer", got="repeated tokens or odd lengths", expected="a BPE vocabulary")
    inner, bos_first = (_byte_level if kind == "gpt2" else _scored)(gguf, tokens, kinds, vocab)
    ids, ends = _special_ids(gguf, len(tokens))
    # a special token that a file calls an ordinary one; a single character (a pad that is "!") stays a letter
    named = {i for i in (*ids.values(), *ends) if len(tokens[i]) > 1}
    added = [(t, k) for i, (t, k) in enumerate(zip(tokens, kinds, strict=True)) if k in _ADDED or i in named]
    inner.add_tokens([tokenizers.AddedToken(t, special=bool(k != _USER_DEFINED), normalized=False) for t, k in added])
    text = {role: tokens[i] for role, i in ids.items() if i in named}
    add_bos = gguf.get(f"{_OF}add_bos_token", bool, bos_first)
    template, tool_template = (gguf.get_if_there(key, str) for key in (_TEMPLATE, f"{_TEMPLATE}.tool_use"))
    if template is None and tool_template is not None:
        raise InputError(f"{gguf.path}: {_TEMPLATE}", got="none, beside one for tools", expected="one for all turns")
    return Tokenizer(
        inner, bos=text.get("bos"), eos=text.get("eos"), pad=text.get("padding"), end_ids=ends, bos_id=ids.get("bos"),
        pad_id=ids.get("padding"), add_bos=add_bos and "bos" in ids, template=template, tool_template=tool_template,
        where=gguf.path,
    )  # fmt: skip


def _special_ids(gguf, size) -> tuple[dict[str, int], list[int]]:
    """Role -> id, and all ids that end an answer."""
    said = {key: gguf.get(key, int) for key in gguf.metadata if key.startswith(_OF) and key.endswith("_token_id")}
    keys = {f"{_OF}{role}_token_id": role for role in ("bos", "eos", "eot", "eom", "padding")}  # of a turn, a message
    ids = {role: said[key] for key, role in keys.items() if key in said}
    listed = gguf.metadata.get(f"{_OF}eos_token_ids", [])
    if not isinstance(listed, int) and f"{_OF}eos_token_ids" in gguf.metadata:
        listed = gguf.numbers(f"{_OF}eos_token_ids", whole=True).tolist()
    more = [gguf.get(f"{_OF}eos_token_ids", int)] if isinstance(listed, int) else listed
    for name, index in (*((f"{role}_token_id", i) for role, i in ids.items()), *(("eos_token_ids", i) for i in more)):
        if not 0 <= index < size:
            raise InputError(f"{gguf.path}: {_OF}{name}", got=str(index), expected=f"an id below {size}")
    return ids, [*(ids[role] for role in ("eos", "eot", "eom") if role in ids), *more]


def _byte_level(gguf, tokens, kinds, vocab):
    """A `gpt2` vocabulary; and whether llama.cpp puts BOS in front where the file does not say it."""
    pre = gguf.get(f"{_OF}pre", str, "default")
    if pre == "default":  # not said: known where all models of an architecture have the same
        pre = _PRE_OF.get(gguf.get_if_there("general.architecture", str), "none, or 'default'")
    parts = _pre_tokenizer(pre)
    if parts is None:
        raise InputError(
            f"{gguf.path}: {_OF}pre", got=f"{pre!r:.80}", expected=f"one of {', '.join(_PRE)}", fix=_ELSEWHERE
        )
    pairs = [tuple(merge.split(" ")) for merge in gguf.get(f"{_OF}merges", list)]
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
    scores = gguf.numbers(f"{_OF}scores", whole=False)
    if len(scores) != len(tokens) or not np.isfinite(np.asarray(scores, np.float64)).all():
        raise InputError(f"{gguf.path}: {_OF}scores", got=f"{len(scores)}", expected="a number each token")
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
    prefix = gguf.get(f"{_OF}add_space_prefix", bool, True)
    n, d = tokenizers.normalizers, tokenizers.decoders
    inner.normalizer = n.Sequence([*([n.Prepend(_SPACE)] if prefix else []), n.Replace(" ", _SPACE)])
    strip = [d.Strip(" ", 1, 0)] if prefix else []
    inner.decoder = d.Sequence([d.Replace(_SPACE, " "), d.ByteFallback(), d.Fuse(), *strip])
    return inner, True
