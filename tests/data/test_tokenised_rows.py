"""Tokenised rows on disk: equal to those in memory, read again for equal content only, safe for concurrent runs."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import make_pairs, write_jsonl

from preflab.data import conversations, preferences, tokenised_rows
from preflab.data.template_date import choose_template_date


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """The folder of a cache that holds splits of every size; batches are small, so that there are several."""
    monkeypatch.setenv("PREFERENCELAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tokenised_rows, "BATCH", 7)
    return tmp_path / "cache" / "tokenised"


def pairs_of(path):
    return preferences.load_pairs([{"name": str(path), "split": "train"}])


def rows_of(dataset):
    return [dataset[i] for i in range(len(dataset))]


def rows_to_drop():
    """40 pairs of which some have equal answers once truncated."""
    rows = make_pairs(40)
    for i in (5, 6, 20):
        rows[i]["chosen"][1]["content"] = "word " * 60
        rows[i]["rejected"][1]["content"] = "word " * 60 + "end"
    return rows


def test_disk_equals_memory(cache, smol_tokenizer, tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "train.jsonl", rows_to_drop())
    memory, counts = preferences.tokenize(expected := pairs_of(path), smol_tokenizer, 64, 32)
    assert not cache.exists()
    monkeypatch.setattr(tokenised_rows, "SMALLEST", 0)
    for _ in range(2):
        disk, again = preferences.tokenize(data := pairs_of(path), smol_tokenizer, 64, 32)
        assert rows_of(disk) == rows_of(memory) and again == counts
        assert data.dropped == expected.dropped == {"identical_after_truncation": 3}
        assert [pair.source for pair in data.pairs] == [pair.source for pair in expected.pairs]
        # The second time the template renders nothing.
        monkeypatch.setattr(preferences, "_texts", None)
    assert len(list(cache.glob("*/rows.arrow"))) == 1


def test_conversations_on_disk(cache, smol_tokenizer, tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "train.jsonl", make_pairs(20))
    result = []
    for smallest in (100, 0, 0):
        monkeypatch.setattr(tokenised_rows, "SMALLEST", smallest)
        data = conversations.load_conversations([{"name": str(path), "split": "train"}])
        dataset, counts = conversations.tokenize(data, smol_tokenizer, "responses", 64)
        result.append((rows_of(dataset), counts, len(data.conversations)))
    assert result[0] == result[1] == result[2]


@pytest.mark.parametrize("change", ["text", "length", "template", "date", "token", "code", "nothing"])
def test_what_the_cache_depends_on(change, cache, smol_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenised_rows, "SMALLEST", 0)
    dated = smol_tokenizer.chat_template + "{% if false %}{{ strftime_now('%Y') }}{% endif %}"
    monkeypatch.setattr(smol_tokenizer, "chat_template", dated)
    choose_template_date("2024-01-05")
    rows, length, eos = make_pairs(9), 64, smol_tokenizer.eos_token
    preferences.tokenize(pairs_of(write_jsonl(tmp_path / "a.jsonl", rows)), smol_tokenizer, length, 32)
    if change == "text":
        rows[3]["chosen"][1]["content"] += "!"
    elif change == "length":
        length = 65
    elif change == "template":
        smol_tokenizer.chat_template += " "
    elif change == "date":
        choose_template_date("2025-01-05")
    elif change == "token":
        smol_tokenizer.eos_token = "<|im_start|>"
    elif change == "code":
        monkeypatch.setattr(tokenised_rows, "_code", lambda: "another version")
    # Under another name: the content counts.
    preferences.tokenize(pairs_of(write_jsonl(tmp_path / "b.jsonl", rows)), smol_tokenizer, length, 32)
    choose_template_date(None)
    smol_tokenizer.eos_token = eos
    assert len(list(cache.glob("*/rows.arrow"))) == (1 if change == "nothing" else 2)


def test_concurrent_and_interrupted(cache, smol_tokenizer, tmp_path, monkeypatch):
    """Several runs at once write one entry; what an interrupted call has left is replaced."""
    monkeypatch.setattr(tokenised_rows, "SMALLEST", 0)
    path = write_jsonl(tmp_path / "train.jsonl", make_pairs(30))
    usual, written = tokenised_rows._write, []

    def write(folder, *args):
        written.append(folder)
        (folder.parent / f"{folder.name}.part").mkdir(exist_ok=True)
        (folder.parent / f"{folder.name}.part" / "rows.arrow").write_text("half")
        usual(folder, *args)

    monkeypatch.setattr(tokenised_rows, "_write", write)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: preferences.tokenize(pairs_of(path), smol_tokenizer, 64, 32)[0], range(4)))
    assert len(written) == 1 and all(rows_of(r) == rows_of(results[0]) for r in results)


def test_without_a_writable_cache(cache, smol_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenised_rows, "SMALLEST", 0)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PREFERENCELAB_CACHE", str(tmp_path / "file"))
    ids, _ = preferences.tokenize(pairs_of(write_jsonl(tmp_path / "x.jsonl", make_pairs(3))), smol_tokenizer, 64, 32)
    assert len(ids) == 3


def test_oldest_entries_are_deleted(cache, smol_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenised_rows, "SMALLEST", 0)
    monkeypatch.setattr(tokenised_rows, "ENTRIES", 2)
    path = write_jsonl(tmp_path / "train.jsonl", make_pairs(3))
    for length in (64, 65, 66):
        preferences.tokenize(pairs_of(path), smol_tokenizer, length, 32)
    assert len(list(cache.glob("*/outcome.json"))) == 2
    assert all(json.loads(p.read_text())["usable"] == [0, 1, 2] for p in cache.glob("*/outcome.json"))


def test_columns_without_lists(smol_tokenizer, tmp_path):
    data = pairs_of(write_jsonl(tmp_path / "train.jsonl", make_pairs(9)))
    ids, _ = preferences.tokenize(data, smol_tokenizer, None, None)
    rows = ids["chosen_ids"]
    assert tokenised_rows.lengths(ids, "chosen_ids").tolist() == [len(row) for row in rows]
    assert tokenised_rows.largest_id(ids, "chosen_ids") == max(max(row) for row in rows)
    assert tokenised_rows.ends_of(ids, "chosen_ids", first=8) == [row[:8] for row in rows]
    assert tokenised_rows.ends_of(ids, "chosen_ids", last=3) == [row[-3:] for row in rows]
    assert tokenised_rows.count_other_than(ids, "chosen_ids", rows[0][0]) == sum(
        token != rows[0][0] for row in rows for token in row
    )
