"""The cache of tokenised tasks: used, rebuilt when damaged, never needed, never a pickle."""

import os
import stat

import numpy as np
import pytest

from molora_jax.data import build, cache
from tests.data.fakes import ByteTokenizer, config, numbered


@pytest.fixture
def make(tmp_path):
    entry = numbered(tmp_path / "a.jsonl", 60)

    def make(tokenizer=None, **changes):
        tokenizer = tokenizer or ByteTokenizer()
        data = build(config(entry, **changes), tokenizer=tokenizer, batch_size=2, seed=0)
        return data.train.batch(4), tokenizer.calls

    return make


def same(a, b):
    return all(np.array_equal(a[k], b[k]) for k in a)


def test_a_second_start_tokenises_nothing(make):
    first, calls = make()
    again, none = make()
    assert calls > 100 and none == 0 and same(first, again)


def test_the_key_has_the_tokenizer_the_template_and_the_system_turn(make):
    make()
    assert make(system="S")[1] > 100
    other = ByteTokenizer()
    other.digest = "other"
    assert make(other)[1] > 100
    template = ByteTokenizer()
    template.marks = dict(template.marks, user="\x05")
    assert make(template)[1] > 100
    assert make(seq_len=32)[1] == 0, "the length limit is applied later"


def test_a_tokenizer_that_cannot_be_told_apart_is_not_cached(make, own_cache):
    tokenizer = ByteTokenizer()
    tokenizer.digest = None
    make(tokenizer)
    assert not list(own_cache.rglob("*.npz"))


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "text", "pickle", "missing array"])
def test_a_damaged_file_is_built_again(make, own_cache, damage):
    first, _ = make()
    (path,) = own_cache.rglob("*.npz")
    raw = bytearray(path.read_bytes())
    if damage == "flip":
        raw[len(raw) // 2] ^= 1
        path.write_bytes(raw)
    elif damage == "cut":
        path.write_bytes(raw[: len(raw) // 2])
    elif damage in ("empty", "text"):
        path.write_bytes(b"" if damage == "empty" else b"hello")
    elif damage == "pickle":
        np.savez(path, ids=np.array([print], dtype=object))
    else:
        np.savez(path, ids=np.zeros(3, np.int32))
    again, calls = make()
    assert calls > 100 and same(first, again)
    assert make()[1] == 0, "and it is whole again"


def test_every_flipped_byte_is_seen(own_cache):
    cache.save("k", dict(a=np.arange(5), b=np.array([], np.int32)))
    path = own_cache / "data" / "k.npz"
    raw = path.read_bytes()
    whole = cache.load("k")
    for at in range(0, len(raw), 7):
        path.write_bytes(raw[:at] + bytes([raw[at] ^ 0x10]) + raw[at + 1 :])
        loaded = cache.load("k")
        assert loaded is None or all(np.array_equal(loaded[k], whole[k]) for k in whole)


def test_a_cache_that_cannot_be_written_is_no_error(make, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MOLORA_CACHE", str(tmp_path / "file" / "below"))
    make()
    assert "cannot be cached" in caplog.text


def test_a_failed_write_leaves_nothing(make, own_cache, monkeypatch):
    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", full)
    make()
    assert not [path for path in own_cache.rglob("*") if path.is_file()]


def test_an_entry_in_anothers_place_is_built_again(own_cache, caplog):
    cache.save("k1", dict(a=np.arange(5)))
    cache.save("k2", dict(a=np.arange(6)))
    one, two = (own_cache / "data" / f"{key}.npz" for key in ("k1", "k2"))
    one.write_bytes(two.read_bytes())
    assert cache.load("k1") is None and "digest does not hold" in caplog.text and len(cache.load("k2")["a"]) == 6


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_other_users_may_read_what_the_umask_lets_them(own_cache, umask, mode):
    before = os.umask(umask)
    try:
        cache.save("k", dict(a=np.arange(5)))
    finally:
        os.umask(before)
    assert stat.S_IMODE((own_cache / "data" / "k.npz").stat().st_mode) == mode


def test_another_users_file_that_cannot_be_read_is_a_miss(make, own_cache, monkeypatch, caplog):
    """Injected: root reads everything."""
    first, _ = make()

    def denied(*_, **__):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(cache, "_mapped", denied)
        patch.setattr(os, "replace", denied)  # nor replaced
        again, calls = make()
    assert calls > 100 and same(first, again)
    assert "cannot be read (Permission denied)" in caplog.text and "cannot be cached" in caplog.text
    assert len([p for p in own_cache.rglob("*") if p.is_file()]) == 1


def test_what_a_killed_process_left_goes_after_a_day(own_cache):
    (own_cache / "data").mkdir()
    for name, age in ((".old.tmp", 2 * cache.STALE_SECONDS), (".new.tmp", 0)):
        path = own_cache / "data" / name
        path.write_bytes(b"half")
        os.utime(path, (path.stat().st_mtime - age,) * 2)
    cache.save("k", dict(a=np.arange(5)))
    assert {p.name for p in (own_cache / "data").iterdir()} == {".new.tmp", "k.npz"}
