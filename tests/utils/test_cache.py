"""ResultCache: items across instances, identities, incomplete lines, and the share of each process."""

import fcntl
import threading

import pytest

from utils.artifacts import RowFile
from utils.cache import ResultCache, cache_key


def folder_of(out):
    (folder,) = (out / ".cache").glob("answers-*")
    return folder


def test_items_persist_across_instances(tmp_path):
    ResultCache(tmp_path, "answers", {"model": "m"}).add("a", {"text": "één\u2028line\nnext", "tokens": 3})
    again = ResultCache(tmp_path, "answers", {"model": "m"})
    again.add("b", {"text": ""})
    expected = {"a": {"text": "één\u2028line\nnext", "tokens": 3}, "b": {"text": ""}}
    assert ResultCache(tmp_path, "answers", {"model": "m"}).read() == again.gather() == expected


def test_last_item_of_a_key_wins(tmp_path):
    cache = ResultCache(tmp_path, "answers", {})
    for text in ("old", "new"):
        cache.add("a", {"text": text})
    assert cache.read() == {"a": {"text": "new"}}


@pytest.mark.parametrize(
    "kind, identity", [("answers", {"model": "n"}), ("answers", {"model": "m", "seed": 1}), ("scores", {"model": "m"})]
)
def test_identity_and_kind_choose_the_folder(tmp_path, kind, identity):
    first = ResultCache(tmp_path, "answers", {"model": "m"})
    first.add("a", {"x": 1})
    other = ResultCache(tmp_path, kind, identity)
    assert other.read() == {} and other.folder != first.folder
    other.add("a", {"x": 2})
    assert ResultCache(tmp_path, "answers", {"model": "m"}).read() == {"a": {"x": 1}}


def test_identity_file_and_rows_of_all_processes(tmp_path):
    ResultCache(tmp_path, "answers", {"model": "m", "dtype": "float32"})
    text = (folder_of(tmp_path) / "identity.json").read_text()
    assert '"model": "m"' in text and '"dtype": "float32"' in text
    # Rows written by another process of the launch are read too.
    (folder_of(tmp_path) / "rows-3.jsonl").write_text('{"key": "z", "x": 1}\n')
    assert ResultCache(tmp_path, "answers", {"model": "m", "dtype": "float32"}).read() == {"z": {"x": 1}}


@pytest.mark.parametrize(
    "cut", ['{"key": "b", "te', '{"key": "b", "text": "complete except for its end of line"}', "{"]
)
def test_incomplete_last_line_is_replaced(tmp_path, cut):
    cache = ResultCache(tmp_path, "answers", {})
    cache.add("a", {"text": "x"})
    path = folder_of(tmp_path) / "rows-0.jsonl"
    with path.open("a") as f:
        f.write(cut)
    again = ResultCache(tmp_path, "answers", {})
    assert again.read() == {"a": {"text": "x"}}
    again.add("c", {"text": "y"})
    assert again.read() == {"a": {"text": "x"}, "c": {"text": "y"}}
    assert path.read_text() == '{"key": "a", "text": "x"}\n{"key": "c", "text": "y"}\n'


def test_line_cut_within_a_character_is_ignored(tmp_path):
    cache = ResultCache(tmp_path, "answers", {})
    cache.add("a", {"text": "x"})
    with (folder_of(tmp_path) / "rows-0.jsonl").open("ab") as f:
        f.write('{"key": "b", "text": "é'.encode()[:-1])
    assert ResultCache(tmp_path, "answers", {}).read() == {"a": {"text": "x"}}


def test_overwrite_deletes_one_identity_only(tmp_path):
    for model in "mn":
        ResultCache(tmp_path, "answers", {"model": model}).add("a", {"x": model})
    assert ResultCache(tmp_path, "answers", {"model": "m"}, overwrite=True).read() == {}
    assert ResultCache(tmp_path, "answers", {"model": "m"}).read() == {}
    assert ResultCache(tmp_path, "answers", {"model": "n"}).read() == {"a": {"x": "n"}}


def test_own_share_of_one_and_many_processes(tmp_path):
    cache = ResultCache(tmp_path, "answers", {})
    assert cache.own_share([3, 1, 2]) == [3, 1, 2]

    class State:
        def __init__(self, index):
            self.process_index, self.num_processes = index, 3

    shares = []
    for index in range(3):
        cache.state = State(index)
        shares.append(cache.own_share(list(range(8))))
    assert sorted(sum(shares, [])) == list(range(8)) and [len(s) for s in shares] == [3, 3, 2]


def test_cache_key_ignores_key_order_only():
    assert cache_key({"a": 1, "b": "é"}) == cache_key({"b": "é", "a": 1})
    different = [("ab", "c"), ("a", "bc"), ("abc",), (["ab", "c"],), ("ab", "c", ""), (1,), ("1",), (None,), ("null",)]
    assert len({cache_key(*parts) for parts in different}) == len(different)


def test_row_that_another_process_is_writing(tmp_path):
    """Two evaluations share the base's cache; a row that one has half written is not a cut-off row to the other."""
    rows, row = RowFile(tmp_path / "rows.jsonl"), b'{"key": "a"}\n'
    with rows.path.open("ab", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(row[:5])
        other = threading.Thread(target=rows.append, args=[{"key": "b"}])
        other.start()
        other.join(0.3)
        file.write(row[5:])
    other.join(10)
    assert rows.read() == [{"key": "a"}, {"key": "b"}]
