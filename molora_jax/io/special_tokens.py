"""Tokens that a folder names beside `tokenizer.json`. A special text that is no added token is read as letters.

As in transformers, these become added tokens, in this order:

1. `added_tokens_decoder` of tokenizer_config.json, by id; without it `added_tokens.json`, less what tokenizer.json has;
2. the named ones: `bos_token` ... `mask_token`, then names of the model's own (`image_token`, or the keys of an
   `extra_special_tokens` that is an object), which a template may use;
3. `extra_special_tokens` that are a list, else `additional_special_tokens`.

What is an added token already stays as it is under 2 and 3, and takes the flags that are said under 1. A token that is
not in the vocabulary gets the next id. special_tokens_map.json overrules tokenizer_config.json, but does not count
where that has an `added_tokens_decoder`.
"""

import pathlib

import tokenizers

from molora_jax.errors import InputError
from molora_jax.io.files import json_if_there
from molora_jax.io.guard import guarded

_ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")  # in transformers' order
_FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")
_LIST, _OLD_LIST = "extra_special_tokens", "additional_special_tokens"


def add(inner: tokenizers.Tokenizer, folder: pathlib.Path) -> tuple[dict, dict[str, str]]:
    """Adds a folder's tokens to its tokenizer.

    Returns:
      The settings, of tokenizer_config.json and special_tokens_map.json; and the named tokens, `{"bos_token": "<s>"}`.

    Raises:
      InputError: what is no token; a token whose id is not the one that is declared.
    """
    files = {name: json_if_there(folder / name) for name in ("tokenizer_config.json", "special_tokens_map.json")}
    decoder = files["tokenizer_config.json"].get("added_tokens_decoder")
    if decoder is not None:
        del files["special_tokens_map.json"]
    said = [(folder / name, values) for name, values in files.items()]
    named, listed = _named(said), _listed(said)
    own = {token.content for token in inner.get_added_tokens_decoder().values()}
    if decoder is None:
        where = folder / "added_tokens.json"
        declared = _of_file(where, {token.content for token in (*named.values(), *listed)})
        _extend(inner, [token for _, token in declared if token.content not in own], where)
    else:
        where = f"{folder / 'tokenizer_config.json'}: added_tokens_decoder"
        declared = _of_decoder(where, decoder, {token.content for token in named.values()})
        _extend(inner, [token for _, token in declared], where)
    for index, token in declared:
        found = inner.token_to_id(token.content)
        if found != index:
            raise InputError(
                f"{where}: {token.content!r}"[:300], got=f"the id {index}",
                expected=f"{found}, which it has beside tokenizer.json's tokens",
                fix="Save the tokenizer again, so that its files agree.",
            )  # fmt: skip
    own |= {token.content for _, token in declared}
    # a missing one of these three is refused by name where it is needed
    missing = [n for n in ("bos_token", "eos_token", "pad_token") if n in named and _absent(inner, named[n])]
    wanted = {}  # of two with one text the first counts
    for token in (*(token for name, token in named.items() if name not in missing), *listed):
        wanted.setdefault(token.content, token)
    _extend(inner, [token for text, token in wanted.items() if text not in own], folder)
    settings = {field: value for _, values in said for field, value in values.items()}
    return settings, {name: token.content for name, token in named.items()}


def _named(said) -> dict:
    """Name -> token, in transformers' order."""
    roles, own, extra = dict.fromkeys(f"{role}_token" for role in _ROLES), {}, {}
    for path, values in said:
        for name, value in values.items():
            where = f"{path}: {name}"[:300]
            if name in roles:
                roles[name] = None if value is None else _token(where, value, must=True)
            elif name.endswith("_token") and isinstance(value, (str, dict)):
                own[name] = _token(where, value, must=True)
            elif name == _LIST and isinstance(value, dict):
                extra |= {key: _token(f"{where}: {key}"[:300], one, must=True) for key, one in value.items()}
    return {name: token for name, token in {**roles, **own, **extra}.items() if token is not None}


def _listed(said) -> list:
    def tokens(path, values, field):
        value = values.get(field)
        if value is not None and not isinstance(value, list) and not (isinstance(value, dict) and field == _LIST):
            raise InputError(f"{path}: {field}", got=f"{value!r:.80}", expected="a list of tokens")
        return [_token(f"{path}: {field}", one) for one in value] if isinstance(value, list) else []

    found = []
    for path, values in said:  # what is in the first file's old list goes before the second's new one
        new, old = (tokens(path, values, field) for field in (_LIST, _OLD_LIST))
        found += new or (old if not found else [])
    return found


def _of_decoder(where, decoder, special) -> list:
    """`[(id, token)]`, by id."""
    if not isinstance(decoder, dict) or not all(key.isdecimal() and len(key) < 9 for key in decoder):
        raise InputError(where, got=f"{decoder!r:.80}", expected="an object of token ids")
    pairs = sorted(((int(key), value) for key, value in decoder.items()), key=lambda pair: pair[0])
    found = [(index, _token(f"{where}: {index}", value, special=False)) for index, value in pairs]
    for _, token in found:
        token.special = token.special or token.content in special
    return found


def _of_file(path, special) -> list:
    """`[(id, token)]`, by id, of an older folder."""
    found = json_if_there(path)
    for text, index in found.items():
        if type(index) is not int or index < 0:
            raise InputError(f"{path}: {text!r:.80}", got=f"{index!r:.80}", expected="a token id")
    pairs = sorted((index, text) for text, index in found.items())
    return [(index, _token(str(path), text, special=text in special)) for index, text in pairs]


def _absent(inner, token) -> bool:
    return inner.token_to_id(token.content) is None


def _token(where, value, *, must=False, special=True) -> tokenizers.AddedToken:
    """`value`: a text, or an object of `content` and flags; `must`: it is special whatever its flags say."""
    flags = value if isinstance(value, dict) else {"content": value}
    text, flags = flags.get("content"), {name: flags[name] for name in _FLAGS if name in flags}
    if not isinstance(text, str) or not all(isinstance(flag, bool) for flag in flags.values()):
        raise InputError(
            where, got=f"{value!r:.80}", expected=f"text, or an object of `content` and flags ({', '.join(_FLAGS)})"
        )
    flags["special"] = must or flags.get("special", special)
    try:
        return tokenizers.AddedToken(text, **flags)
    except UnicodeEncodeError:  # half a surrogate pair
        raise InputError(where, got=f"{value!r:.80}", expected="text that is valid Unicode") from None


def _extend(inner, tokens, where):
    if tokens:
        with guarded(str(where), "tokens that can be added"):
            inner.add_tokens(tokens)
