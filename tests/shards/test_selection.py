import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from selfsight.errors import UserError
from selfsight.shards import Corpus
from selfsight.shards.selection import read_selection, write_selection

N = 20


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, write_corpus):
    return Corpus.open(write_corpus(tmp_path_factory.mktemp("c") / "corpus", [b"x"] * N, 9, 4))


@pytest.fixture
def read(corpus, tmp_path):
    """Reads a selection of these columns."""

    def read(**columns):
        pq.write_table(pa.table(columns), tmp_path / "own.parquet")
        return read_selection(corpus, str(tmp_path / "own.parquet"))

    return read


def test_what_was_written_is_read(corpus):
    write_selection(corpus, "some", np.array([8, 3, 19]), np.array([2, 1, 0]), ["near the centre", "", "blurred"])
    found = read_selection(corpus, "some")
    assert (found.ordinals.tolist(), found.repeats.tolist()) == ([3, 8], [1, 2])
    write_selection(corpus, "other", np.array([3, 8]), np.array([1, 2]))
    assert read_selection(corpus, "other").digest == found.digest


@pytest.mark.parametrize(
    "keys",
    [
        pa.array(["000000000003", "8"]),
        pa.array(["3", "8"]).dictionary_encode(),
        pa.array(["3", "8"], pa.large_string()),
        pa.array([3, 8], pa.int32()),
        pa.array([3, 8], pa.uint64()),
    ],
    ids=["text", "dictionary", "large", "int32", "uint64"],
)
def test_tables_that_others_write(read, keys):
    """pandas makes floats of whole numbers, and dictionaries of categories."""
    for repeat in (pa.array([1, 2], pa.uint64()), pa.array([1.0, 2.0])):
        found = read(key=keys, repeat=repeat)
        assert (found.ordinals.tolist(), found.repeats.tolist()) == ([3, 8], [1, 2])
        assert found.ordinals.dtype == found.repeats.dtype == np.int64
    assert read(key=keys).repeats.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"key": ["3", "cat"]}, "a key or repeat is no whole number"),
        ({"key": ["3", None]}, "a key or repeat is no whole number"),
        ({"key": [3.5]}, "a key or repeat is no whole number"),
        ({"key": ["3"], "repeat": [1.5]}, "a key or repeat is no whole number"),
        ({"key": ["3"], "repeat": ["often"]}, "a key or repeat is no whole number"),
        ({"key": ["3"], "repeat": [None]}, "a key or repeat is no whole number"),
        ({"key": [["3"]]}, "a key or repeat is no whole number"),
        ({"key": ["3", "20"]}, "names sample 20 of a corpus of 20"),
        ({"key": ["-1", "3"]}, "names sample -1 of a corpus of 20"),
        ({"key": ["3", "8", "3"]}, "names sample 3 twice: use its repeat column"),
        ({"key": ["3"], "repeat": [0]}, "selects nothing"),
        ({"name": ["3"]}, "has no column key"),
    ],
)
def test_mistakes_are_named(read, columns, words):
    with pytest.raises(UserError, match=rf"own\.parquet:? {words}[^\n]*$"):
        read(**columns)
