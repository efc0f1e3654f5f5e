"""Text to token ids and chat messages to text.

One class over the `tokenizers` package; what differs between models is where its parts come from: `from_folder` (a
Hugging Face folder), `from_gguf_metadata` in `gguf_model.py`, or `byte_tokenizer` (256 bytes and four specials, for
random models).

`encode` adds nothing (no automatic BOS): chat templates write their own specials, and these encode to their ids.
Templates are code from strangers: they render in jinja2's immutable sandbox.
"""

import datetime
import functools
import json
import pathlib

import jinja2
import jinja2.sandbox
import tokenizers

from molora_jax.errors import InputError

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


class Tokenizer:
    """Args:
    inner: a `tokenizers.Tokenizer`.
    bos, eos, pad: special tokens as text, or None. `pad` falls back to `eos`, then to id 0.
    template: the model's jinja chat template; None means lines of `role: content`.
    where: names the source in error messages.
    """

    def __init__(self, inner, *, bos=None, eos=None, pad=None, template=None, where="tokenizer"):
        self.inner, self.template, self.where = inner, template, where
        self.bos, self.eos, self.pad = bos, eos, pad
        self.bos_id, self.eos_id = self._special("bos", bos), self._special("eos", eos)
        pad_id = self._special("pad", pad)
        self.pad_id = next((i for i in (pad_id, self.eos_id) if i is not None), 0)

    def _special(self, role, token):
        if token is None:
            return None
        token_id = self.inner.token_to_id(token)
        if token_id is None:
            raise InputError(f"{self.where}: {role}_token", got=repr(token), expected="a token of the vocabulary")
        return token_id

    @property
    def vocab_size(self) -> int:
        return self.inner.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        try:
            return self.inner.encode(text, add_special_tokens=False).ids
        except TypeError:  # half a surrogate pair, say: a command line that is not UTF-8
            raise InputError("text", got=f"{text!r:.80}", expected="text that is valid Unicode") from None

    def decode(self, ids, *, skip_special_tokens: bool = False) -> str:
        return self.inner.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)

    def chat(self, messages: list[dict], *, add_generation_prompt: bool) -> str:
        """Renders `[{"role", "content"}, ...]` with the model's template.

        Raises:
          InputError: the template is broken, or refuses these messages.
        """
        try:
            return _compile(self.template or PLAIN).render(
                messages=messages, add_generation_prompt=add_generation_prompt,
                bos_token=self.bos or "", eos_token=self.eos or "", pad_token=self.pad or "",
            )  # fmt: skip
        except Exception as error:  # noqa: BLE001 - the template is foreign code and can raise anything
            raise InputError(
                f"{self.where}: chat template", got=f"{type(error).__name__}: {error}",
                expected="a template that renders these messages",
                fix="Check the roles and their order, or the model's chat_template.",
            ) from None  # fmt: skip

    def encode_chat(self, messages: list[dict], *, add_generation_prompt: bool) -> list[int]:
        return self.encode(self.chat(messages, add_generation_prompt=add_generation_prompt))


@functools.lru_cache(maxsize=16)
def _compile(template):
    def refuse(message):
        raise jinja2.TemplateError(message)

    # the names and whitespace rules that Hugging Face templates rely on
    env = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    env.globals.update(raise_exception=refuse, strftime_now=lambda form: datetime.datetime.now().strftime(form))
    env.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    return env.from_string(template)


def from_folder(folder: str | pathlib.Path) -> Tokenizer:
    """Reads `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja` of a Hugging Face folder.

    Raises:
      InputError: no `tokenizer.json`, or one that does not parse.
    """
    folder = pathlib.Path(folder)
    path = folder / "tokenizer.json"
    try:
        inner = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # noqa: BLE001 - the package raises plain Exception
        raise InputError(
            str(path), got=str(error)[:200], expected="a tokenizer of the `tokenizers` package",
            fix="Save the model with a fast tokenizer, so that tokenizer.json is written.",
        ) from None  # fmt: skip
    inner.no_padding()
    inner.no_truncation()
    config = {}
    if (folder / "tokenizer_config.json").exists():
        config = read_json(folder / "tokenizer_config.json")
    template = config.get("chat_template")
    if isinstance(template, list):  # several named templates
        template = next((item.get("template") for item in template if item.get("name") == "default"), None)
    if (folder / "chat_template.jinja").exists():
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8")

    def token(role):
        value = config.get(f"{role}_token")
        return text(f"{role}_token", value.get("content") if isinstance(value, dict) else value)

    def text(name, value):
        if value is None or isinstance(value, str):
            return value
        raise InputError(f"{folder / 'tokenizer_config.json'}: {name}", got=repr(value)[:80], expected="text")

    where = str(folder)
    return Tokenizer(
        inner,
        bos=token("bos"),
        eos=token("eos"),
        pad=token("pad"),
        template=text("chat_template", template),
        where=where,
    )


def read_json(path: pathlib.Path) -> dict:
    """Raises InputError where the file is missing or holds no JSON object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError("not an object")  # noqa: TRY004
    except OSError as error:
        raise InputError(str(path), got=error.strerror or str(error), expected="a readable file") from None
    except (ValueError, RecursionError) as error:
        raise InputError(str(path), got=f"no JSON object ({error})", expected="a JSON object") from None
    return value


def byte_tokenizer() -> Tokenizer:
    """Ids 0..255 are bytes (in the byte-level alphabet's order); 256 `<|pad|>`, 257 `<|bos|>`, then ChatML's two."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    inner = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    inner.add_special_tokens(["<|pad|>", "<|bos|>", "<|im_start|>", "<|im_end|>"])
    return Tokenizer(inner, bos="<|bos|>", eos="<|im_end|>", pad="<|pad|>", template=CHATML, where="random:tiny")
