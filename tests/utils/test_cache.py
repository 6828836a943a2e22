"""Work that is kept: items across instances, identities, cut-off lines; and batches by token budget."""

import random

import pytest

from preflab.models.batching import token_batches
from utils.cache import ResultCache, cache_key


def folder_of(out):
    (folder,) = (out / ".cache").glob("answers-*")
    return folder


def test_items_are_kept_across_instances(tmp_path):
    ResultCache(tmp_path, "answers", {"model": "m"}).add("a", {"text": "één\u2028line\nnext", "tokens": 3})
    again = ResultCache(tmp_path, "answers", {"model": "m"})
    again.add("b", {"text": ""})
    wanted = {"a": {"text": "één\u2028line\nnext", "tokens": 3}, "b": {"text": ""}}
    assert ResultCache(tmp_path, "answers", {"model": "m"}).read() == again.gather() == wanted


def test_the_last_item_of_a_key_counts(tmp_path):
    cache = ResultCache(tmp_path, "answers", {})
    for text in ("old", "new"):
        cache.add("a", {"text": text})
    assert cache.read() == {"a": {"text": "new"}}


@pytest.mark.parametrize(
    "kind, identity", [("answers", {"model": "n"}), ("answers", {"model": "m", "seed": 1}), ("scores", {"model": "m"})]
)
def test_another_identity_or_kind_has_another_folder(tmp_path, kind, identity):
    first = ResultCache(tmp_path, "answers", {"model": "m"})
    first.add("a", {"x": 1})
    other = ResultCache(tmp_path, kind, identity)
    assert other.read() == {} and other.folder != first.folder
    other.add("a", {"x": 2})
    assert ResultCache(tmp_path, "answers", {"model": "m"}).read() == {"a": {"x": 1}}


def test_the_identity_stands_there_in_words_beside_every_processs_items(tmp_path):
    ResultCache(tmp_path, "answers", {"model": "m", "dtype": "float32"})
    text = (folder_of(tmp_path) / "identity.json").read_text()
    assert '"model": "m"' in text and '"dtype": "float32"' in text
    # What another process of the launch has kept is found as well.
    (folder_of(tmp_path) / "rows-3.jsonl").write_text('{"key": "z", "x": 1}\n')
    assert ResultCache(tmp_path, "answers", {"model": "m", "dtype": "float32"}).read() == {"z": {"x": 1}}


@pytest.mark.parametrize("cut", ['{"key": "b", "te', '{"key": "b", "text": "whole but for its end of line"}', "{"])
def test_a_line_that_a_crash_cut_off_is_ignored_and_overwritten(tmp_path, cut):
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


def test_a_line_cut_off_within_a_character_is_ignored(tmp_path):
    cache = ResultCache(tmp_path, "answers", {})
    cache.add("a", {"text": "x"})
    with (folder_of(tmp_path) / "rows-0.jsonl").open("ab") as f:
        f.write('{"key": "b", "text": "é'.encode()[:-1])
    assert ResultCache(tmp_path, "answers", {}).read() == {"a": {"text": "x"}}


def test_overwrite_empties_this_identity_and_no_other(tmp_path):
    for model in "mn":
        ResultCache(tmp_path, "answers", {"model": model}).add("a", {"x": model})
    assert ResultCache(tmp_path, "answers", {"model": "m"}, overwrite=True).read() == {}
    assert ResultCache(tmp_path, "answers", {"model": "m"}).read() == {}
    assert ResultCache(tmp_path, "answers", {"model": "n"}).read() == {"a": {"x": "n"}}


def test_one_process_has_all_the_work_and_many_share_it(tmp_path):
    cache = ResultCache(tmp_path, "answers", {})
    assert cache.own_share([3, 1, 2]) == [3, 1, 2]

    class Of:
        def __init__(self, index):
            self.process_index, self.num_processes = index, 3

    shares = []
    for index in range(3):
        cache.state = Of(index)
        shares.append(cache.own_share(list(range(8))))
    assert sorted(sum(shares, [])) == list(range(8)) and [len(s) for s in shares] == [3, 3, 2]


def test_keys_tell_values_apart_and_not_the_order_of_keys():
    assert cache_key({"a": 1, "b": "é"}) == cache_key({"b": "é", "a": 1})
    different = [("ab", "c"), ("a", "bc"), ("abc",), (["ab", "c"],), ("ab", "c", ""), (1,), ("1",), (None,), ("null",)]
    assert len({cache_key(*parts) for parts in different}) == len(different)


# ----------------------------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize("budget", [1, 17, 100, 1000])
@pytest.mark.parametrize("most", [None, 1, 3])
def test_batches_keep_to_the_budget_and_hold_every_row_once(budget, most):
    rng = random.Random(budget)
    lengths = [rng.randint(1, 60) for _ in range(200)]
    batches = token_batches(lengths, budget, most)
    assert sorted(i for batch in batches for i in batch) == list(range(200))
    for batch in batches:
        padded = len(batch) * max(lengths[i] for i in batch)
        assert padded <= budget or len(batch) == 1
        assert len(batch) <= (most or 200)
    flat = [lengths[i] for batch in batches for i in batch]
    assert flat == sorted(lengths, reverse=True)


def test_batches_are_as_full_as_the_budget_allows():
    assert token_batches([2, 5, 4, 5, 1], 10) == [[1, 3], [2, 0], [4]]
    assert token_batches([1, 1, 1, 1], 3) == [[0, 1, 2], [3]]
    assert token_batches([50, 1], 10) == [[0], [1]]
    assert token_batches([0, 0], 2) == [[0, 1]] and token_batches([], 5) == []
