"""Names, paths and URLs; what a local store reads, and what is said about a cache that is too small."""

import pytest

from selfsight.errors import UserError
from selfsight.shards.cache import Cache
from selfsight.shards.remote import Patience
from selfsight.shards.store import is_url, open_store

RUN = {"run": (0, 100), "digest": "0" * 64}


@pytest.mark.parametrize(
    ("root", "name", "place"),
    [
        ("/data/c", "shards/0.tar", "/data/c/shards/0.tar"),
        ("data/c/", "shards/0.tar", "data/c/shards/0.tar"),
        ("file:///data/c", "shards/0.tar", "/data/c/shards/0.tar"),
        ("s3://b/c", "shards/0.tar", "s3://b/c/shards/0.tar"),
        ("s3://b/c/", "shards/0.tar", "s3://b/c/shards/0.tar"),
        ("/data/c", "s3://b/0.tar", "s3://b/0.tar"),
        ("/data/c", "/else/0.tar", "/else/0.tar"),
        ("s3://b/c", "https://h/0.tar", "https://h/0.tar"),
        ("s3://b/c", "/else/0.tar", "/else/0.tar"),
        ("s3://b/c", "file:///else/0.tar", "/else/0.tar"),
    ],
)
def test_where_a_name_lies(root, name, place):
    assert open_store(root).locate(name) == place


def test_what_is_a_url():
    assert [is_url(p) for p in ("s3://b", "http://h/c", "/a", "a:b", "file:///a", "memory://x")] == [
        True, True, False, False, False, True,
    ]  # fmt: skip


def test_a_folder(tmp_path):
    (tmp_path / "a").write_bytes(bytes(range(100)))
    store = open_store(tmp_path)
    assert store.read("a") == bytes(range(100))
    assert store.span("a", 10, 20, **RUN) == bytes(range(10, 20))
    assert store.span("a", 90, 120, **RUN) == bytes(range(90, 100))
    assert store.span("a", 10, 20, **RUN, again=True) == bytes(range(10, 20))
    with store.open("a", "0" * 64) as file:
        assert file.read() == bytes(range(100))
    assert store.missing(["a", "b", "s3://nobody/asks"]) == ["b"]
    with pytest.raises(FileNotFoundError):
        store.span("b", 0, 1, **RUN)


def test_a_cache_that_is_too_small_is_said_beforehand(tmp_path):
    store = open_store("s3://b/c", cache=Cache(tmp_path, 10**9))
    assert store.too_small_for(10**9) is None
    said = store.too_small_for(3 * 10**9)
    assert said is not None
    assert "3.0 GB" in said
    assert "1.0 GB" in said
    assert "SELFSIGHT_CACHE_BYTES" in said


def test_pauses_double_up_to_a_limit():
    pauses = [[Patience(pause=0.2, longest=5.0).before(n) for _ in range(50)] for n in range(1, 12)]
    for n, some in enumerate(pauses):
        most = min(5.0, 0.2 * 2**n)
        assert all(most / 2 <= pause <= most for pause in some)
    assert len({round(p, 6) for p in pauses[3]}) > 10  # a crowd comes apart


@pytest.mark.parametrize(
    ("name", "value"), [("TRIES", "0"), ("TRIES", "x"), ("PAUSE", "-1"), ("PAUSE", "nan"), ("SILENCE", "0")]
)
def test_a_patience_that_is_none(name, value, monkeypatch):
    monkeypatch.setenv(f"SELFSIGHT_{name}", value)
    with pytest.raises(UserError, match=f"SELFSIGHT_{name}"):
        open_store("memory://x").read("a")
