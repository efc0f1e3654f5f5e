"""A byte tokenizer with a tiny chat template, and small data configs."""

import json
import types


class ByteTokenizer:
    """Ids: 0 pad, 1 end, 2 user, 3 system, 4 assistant, then one a byte."""

    pad_id, eos_id, vocab_size, digest = 0, 1, 261, "bytes"
    marks = dict(user="\x02", system="\x03", assistant="\x04")

    def __init__(self):
        self.calls = 0

    def encode(self, text):
        self.calls += 1
        return [byte + 5 if byte > 4 else byte for byte in text.encode()]

    def decode(self, ids):
        return bytes(i - 5 for i in ids if i > 4).decode()

    def chat(self, messages, *, add_generation_prompt):
        text = "".join(self.marks[m["role"]] + m["content"] for m in messages)
        return text + ("\x04" if add_generation_prompt else "")

    def encode_chat(self, messages, *, add_generation_prompt):
        return self.encode(self.chat(messages, add_generation_prompt=add_generation_prompt))


class CoarseTokenizer(ByteTokenizer):
    """About as many ids a text as a real tokenizer gives: four bytes an id, and a template of 24."""

    digest, vocab_size = "coarse", 1 << 16

    def encode(self, text):
        raw = text.encode()
        return [(hash_of(raw[i : i + 4]) % 60000) + 10 for i in range(0, len(raw), 4)]

    def chat(self, messages, *, add_generation_prompt):
        return "#" * 96 + super().chat(messages, add_generation_prompt=add_generation_prompt)


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
