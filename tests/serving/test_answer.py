"""An answer's text, token by token: nothing is given away that a later token changes."""

import random
import time

import hypothesis
import hypothesis.strategies as st
import pytest
import tokenizers

from molora_jax.decode.slots import Draw, Token
from molora_jax.evaluation.run import before
from molora_jax.io.tokenizer import TORN, Tokenizer, byte_tokenizer
from molora_jax.serving.answer import WINDOW, Answer, Grown


def _pieces(run, ids, **options):
    answer = Answer(run, [5], Draw(), **(dict(most=len(ids)) | options))
    pieces = []
    for i in ids:
        pieces.append(answer.add(Token(i, 0.0)))
        if answer.finish:
            break
    return answer, pieces


def _whole(run, ids, stop=()):
    """As `Run.generate` makes it of the ids."""
    keep = run.stop_at(stop, ids) if stop else None
    return before(run.text(ids[:keep]), stop)


def test_a_character_comes_whole(run):
    text = "naïve 10 € 🙂 ok"
    ids = run.tokenizer.encode(text)
    assert len(ids) == len(text.encode())  # the byte tokenizer: every character but ASCII is torn
    _, pieces = _pieces(run, ids)
    assert "".join(piece.text for piece in pieces) == text
    assert not any(TORN in piece.text for piece in pieces)
    assert [piece.text for piece in pieces][:4] == ["n", "a", "", "ï"]
    assert pieces[-1].finish == "length" and all(piece.finish is None for piece in pieces[:-1])


def test_a_stop_text_over_several_tokens(run):
    ids = run.tokenizer.encode("one EN two END three")
    answer, pieces = _pieces(run, ids, stop=("END", "never"))
    assert "".join(piece.text for piece in pieces) == "one EN two "
    assert pieces[-1].finish == "stop" and len(answer.ids) == len("one EN two END")
    assert not any(piece.text.endswith("E") for piece in pieces)  # "EN" came when "END" was ruled out


def test_the_end_token_ends_it(run):
    end = run.tokenizer.end_ids[0]
    _, pieces = _pieces(run, [*run.tokenizer.encode("ab"), end, 7])
    assert [piece.text for piece in pieces] == ["a", "b", ""] and pieces[-1].finish == "stop"
    assert pieces[-1].tokens == ()


def test_bytes_that_are_no_character_come_at_the_end(run):
    ids = run.tokenizer.encode("🙂")[:2]
    _, pieces = _pieces(run, ids)
    assert [piece.text for piece in pieces] == ["", run.text(ids)] and TORN in run.text(ids)


PIECES = st.lists(st.sampled_from(["a", "ab", "b", "é", "🙂", "\n"]), max_size=12)


@hypothesis.given(
    text=PIECES, cut=st.integers(0, 3), stop=st.lists(st.sampled_from(["ab", "ba", "é\n", "a🙂b"]), max_size=2)
)
def test_pieces_are_the_whole(run, text, cut, stop):
    ids = run.tokenizer.encode("".join(text))
    ids = ids[: len(ids) - cut]
    hypothesis.assume(ids)
    answer, pieces = _pieces(run, ids, stop=tuple(stop))
    assert "".join(piece.text for piece in pieces) == _whole(run, ids, tuple(stop)) == answer.given
    assert (answer.finish == "stop") == (run.stop_at(tuple(stop), ids) is not None)
    assert sum((piece.tokens for piece in pieces), ()) == tuple(Token(i, 0.0) for i in answer.ids)


@pytest.mark.parametrize("stop", ["x", "\ufffd"])
def test_a_stop_text_that_is_written_for_torn_bytes(run, stop):
    ids = run.tokenizer.encode("a🙂")[:3]
    _, pieces = _pieces(run, ids, stop=(stop,))
    assert "".join(piece.text for piece in pieces) == _whole(run, ids, (stop,))


def _fallback():
    """As Llama's: words with a mark for the space, bytes for what has no word; a space at the start is left out."""
    words = ["▁", "▁a", "a", "b", "▁the", "\n", ".", "<s>"] + [f"<0x{i:02X}>" for i in range(256)]
    inner = tokenizers.Tokenizer(tokenizers.models.BPE({w: i for i, w in enumerate(words)}, [], byte_fallback=True))
    parts = tokenizers.decoders
    inner.decoder = parts.Sequence(
        [parts.Replace("▁", " "), parts.ByteFallback(), parts.Fuse(), parts.Strip(" ", 1, 0)]
    )
    inner.add_special_tokens(["<s>"])
    return Tokenizer(inner)


def _pieces_of_words():
    words = {w: i for i, w in enumerate(["[UNK]", "a", "##b", "the", ".", ",", "'", "s", "##é"])}
    inner = tokenizers.Tokenizer(tokenizers.models.WordPiece(words, unk_token="[UNK]"))
    inner.decoder = tokenizers.decoders.WordPiece()
    return Tokenizer(inner)


def _marked():
    inner = tokenizers.Tokenizer(tokenizers.models.BPE({w: i for i, w in enumerate(["▁", "▁▁", "▁a", "b", "."])}, []))
    inner.decoder = tokenizers.decoders.Metaspace()
    return Tokenizer(inner)


@pytest.mark.parametrize("make", [byte_tokenizer, _fallback, _pieces_of_words, _marked])
def test_what_grows_is_what_is_decoded_at_once(make):
    tokenizer, draw = make(), random.Random(0)
    size, longest = tokenizer.vocab_size, 0
    emoji = tokenizer.encode("🙂é€") if make in (byte_tokenizer, _fallback) else [1, 2]
    for _ in range(40):
        few = draw.sample(range(min(size, 8) if make is _fallback else size), 3)  # long runs of a kind
        ids = [i for _ in range(60) for i in draw.choice([emoji, few[:1], few[1:], [draw.choice(few)]])]
        grown, width = Grown(tokenizer), 0
        for n, i in enumerate(ids, 1):
            grown.add(i)
            width = max(width, len(grown.ids))
            whole = tokenizer.decode(ids[:n])
            if make is _fallback and whole.endswith(TORN):  # an open character tears those before it for a while
                assert grown.after(0).startswith(whole.rstrip(TORN)) and grown.after(0).endswith(TORN)
            else:
                assert grown.after(0) == whole and len(grown) == len(whole)
                assert grown.after(n // 2) == whole[n // 2 :]
        longest = max(longest, width)
    assert longest < 8 * WINDOW


def test_a_long_stop_text_costs_no_more_than_the_text_that_waits(run):
    ids = run.tokenizer.encode("aaaa b")
    start = time.process_time()
    _, pieces = _pieces(run, ids, stop=("a" * 1_000_000,))
    assert "".join(piece.text for piece in pieces) == "aaaa b" and time.process_time() - start < 2


def test_bytes_of_tokens(run):
    fallback = _fallback()
    assert fallback.token_bytes(fallback.inner.token_to_id("▁the")) == b" the"
    for tokenizer in (run.tokenizer, fallback):
        ids = tokenizer.encode("a🙂")
        assert b"".join(map(tokenizer.token_bytes, ids)) == "a🙂".encode() and len(ids) == 5
    pieces = _pieces_of_words()
    assert [pieces.token_bytes(i) for i in (1, 2, 3)] == [b" a", b"b", b" the"]


def test_offsets_follow_the_text(run):
    answer, _ = _pieces(run, run.tokenizer.encode("a🙂bc"))
    assert answer.offsets == [0, 1, 1, 1, 1, 2, 3]
