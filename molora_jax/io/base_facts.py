"""What of a base model belongs to a run's identity beside the values of its weights."""

import dataclasses
import datetime
import hashlib


def base_facts(base, *, day: str | None = None) -> dict:
    """What a base model is beside the values of its weights: its tokenizer and template, the numbers of its config."""
    return {
        "tokenizer": tokenizer_digest(base.tokenizer), "ids": getattr(base.tokenizer, "ids_digest", lambda: None)(),
        "config": dataclasses.asdict(base.config), "day": day,
    }  # fmt: skip


def tokenizer_digest(tokenizer) -> str | None:
    """The tokenizer's own `digest()`, else one of its serialised form, special tokens and template."""
    digest = getattr(tokenizer, "digest", None)
    digest = digest() if callable(digest) else digest
    if digest is None and hasattr(getattr(tokenizer, "inner", None), "to_str"):
        parts = [tokenizer.inner.to_str(), *(getattr(tokenizer, n, None) for n in ("template", "bos", "eos", "pad"))]
        digest = hashlib.sha256(repr(parts).encode(errors="surrogatepass")).hexdigest()
    return digest


def pinned(base, day: str | None):
    """`(base, day)`: a chat template that writes the date writes that of the run's first start ("2026-11-28")."""
    if not getattr(base.tokenizer, "depends_on_day", False):
        return base, None
    day = day or datetime.date.today().isoformat()
    return dataclasses.replace(base, tokenizer=base.tokenizer.at_day(datetime.date.fromisoformat(day))), day
