"""A byte tokenizer with a tiny chat template, and small data configs."""

import json
import types


class ByteTokenizer:
    """Ids: 0 pad, 1 end, 2 user, 3 system, 4 assistant, then one a byte."""

    pad_id, eos_id, vocab_size, template = 0, 1, 261, ""
    end_ids, added_tokens = (1,), ("\x01",)
    marks = dict(user="\x02", system="\x03", assistant="\x04")
    name = "bytes"

    def __init__(self):
        self.calls = 0

    def digest(self):
        return repr((self.name, self.marks))

    def encode(self, text):
        return self.encode_spans([text])[0][0]

    def encode_spans(self, texts):
        self.calls += len(texts)
        return [self._spans(text) for text in texts]

    def _spans(self, text):
        ids, offsets = [], []
        for i, char in enumerate(text):
            for byte in char.encode():
                ids.append(byte + 5 if byte > 4 else byte)
                offsets.append((i, i + 1))
        return ids, offsets

    def token_text(self, token_id):
        return "\x01" if token_id == 1 else None

    def decode(self, ids):
        return bytes(i - 5 for i in ids if i > 4).decode()

    def render(self, conversations, **_):
        self.calls += len(conversations)
        return [dict(text=self._chat(**{k: c[k] for k in ("messages", "add_generation_prompt")}), spans=[])
                for c in conversations]  # fmt: skip

    def _chat(self, messages, add_generation_prompt):
        text = "".join(self.marks[m["role"]] + m["content"] for m in messages)
        return text + ("\x04" if add_generation_prompt else "")


class CoarseTokenizer(ByteTokenizer):
    """About as many ids a text as a real tokenizer gives: four bytes an id, and a template of 24."""

    name, vocab_size = "coarse", 1 << 16

    def _spans(self, text):
        chunks = [text[i : i + 4] for i in range(0, len(text), 4)]
        ids = [(hash_of(chunk.encode()) % 60000) + 10 for chunk in chunks]
        return ids, [(4 * i, 4 * i + len(chunk)) for i, chunk in enumerate(chunks)]

    def _chat(self, messages, add_generation_prompt):
        return "#" * 96 + super()._chat(messages, add_generation_prompt)


def hash_of(raw):
    return int.from_bytes(raw, "little")


def config(tasks, **changes):
    fields = dict(tasks=tasks, seq_len=64, temperature=3.0, system="", overlong="skip", bad_rows="error")
    return types.SimpleNamespace(**{**fields, **changes})


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return f"jsonl:{path}"


def numbered(path, count, *, prompt="q{}", target="answer {}", **more):
    return write_rows(path, [dict(prompt=prompt.format(i), target=target.format(i), **more) for i in range(count)])
