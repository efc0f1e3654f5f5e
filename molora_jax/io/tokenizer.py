"""Text to token ids and chat messages to text.

One class over the `tokenizers` package; what differs between models is where its parts come from: `from_folder` (a
Hugging Face folder), `gguf_tokenizer.py`, or `byte_tokenizer` (256 bytes and four specials, for
random models).

`encode` adds nothing (no automatic BOS): chat templates write their own specials, and these encode to their ids. Where
there is no template, `encode_plain` puts the tokenizer's own BOS in front. Templates are code from strangers: they
render in a process of their own (`templates.py`).
"""

import copy
import datetime
import functools
import hashlib
import json
import pathlib
import re

import tokenizers

from molora_jax.errors import InputError
from molora_jax.io import special_tokens, templates
from molora_jax.io.files import json_if_there, plain, read_json, read_text, there
from molora_jax.io.guard import guarded
from molora_jax.io.model_files import TOOL_TEMPLATE
from molora_jax.io.templates import CHATML

LARGEST_ID = 1 << 24
TORN = "\ufffd"  # what a decoder writes for bytes that are no character (yet)


class Tokenizer:
    """Args:
    inner: a `tokenizers.Tokenizer`.
    bos, eos, pad: special tokens as text, or None.
    end_ids: more ids that end an answer, beside `eos`. bos_id, pad_id: for where there is no such text.
    add_bos: whether text without a template starts with BOS; None asks the tokenizer's own post-processor.
    specials: other special tokens that a template may name, `{"unk_token": "<unk>"}`.
    template: the model's jinja chat template; None means lines of `role: content`. tool_template: in its place for
      conversations with tools.
    where: names the source in error messages.

    `eos_id` is the first of `end_ids`, or None; `pad_id` falls back to it, then to 0.
    """

    def __init__(
        self, inner, *, bos=None, eos=None, pad=None, end_ids=(), bos_id=None, pad_id=None, add_bos=None, specials=(),
        template=None, tool_template=None, where="tokenizer",
    ):  # fmt: skip
        self.inner, self.where = inner, where
        self.template, self.tool_template = template, tool_template
        self.bos, self.eos, self.pad = bos, eos, pad
        self.specials = dict(specials)
        given = (("bos_token", bos), ("eos_token", eos), ("pad_token", pad))
        self.specials |= {name: token for name, token in given if token is not None}
        first = self._special("eos", eos)
        self.end_ids = tuple(dict.fromkeys([*([first] if first is not None else []), *end_ids]))
        self.eos_id = self.end_ids[0] if self.end_ids else None
        self.bos_id = self._special("bos", bos) if bos is not None else bos_id
        pad_id = self._special("pad", pad) if pad is not None else pad_id
        self.pad_id = next((i for i in (pad_id, self.eos_id) if i is not None), 0)
        self.prefix_ids = self._prefix() if add_bos is None else (self.bos_id,) * bool(add_bos)
        if self.prefix_ids == (None,):
            raise InputError(f"{where}: add_bos_token", got="true, but no bos_token", expected="a bos_token to add")
        self.day = None  # what `strftime_now` tells; None is today

    def _special(self, role, token):
        if token is None:
            return None
        try:
            token_id = self.inner.token_to_id(token)
        except UnicodeEncodeError:  # half a surrogate pair
            token_id = None
        if token_id is None:
            raise InputError(f"{self.where}: {role}_token", got=repr(token), expected="a token of the vocabulary")
        return token_id

    @functools.cached_property
    def suffix_ids(self) -> tuple[int, ...]:
        """What the tokenizer's post-processor puts behind a text: an encoder's [SEP]."""
        with guarded(self.where, "a tokenizer that encodes"):
            alone = self.inner.encode("a", add_special_tokens=False).ids
            whole = self.inner.encode("a", add_special_tokens=True).ids
        start = next((i for i in range(len(whole)) if whole[i : i + len(alone)] == alone), None)
        return () if not alone or start is None else tuple(whole[start + len(alone) :])

    def _prefix(self) -> tuple[int, ...]:
        """What the tokenizer's post-processor puts before a text."""
        with guarded(self.where, "a tokenizer that encodes"):
            alone = self.inner.encode("a", add_special_tokens=False).ids
            whole = self.inner.encode("a", add_special_tokens=True).ids
        starts = [i for i in range(len(whole)) if whole[i : i + len(alone)] == alone]
        return tuple(whole[: starts[-1]]) if alone and starts else ()

    @property
    def vocab_size(self) -> int:
        return self.inner.get_vocab_size(with_added_tokens=True)

    @functools.cached_property
    def _inner_digest(self) -> str:
        return hashlib.sha256(self.inner.to_str().encode()).hexdigest()

    def digest(self) -> str:
        """Hex digest of all that turns conversations into ids and ends answers; where it came from does not enter."""
        parts = [
            self._inner_digest, sorted(self.specials.items()), self.bos_id, self.end_ids, self.pad_id, self.prefix_ids,
            self.template, self.tool_template,
        ]  # fmt: skip
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def ids_digest(self) -> str:
        """Of what turns a text into ids alone: without special tokens' roles, ends, padding and chat template."""
        return hashlib.sha256(json.dumps([self._inner_digest, self.prefix_ids]).encode()).hexdigest()

    @property
    def depends_on_day(self) -> bool:
        """Whether the template may write today's date."""
        return any("strftime_now" in (template or "") for template in (self.template, self.tool_template))

    def at_day(self, day: datetime.date | str) -> "Tokenizer":
        """The same tokenizer on another day, a date or its ISO text: what `strftime_now` tells.

        Raises:
          InputError: no date.
        """
        try:
            text = datetime.date.fromisoformat(str(day)).isoformat()
        except ValueError:
            raise InputError("day", got=repr(day)[:80], expected="a date such as 2026-01-31") from None
        other = copy.copy(self)
        other.day = text
        return other

    def encode(self, text: str) -> list[int]:
        return self.encode_spans([text])[0][0]

    def encode_plain(self, text: str) -> list[int]:
        """Ids of a text without a template: after the tokenizer's own BOS, once."""
        return self.with_prefix(self.encode(text))

    def with_prefix(self, ids: list[int]) -> list[int]:
        prefix = list(self.prefix_ids)
        return ids if ids[: len(prefix)] == prefix else prefix + ids

    def encode_spans(self, texts: list[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """Ids of each text, and the characters `[start, end)` that each id stands for."""
        try:
            with guarded("text", "text that this tokenizer can encode"):
                if len(texts) == 1:  # without threads, after which a fork is warned of
                    encodings = [self.inner.encode(texts[0], add_special_tokens=False)]
                else:
                    encodings = self.inner.encode_batch(texts, add_special_tokens=False)
        except TypeError:  # half a surrogate pair, say: a command line that is not UTF-8
            shown = next((text for text in texts if not _valid(text)), texts)
            raise InputError("text", got=f"{shown!r:.80}", expected="text that is valid Unicode") from None
        return [(encoding.ids, encoding.offsets) for encoding in encodings]

    def decode(self, ids, *, skip_special_tokens: bool = False) -> str:
        with guarded("ids", "ids that this tokenizer can decode"):
            return self.inner.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)

    def token_text(self, token_id: int) -> str | None:
        """The token as its vocabulary writes it."""
        return self.inner.id_to_token(token_id)

    @functools.cached_property
    def added_tokens(self) -> tuple[str, ...]:
        """Texts of the tokens that are found in a text before anything else."""
        return tuple(token.content for token in self.inner.get_added_tokens_decoder().values())

    @functools.cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids that `decode` leaves out under `skip_special_tokens`."""
        return frozenset(i for i, token in self.inner.get_added_tokens_decoder().items() if token.special)

    @functools.cached_property
    def byte_ids(self) -> frozenset[int]:
        """Ids of the tokens `<0x00>` to `<0xFF>`, for bytes of what has no token."""
        found = (self.inner.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
        return frozenset(i for i in found if i is not None)

    def token_bytes(self, token_id: int) -> bytes | None:
        """What the token writes inside a text, also where that is a piece of a character; None where nobody knows."""
        alone, twice = self.decode([token_id]), self.decode([token_id] * 2)
        # the second time it is not the start of a text, where decoders leave out a space
        text = twice[len(alone) :] if twice.startswith(alone) and len(twice) > len(alone) else alone
        if TORN not in alone:
            return text.encode()
        written = self.token_text(token_id) or ""
        if token_id in self.byte_ids:
            return bytes.fromhex(written[3:5])
        if all(letter in _byte_letters() for letter in written):
            raw = bytes(_byte_letters()[letter] for letter in written)
            if raw.decode(errors="replace") == alone:
                return raw
        return None

    def render(self, conversations: list[dict], *, rows=None, deaths: templates.Deaths | None = None) -> list[dict]:
        """Conversations with the model's template: see `templates.render`.

        Args:
          conversations: dicts of `messages`, `add_generation_prompt`, and perhaps `tools`, `documents` and arguments
            of the template's own.
        """
        rows, deaths = range(len(conversations)) if rows is None else rows, deaths or templates.Deaths()
        conversations = [{**self.specials, **conversation} for conversation in conversations]
        if self.tool_template is None:
            return templates.render(self.template, conversations, day=self.day, rows=rows, deaths=deaths)
        results = [{}] * len(conversations)
        for template, with_tools in ((self.template, False), (self.tool_template, True)):
            chosen = [i for i, turns in enumerate(conversations) if bool(turns.get("tools")) == with_tools]
            turns, whose = [conversations[i] for i in chosen], [rows[i] for i in chosen]
            rendered = templates.render(template, turns, day=self.day, rows=whose, deaths=deaths)
            for i, result in zip(chosen, rendered, strict=True):
                results[i] = result
        return results

    def chat(self, messages: list[dict], *, add_generation_prompt: bool, tools=None, documents=None, **args) -> str:
        """Renders `[{"role", "content"}, ...]` with the model's template. `args`: arguments of the template's own.

        Raises:
          InputError: the template is broken, refuses these messages, or needs more time or memory than it may have.
        """
        (result,) = self.render(
            [
                dict(args, messages=messages, add_generation_prompt=add_generation_prompt, tools=tools or None,
                     documents=documents or None)
            ]
        )  # fmt: skip
        if "error" in result:
            raise self.refusal(result["error"])
        return result["text"]

    def refusal(self, why: str) -> InputError:
        return InputError(
            f"{self.where}: chat template", got=why,
            expected="a template that renders these messages, in 10 seconds, 512 MB and 10 MB of text",
            fix="Check the roles and their order, or the model's chat_template.",
        )  # fmt: skip

    def encode_chat(self, messages: list[dict], *, add_generation_prompt: bool, tools=None, **args) -> list[int]:
        return self.encode_rendered(
            self.chat(messages, add_generation_prompt=add_generation_prompt, tools=tools, **args)
        )

    def encode_rendered(self, text: str) -> list[int]:
        """Ids of what `chat` gave."""
        return self.encode_plain(text) if self.template is None else self.encode(text)


@functools.cache
def _byte_letters() -> dict[str, int]:
    """The byte-level alphabet: printable Latin-1 letters are their own bytes, others follow from 256 on, in order."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _valid(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def from_folder(folder: str | pathlib.Path, *, end: str = "eos") -> Tokenizer:
    """Reads a Hugging Face folder: `tokenizer.json`, `tokenizer_config.json`, `special_tokens_map.json`,
    `added_tokens.json`, the chat templates, and the special ids of `generation_config.json` and `config.json`. `end`:
    the special token that ends a text, `sep` of an encoder.

    Raises:
      InputError: no `tokenizer.json`, or one that does not parse; a special token or template that is none.
    """
    folder = pathlib.Path(folder)
    inner = _read_inner(folder / "tokenizer.json")
    config, tokens = special_tokens.add(inner, folder)
    where = folder / "tokenizer_config.json"
    add_bos = _settings(inner, config, where)
    settings = [(name, json_if_there(folder / name)) for name in ("generation_config.json", "config.json")]
    ids = {
        role: [i for name, values in settings for i in _ids(f"{folder / name}: {role}_token_id", values, role)]
        for role in ("bos", "eos", "pad")
    }
    template, tool_template = _templates(folder, config, where)
    return Tokenizer(
        inner, bos=tokens.get("bos_token"), eos=tokens.get(f"{end}_token"), pad=tokens.get("pad_token"),
        end_ids=ids["eos"], bos_id=next(iter(ids["bos"]), None), pad_id=next(iter(ids["pad"]), None), add_bos=add_bos,
        specials=tokens, template=template, tool_template=tool_template, where=str(folder),
    )  # fmt: skip


def _settings(inner, config, where) -> bool | None:
    """`add_bos_token`. Raises InputError for what versions of transformers read in several ways."""

    def flag(name):
        value = config.get(name)
        if value is not None and not isinstance(value, bool):
            raise InputError(f"{where}: {name}", got=repr(value)[:80], expected="true or false")
        return value

    if flag("split_special_tokens"):
        raise InputError(
            f"{where}: split_special_tokens", got="true", expected="false: special tokens of a chat are no letters",
            fix="Remove the field.",
        )  # fmt: skip
    space, own = flag("add_prefix_space"), _prefix_spaces(inner)
    if space is not None and own - {space}:
        raise InputError(
            f"{where}: add_prefix_space", got=f"{str(space).lower()}, not so in tokenizer.json",
            expected="the same in both", fix="Save the tokenizer again, so that its files agree.",
        )  # fmt: skip
    return flag("add_bos_token")


def _prefix_spaces(inner) -> set[bool]:
    """What the pre-tokenizers of tokenizer.json say of `add_prefix_space`."""
    try:
        state = json.loads(inner.pre_tokenizer.__getstate__()) if inner.pre_tokenizer is not None else {}
    except Exception:  # noqa: BLE001 - one of a kind that is not written
        return set()
    parts = state.get("pretokenizers", [state])
    return {part["add_prefix_space"] for part in parts if isinstance(part.get("add_prefix_space"), bool)}


def _read_inner(path: pathlib.Path):
    """`tokenizer.json`. Raises InputError where it is none, or one that would end this process."""
    fix = "Save the model with a fast tokenizer, so that tokenizer.json is written."
    expected = "a tokenizer of the `tokenizers` package"
    try:
        raw = plain(path).read_bytes()
    except OSError as error:
        raise InputError(str(path), got=error.strerror or str(error), expected=expected, fix=fix) from None
    # the package cuts this prefix off the second part of each merge without looking, and aborts inside a character
    if re.search(rb'"continuing_subword_prefix"\s*:\s*"[^"]', raw):
        model = read_json(path).get("model")
        model = model if isinstance(model, dict) else {}
        merges, prefix = model.get("merges") or [], str(model.get("continuing_subword_prefix"))
        for merge in merges if isinstance(merges, list) else []:
            parts = merge.split(" ") if isinstance(merge, str) else merge
            if not isinstance(parts, list) or len(parts) != 2 or not str(parts[1]).startswith(prefix):
                raise InputError(str(path), got=f"the merge {merge!r:.60}", expected=f"{prefix!r} in its second part")
    try:
        with guarded(str(path), expected, fix):
            inner = tokenizers.Tokenizer.from_str(raw.decode("utf-8-sig"))
            inner.no_padding()
            inner.no_truncation()
            largest = max(inner.get_vocab(with_added_tokens=True).values(), default=0)
    except TypeError as error:
        raise InputError(str(path), got=str(error)[:200], expected=expected, fix=fix) from None
    if largest > LARGEST_ID:  # the package goes through all numbers below it
        raise InputError(f"{path}: vocabulary", got=f"the id {largest}", expected=f"ids up to {LARGEST_ID}")
    return inner


def _ids(where: str, values: dict, role: str) -> list[int]:
    """One id, or a list of them, as config files write it."""
    value = values.get(f"{role}_token_id")
    listed = value if isinstance(value, list) else [] if value is None else [value]
    for item in listed:
        if isinstance(item, bool) or not isinstance(item, int) or (item < 0 and role == "eos"):
            raise InputError(where, got=repr(value)[:80], expected="a token id, or a list of them")
    return [item for item in listed if item >= 0]  # -1 is how old files say that there is no padding


def _templates(folder, config, where) -> tuple[str | None, str | None]:
    """(the template, the one for conversations with tools where it is another)."""
    value = config.get("chat_template")
    if isinstance(value, list):  # several named templates
        pairs = [(item.get("name"), item.get("template")) for item in value if isinstance(item, dict)]
        named = {name: template for name, template in pairs if isinstance(name, str)}
        if value and "default" not in named and not there(folder / "chat_template.jinja"):
            raise InputError(
                f"{where}: chat_template", got=f"templates {', '.join(named) or 'without names'}"[:200],
                expected="one named default", fix="Name one of them default.",
            )  # fmt: skip
    else:
        named = {"default": value}
    for name, path in (
        ("default", folder / "chat_template.jinja"),
        ("tool_use", folder / TOOL_TEMPLATE),
    ):
        if there(path):
            named[name] = read_text(path)
    found = named.get("default"), named.get("tool_use")
    for template in found:
        if template is not None and not isinstance(template, str):
            raise InputError(f"{where}: chat_template", got=repr(template)[:80], expected="text")
    return found


def byte_tokenizer() -> Tokenizer:
    """Ids 0..255 are bytes (in the byte-level alphabet's order); 256 `<|pad|>`, 257 `<|bos|>`, then ChatML's two."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    inner = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    inner.add_special_tokens(["<|pad|>", "<|bos|>", "<|im_start|>", "<|im_end|>"])
    return Tokenizer(inner, bos="<|bos|>", eos="<|im_end|>", pad="<|pad|>", template=CHATML, where="random:tiny")
