"""An answer's text, token by token: nothing is given away that a later token changes."""

import hypothesis
import hypothesis.strategies as st
import pytest

from molora_jax.decode.slots import Draw, Token
from molora_jax.evaluation.run import before
from molora_jax.serving.answer import TORN, Answer


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
