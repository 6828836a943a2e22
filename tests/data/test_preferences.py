"""Preference data: all formats give the same pair, filters are counted, truncation never empties an answer."""

import gzip
import json

import pytest
from conftest import make_pairs, write_jsonl

from preflab.data.pair_rows import to_pair
from preflab.data.preferences import DataArguments, load_pairs, tokenize, truncate
from preflab.data.prompt_format import AS_CHAT
from preflab.data.rows import read_rows
from preflab.data.sources import without_overlap
from utils.errors import UserError

USER = {"role": "user", "content": "Two plus two?"}
GOOD, BAD = {"role": "assistant", "content": "Four."}, {"role": "assistant", "content": "Five."}
EXPECTED = ([USER], "Four.", "Five.")


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Two plus two?", "chosen": [USER, GOOD], "rejected": [USER, BAD]},  # UltraFeedback-binarized
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},  # TRL, implicit prompt
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},  # TRL, explicit prompt
        {"prompt": [USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": [USER], "chosen": "Four.", "rejected": "Five."},
        {"prompt": "Two plus two?", "chosen": [GOOD], "rejected": [BAD]},
        {
            "chosen": "\n\nHuman: Two plus two?\n\nAssistant: Four.",
            "rejected": "\n\nHuman: Two plus two?\n\nAssistant: Five.",
        },
        {"prompt": "\n\nHuman: Two plus two?\n\nAssistant:", "chosen": " Four.", "rejected": " Five."},
        {
            "prompt": "\n\nHuman: Two plus two?\n\nAssistant:",
            "chosen": "\n\nHuman: Two plus two?\n\nAssistant: Four.",
            "rejected": "\n\nHuman: Two plus two?\n\nAssistant: Five.",
        },
    ],
)
def test_chat_formats_give_the_same_pair(row):
    pair = to_pair(row, "row 0")
    assert (pair.messages, pair.chosen, pair.rejected) == EXPECTED


def test_plain_text_formats():
    explicit = to_pair({"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}, "row 0")
    implicit = to_pair({"chosen": "The sky is blue.", "rejected": "The sky is green."}, "row 0")
    assert explicit.text == implicit.text == "The sky is"
    assert (implicit.chosen, implicit.rejected) == (" blue.", " green.") == (explicit.chosen, explicit.rejected)
    as_chat = to_pair({"prompt": "Sky?", "chosen": "Blue.", "rejected": "Green."}, "row 0", prompt_format=AS_CHAT)
    assert as_chat.messages == [{"role": "user", "content": "Sky?"}]


def test_implicit_prompt_equals_trl():
    from trl.data_utils import extract_prompt

    row = {"chosen": "Question: why? Answer: because A.", "rejected": "Question: why? Answer: because of B."}
    expected, pair = extract_prompt(dict(row)), to_pair(row, "row 0")
    assert (pair.text, pair.chosen, pair.rejected) == (expected["prompt"], expected["chosen"], expected["rejected"])


def test_prompt_keeps_all_earlier_turns():
    system = {"role": "system", "content": "Be brief."}
    turns = [system, USER, GOOD, {"role": "user", "content": "And three?"}]
    pair = to_pair({"prompt": "Two plus two?", "chosen": [*turns, GOOD], "rejected": [*turns, BAD]}, "row 0")
    assert pair.messages == turns
    transcript = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    pair = to_pair({"chosen": transcript + " d", "rejected": transcript + " e"}, "row 0")
    assert [m["role"] for m in pair.messages] == ["user", "assistant", "user"] and pair.chosen == "d"


def test_prompt_string_beside_system_turn():
    system = {"role": "system", "content": "Be brief."}
    row = {"prompt": "Two plus two?", "chosen": [system, GOOD], "rejected": [system, BAD]}
    assert to_pair(row, "row 0").messages == [system, USER]


def test_plain_text_edges():
    same = {"chosen": "The sky is blue.", "rejected": "The sky is blue."}
    assert to_pair(same, "row 0") == "identical_responses"
    longer = to_pair({"chosen": "Is it? yes", "rejected": "Is it? yes, but no"}, "row 0")
    assert longer.chosen and longer.rejected and longer.text + longer.chosen == "Is it? yes"
    repeated = to_pair({"prompt": "The sky is", "chosen": "The sky is blue.", "rejected": "The sky is green."}, "row 0")
    assert (repeated.text, repeated.chosen) == ("The sky is", " blue.")


def test_transcripts_that_diverge_early_are_dropped():
    chosen = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d"
    rejected = "\n\nHuman: a\n\nAssistant: x\n\nHuman: y\n\nAssistant: z"
    assert to_pair({"chosen": chosen, "rejected": rejected}, "row 0") == "diverges_before_last_turn"


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "a", "chosen": "b"}, ("row 7", "'rejected'", "chosen, prompt")),
        ({"prompt": "a", "chosen": "b", "rejected": ["c"]}, ("row 7", "'chosen'", "'rejected'")),
        ({"prompt": 3, "chosen": "b", "rejected": "c"}, ("row 7", "'prompt'", "int")),
        ({"chosen": [USER, {"role": "bot", "content": "x"}], "rejected": [USER, BAD]}, ("row 7", "'chosen'", "bot")),
        ({"chosen": [USER, {"text": "x"}], "rejected": [USER, BAD]}, ("row 7", "message 1", "role")),
        (
            {"chosen": [USER, GOOD], "rejected": [USER, {"role": "assistant", "content": None}]},
            ("row 7", "'rejected', message 1", "content"),
        ),
        (
            {"prompt": "a", "chosen": "b", "rejected": "c", "score_chosen": "high"},
            ("row 7", "'score_chosen'", "'high'"),
        ),
        ({"chosen": "\n\nHuman: a", "rejected": "\n\nHuman: a", "prompt": ["x"]}, ("row 7", "'prompt'")),
        ({"prompt": "Hi\n\nHuman: a", "chosen": [GOOD], "rejected": ["b"]}, ("row 7", "'rejected', message 0")),
        ("text", ("row 7", "str")),
    ],
)
def test_schema_error_names_row_and_key(row, words):
    with pytest.raises(UserError) as error:
        to_pair(row, "row 7")
    assert all(word in str(error.value) for word in words), error.value


def test_all_file_types_give_the_same_rows(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = make_pairs(3)
    write_jsonl(tmp_path / "a.jsonl", rows)
    (tmp_path / "a.json").write_text(json.dumps(rows))
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    write_jsonl(tmp_path / "folder" / "train-00000.jsonl", rows)
    for name in ("a.jsonl", "a.json", "b.jsonl.gz", "a.parquet", "folder"):
        read, about = read_rows(str(tmp_path / name), "train")
        assert [row for _, row in read] == rows, name
        assert about["rows"] == 3 and len(about["sha256"]) == 64


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.jsonl", '{"chosen": 1}\n{oops\n', ("a.jsonl line 2", "JSON")),
        ("a.json", '{"chosen": 1}', ("a.json", "list")),
        ("a.parquet", "nope", ("a.parquet", "parquet")),
        ("a.txt", "x", ("a.txt", ".jsonl")),
        ("a.jsonl", "", ("a.jsonl",)),
    ],
)
def test_damaged_file_is_named(tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError) as error:
        read_rows(str(tmp_path / name), "train")
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    "url",
    ["hf://datasets/owner", "hf://datasets/owner/name", "hf://owner/name/x.jsonl", "hf://buckets/a/b/c.jsonl", "hf://"],
)
def test_hub_file_without_owner_name_and_path_is_refused(url):
    with pytest.raises(UserError, match=f"{url}.*hf://datasets/OWNER/NAME/PATH"):
        read_rows(url, "train")


@pytest.mark.parametrize(("at", "revision"), [("", None), ("@v1", "v1"), ("@refs/pr/3", "refs/pr/3")])
def test_hub_file_is_read_at_its_revision(at, revision, tmp_path, monkeypatch):
    """Offline: the download is replaced by a local file."""
    path, requests = write_jsonl(tmp_path / "x.jsonl", make_pairs(2)), []
    monkeypatch.setattr("preflab.data.rows.fetch", lambda *request: requests.append(request) or path)
    monkeypatch.setattr("preflab.data.rows.hub_revision", lambda repo, kind, revision: f"commit of {revision}")
    url = f"hf://datasets/owner/name{at}/folder/x.jsonl"
    rows, about = read_rows(url, "train")
    assert requests == [("owner/name", "folder/x.jsonl", "dataset", revision)]
    assert [source for source, _ in rows] == [f"{url} line 1", f"{url} line 2"]
    assert (about["name"], about["revision"], about["rows"]) == (url, f"commit of {revision}", 2)


def test_damaged_archive_and_invalid_unicode(tmp_path):
    archive = gzip.compress(b'{"prompt": "a", "chosen": "b", "rejected": "c"}' * 50)
    (tmp_path / "a.jsonl.gz").write_bytes(archive[: len(archive) // 2])
    with pytest.raises(UserError, match="a.jsonl.gz"):
        read_rows(str(tmp_path / "a.jsonl.gz"), "train")
    (tmp_path / "b.jsonl").write_text('{"prompt": "a", "chosen": "\\ud83d", "rejected": "c"}\n')
    with pytest.raises(UserError, match="b.jsonl line 1.*Unicode"):
        load_pairs([{"name": str(tmp_path / "b.jsonl"), "split": "train"}])


@pytest.mark.parametrize(
    "arguments",
    [
        {"dataset_name": "FILE"},
        {"dataset_name": "FOLDER", "dataset_test_split": "train"},
        {"dataset_name": "FILE", "test_dataset_name": "FILE"},
    ],
)
def test_train_data_cannot_be_test_data(prefs, arguments):
    names = {"FILE": str(prefs / "train.jsonl"), "FOLDER": str(prefs)}
    with pytest.raises(UserError, match="--test_dataset_name.*--dataset_test_split none"):
        DataArguments(**{k: names.get(v, v) for k, v in arguments.items()}).sources()


@pytest.mark.parametrize(
    "entry", [{"path": 3}, {"name": "x"}, {"path": "x", "fraction": "half"}, {"path": "x", "splt": "a"}, 7]
)
def test_invalid_mix_entry_is_refused(entry):
    with pytest.raises(UserError, match="datasets: "):
        DataArguments(datasets=[entry]).sources()


def test_limit_is_spread_over_the_mix(tmp_path):
    files = [write_jsonl(tmp_path / f"{i}.jsonl", make_pairs(9, 100 * i)) for i in range(2)]
    data = load_pairs([{"name": str(f), "split": "x"} for f in files], limit=4)
    assert [pair.source.split()[0] for pair in data.pairs] == [str(files[0])] * 2 + [str(files[1])] * 2


def test_missing_files_and_splits(tmp_path, prefs):
    with pytest.raises(UserError, match="none.jsonl"):
        read_rows(str(tmp_path / "none.jsonl"), "train")
    with pytest.raises(UserError, match="validation.*test, train"):
        read_rows(str(prefs), "validation")


def test_filters_are_counted(tmp_path):
    rows = make_pairs(8)
    rows[1]["rejected"] = rows[1]["chosen"]  # identical
    rows[2]["chosen"] = [*rows[2]["chosen"][:1], {"role": "assistant", "content": "  "}]  # empty
    rows[3] = {
        **make_pairs(1)[0],
        "chosen": rows[3]["chosen"][:0] + make_pairs(1)[0]["chosen"],
    }  # prompt of row 0 again
    rows[4]["score_rejected"] = 8.0  # tie
    rows[5]["score_rejected"] = 7.5  # small margin
    file = str(write_jsonl(tmp_path / "x.jsonl", rows))
    data = load_pairs([{"name": file, "split": "train"}], drop_ties=True, min_score_margin=1.0)
    assert data.dropped == {
        "identical_responses": 1,
        "empty_response": 1,
        "duplicate_prompt": 1,
        "tied_scores": 1,
        "score_margin_below_threshold": 1,
    }
    assert len(data.pairs) == 3 and data.rows == 8
    assert len(load_pairs([{"name": file, "split": "train"}], keep_duplicate_prompts=True).pairs) == 6
    del rows[0]["score_chosen"]
    with pytest.raises(UserError, match="line 1.*score_chosen"):
        load_pairs([{"name": str(write_jsonl(tmp_path / "y.jsonl", rows)), "split": "train"}], drop_ties=True)


def test_train_test_overlap_policies(tmp_path):
    # Two prompts of the train split, one of them in upper case.
    test = make_pairs(6, 4)
    test[0]["chosen"][0]["content"] = test[0]["chosen"][0]["content"].upper()
    test[0]["rejected"][0]["content"] = test[0]["chosen"][0]["content"]
    train_file, test_file = write_jsonl(tmp_path / "a.jsonl", make_pairs(6)), write_jsonl(tmp_path / "b.jsonl", test)

    def overlap(policy):
        train, test = (load_pairs([{"name": str(f), "split": "x"}]) for f in (train_file, test_file))
        return without_overlap(train.pairs, test.pairs, policy, train.dropped), train.dropped

    with pytest.raises(UserError, match="^2 .*a.jsonl line 5.*--train_test_overlap"):
        overlap("refuse")
    pairs, dropped = overlap("drop")
    assert len(pairs) == 4 and dropped == {"prompt_in_test_split": 2}
    pairs, dropped = overlap("keep")
    assert len(pairs) == 6 and dropped == {"prompt_in_test_split_kept": 2}


def test_mix_fractions_never_repeat_rows(tmp_path):
    a, b = write_jsonl(tmp_path / "a.jsonl", make_pairs(30)), write_jsonl(tmp_path / "b.jsonl", make_pairs(10, 100))
    everything = load_pairs([{"name": str(a), "split": "x"}, {"name": str(b), "split": "x"}])
    assert len(everything.pairs) == 40
    shares = [{"name": str(a), "split": "x", "fraction": 0.5}, {"name": str(b), "split": "x", "fraction": 0.5}]
    assert [s["rows"] for s in load_pairs(shares).sources] == [30, 10] and len(load_pairs(shares).pairs) == 20
    with pytest.raises(UserError, match="fraction"):
        load_pairs([{**shares[0]}, {**shares[1], "fraction": None}])


@pytest.mark.parametrize("n_prompt", [1, 5, 9, 40])
@pytest.mark.parametrize("n_chosen", [1, 3, 30])
@pytest.mark.parametrize("n_rejected", [2, 25])
@pytest.mark.parametrize("bos", [None, 0])
def test_truncation_keeps_both_answers(n_prompt, n_chosen, n_rejected, bos):
    prompt, chosen, rejected = (
        list(range(n_prompt)),
        list(range(100, 100 + n_chosen)),
        list(range(200, 200 + n_rejected)),
    )
    p, c, r = truncate(prompt, (chosen, rejected), 20, 8, bos)
    if n_prompt + max(n_chosen, n_rejected) <= 20:
        assert (p, c, r) == (prompt, chosen, rejected)
        return
    assert len(p) + max(len(c), len(r)) <= 20 and c and r
    assert c == chosen[: len(c)] and r == rejected[: len(r)]
    assert p[-1] == prompt[-1] and len(p) == min(n_prompt, 8)
    assert p[0] == (0 if bos == 0 or n_prompt <= 8 else n_prompt - 8)


@pytest.mark.parametrize("which", ["smol_tokenizer", "gemma_like_tokenizer"])
def test_token_ids_equal_trl(which, request, tmp_path):
    """Same ids as TRL's own tokenization of the same rows."""
    from types import SimpleNamespace

    from datasets import Dataset
    from trl import DPOTrainer

    tokenizer = request.getfixturevalue(which)
    rows = make_pairs(6)
    data = load_pairs([{"name": str(write_jsonl(tmp_path / "x.jsonl", rows)), "split": "train"}])
    ids, counts = tokenize(data, tokenizer, None, None)
    trl_rows = [{"prompt": r["chosen"][:1], "chosen": r["chosen"][1:], "rejected": r["rejected"][1:]} for r in rows]
    args = SimpleNamespace(dataset_num_proc=None, max_length=None, truncation_mode="keep_start")
    trainer = SimpleNamespace(_tokenizer=tokenizer)
    expected = DPOTrainer._prepare_dataset(trainer, Dataset.from_list(trl_rows), tokenizer, args, "train")
    for key in ("prompt_ids", "chosen_ids", "rejected_ids"):
        assert ids[key] == expected[key], key
    assert counts["prompt_end_rendered_differently"] == 0


def test_plain_text_ids_equal_trl(smol_tokenizer, tmp_path):
    from types import SimpleNamespace

    from datasets import Dataset
    from trl import DPOTrainer

    rows = [{"prompt": "The sky is", "chosen": " blue today.", "rejected": " green."}]
    data = load_pairs([{"name": str(write_jsonl(tmp_path / "x.jsonl", rows)), "split": "train"}])
    ids, _ = tokenize(data, smol_tokenizer, None, None)
    args = SimpleNamespace(dataset_num_proc=None, max_length=None, truncation_mode="keep_start")
    expected = DPOTrainer._prepare_dataset(
        SimpleNamespace(_tokenizer=smol_tokenizer), Dataset.from_list(rows), smol_tokenizer, args, "train"
    )
    for key in ("prompt_ids", "chosen_ids", "rejected_ids"):
        assert ids[key] == expected[key], key
    assert ids["chosen_ids"][0][-1] == smol_tokenizer.eos_token_id


def test_template_rejections_are_counted(gemma_like_tokenizer, tmp_path):
    twice = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    rows = [*make_pairs(2), {"chosen": [*twice, GOOD], "rejected": [*twice, BAD]}]
    data = load_pairs([{"name": str(write_jsonl(tmp_path / "x.jsonl", rows)), "split": "train"}])
    ids, _ = tokenize(data, gemma_like_tokenizer, None, None)
    assert len(ids) == len(data.pairs) == 2 and data.dropped == {"template_refused": 1}
    data = load_pairs([{"name": str(write_jsonl(tmp_path / "y.jsonl", rows[2:])), "split": "train"}])
    with pytest.raises(UserError, match="0 train pairs.*line 1.*alternate"):
        tokenize(data, gemma_like_tokenizer, None, None, desc="train")


def test_truncated_prompt_keeps_bos_and_end(gemma_like_tokenizer, tmp_path):
    long = [{"role": "user", "content": "word " * 200}]
    rows = [{"chosen": [*long, GOOD], "rejected": [*long, {"role": "assistant", "content": "no " * 100}]}]
    data = load_pairs([{"name": str(write_jsonl(tmp_path / "x.jsonl", rows)), "split": "train"}])
    ids, counts = tokenize(data, gemma_like_tokenizer, 64, 32)
    row, end = ids[0], gemma_like_tokenizer.encode("<start_of_turn>model\n", add_special_tokens=False)
    assert (
        row["prompt_ids"][0] == gemma_like_tokenizer.bos_token_id and row["prompt_ids"].count(row["prompt_ids"][0]) == 1
    )
    assert len(row["prompt_ids"]) == 32 and row["prompt_ids"][-len(end) :] == end
    assert len(row["rejected_ids"]) == 32 and 0 < len(row["chosen_ids"]) < 32
    assert (counts["truncated_prompt"], counts["truncated_chosen"], counts["truncated_rejected"]) == (1, 0, 1)


@pytest.mark.parametrize("max_prompt_length", range(1, 40))
def test_cut_prompt_keeps_one_bos_where_bos_opens_each_turn(smol_tokenizer, max_prompt_length):
    """SmolLM2's BOS is <|im_start|>: wherever the cut falls, also right before a turn, one BOS comes first."""
    bos, turns = smol_tokenizer.bos_token_id, [{"role": "user", "content": "one two three"}, GOOD] * 3
    prompt = smol_tokenizer.apply_chat_template([*turns, USER], add_generation_prompt=True)["input_ids"]
    cut, *_ = truncate(prompt, ([5] * 60, [6] * 60), 60, max_prompt_length, bos)
    assert cut[-1] == prompt[-1] and len(cut) in (max_prompt_length - 1, max_prompt_length)
    leading = next((i for i, token in enumerate(cut) if token != bos), len(cut))
    assert leading == (1 if max_prompt_length > 1 else 0), cut


@pytest.mark.parametrize("which", ["smol_tokenizer", "gemma_like_tokenizer"])
def test_text_prompts_start_with_at_most_one_bos(which, request, tmp_path):
    tokenizer = request.getfixturevalue(which)
    row = {"prompt": tokenizer.bos_token * 2 + "The sky is", "chosen": " blue.", "rejected": " green."}
    data = load_pairs([{"name": str(write_jsonl(tmp_path / "x.jsonl", [row])), "split": "train"}])
    ids, _ = tokenize(data, tokenizer, None, None)
    assert ids["prompt_ids"][0] == tokenizer("The sky is")["input_ids"]
