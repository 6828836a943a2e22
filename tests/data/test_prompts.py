"""Prompt sets in every form that the field ships, and given answers matched to them."""

import json

import pytest
from conftest import make_pairs, write_jsonl

from preflab.data.prompts import Prompt, load_answers, load_prompts
from preflab.judging.answers import given_answers
from utils.errors import UserError


def user(text) -> dict:
    return {"role": "user", "content": text}


def assistant(text) -> dict:
    return {"role": "assistant", "content": text}


def loaded(folder, *rows, **kwargs):
    source = {"name": str(write_jsonl(folder / "rows.jsonl", list(rows))), "split": "test"}
    return load_prompts([source], **kwargs)


FORMS = {
    "prompt": ({"prompt": "Why?"}, [user("Why?")]),
    "instruction": ({"instruction": "Why?", "input": ""}, [user("Why?")]),
    "instruction and input": ({"instruction": "Sum up.", "input": "A tale."}, [user("Sum up.\n\nA tale.")]),
    "question": ({"question": "Why?", "answer": "So."}, [user("Why?")]),
    "messages": ({"messages": [user("Hi"), assistant("Yes?"), user("Why?")]},
                 [user("Hi"), assistant("Yes?"), user("Why?")]),
    "messages with their answer": ({"messages": [user("Why?"), assistant("So.")]}, [user("Why?")]),
    "prompt as messages": ({"prompt": [{"role": "system", "content": "Be brief."}, user("Why?")]},
                           [{"role": "system", "content": "Be brief."}, user("Why?")]),
    "turns as text": ({"turns": ["Why?", "And then?"]}, [user("Why?")]),
    "turns of Arena-Hard": ({"turns": [{"content": "Why?"}]}, [user("Why?")]),
    "preference, text": ({"prompt": "Why?", "chosen": "So.", "rejected": "No."}, [user("Why?")]),
    "preference, messages": (make_pairs(1)[0], [user("Tell me about river number 0.")]),
    "preference, transcript": ({"chosen": "\n\nHuman: Why?\n\nAssistant: So.",
                                "rejected": "\n\nHuman: Why?\n\nAssistant: No."}, [user("Why?")]),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_row(tmp_path, form):
    row, wanted = FORMS[form]
    (prompt,), summary = loaded(tmp_path, row)
    assert prompt.messages == wanted
    assert prompt.source.endswith("rows.jsonl line 1") and summary["prompts"] == 1 and summary["left_out"] == {}


def test_prompts_that_occur_twice_are_taken_once_and_counted(tmp_path):
    rows = [{"prompt": "a"}, {"instruction": "a"}, {"prompt": "b"}, {"turns": ["a", "z"]}, {"prompt": " "}]
    prompts, summary = loaded(tmp_path, *rows)
    assert [p.text for p in prompts] == ["a", "b"]
    assert summary["left_out"] == {"duplicate_prompt": 2, "empty_prompt": 1}


def test_what_has_no_user_turn_is_left_out(tmp_path):
    prompts, summary = loaded(tmp_path, {"messages": [assistant("Hello")]}, {"prompt": "a"})
    assert [p.text for p in prompts] == ["a"] and summary["left_out"] == {"empty_prompt": 1}


def test_pairs_that_the_filters_drop_are_counted_by_reason(tmp_path):
    lost = {"chosen": [user("a"), user("b")], "rejected": [user("a"), assistant("c")]}
    prompts, summary = loaded(tmp_path, lost, *make_pairs(2))
    assert len(prompts) == 2 and summary["left_out"] == {"last_turn_not_assistant": 1}


def test_categories_and_ids(tmp_path):
    rows = [
        {"prompt": "a", "category": "math", "cluster": 3, "uid": "u1"},
        {"prompt": "b", "cluster": 4, "question_id": 81},
        {"prompt": "c"},
    ]
    assert [(p.uid, p.category) for p in loaded(tmp_path, *rows)[0]] == [("u1", "math"), ("81", None), (None, None)]
    assert [p.category for p in loaded(tmp_path, *rows, category_key="cluster")[0]] == ["3", "4", None]


def test_several_sources_are_read_one_after_the_other(tmp_path):
    files = {"one": ["a", "b"], "two": ["b", "c"]}
    names = [str(write_jsonl(tmp_path / f"{n}.jsonl", [{"prompt": t} for t in ts])) for n, ts in files.items()]
    prompts, summary = load_prompts([{"name": name, "split": "test"} for name in names])
    assert [p.text for p in prompts] == ["a", "b", "c"] and summary["left_out"] == {"duplicate_prompt": 1}
    assert [s["name"] for s in summary["sources"]] == names


def test_a_limit_counts_prompts_not_rows(tmp_path):
    rows = [{"prompt": text} for text in ("a", "a", "b", "c")]
    assert [p.text for p in loaded(tmp_path, *rows, limit=2)[0]] == ["a", "b"]


def test_how_a_judge_reads_a_conversation():
    assert Prompt([user("Why?")], "").text == "Why?"
    messages = [{"role": "system", "content": "Be brief."}, user("Hi"), assistant("Yes?"), user("Why?")]
    assert Prompt(messages, "").text == "System: Be brief.\n\nUser: Hi\n\nAssistant: Yes?\n\nUser: Why?"
    assert Prompt([user("a")], "x").key == Prompt([user("a")], "y", "u").key != Prompt([user("b")], "x").key


BAD_ROWS = {
    "no object": ("Why?", "object"),
    "no prompt": ({"text": "Why?"}, "text"),
    "turn without content": ({"messages": [{"role": "user"}]}, "turn"),
    "unknown role": ({"messages": [{"role": "critic", "content": "x"}]}, "turn"),
    "content no text": ({"turns": [{"content": ["x"]}]}, "turn"),
    "list of numbers": ({"prompt": [1, 2]}, "turn"),
    "chosen of another kind": ({"prompt": "a", "chosen": "x", "rejected": [assistant("y")]}, "rejected"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_is_named(tmp_path, case):
    row, words = BAD_ROWS[case]
    with pytest.raises(UserError) as error:
        loaded(tmp_path, {"prompt": "fine"}, row)
    assert "rows.jsonl line 2" in str(error.value) and words in str(error.value)


def test_no_prompt_left_is_an_error(tmp_path):
    with pytest.raises(UserError, match="empty_prompt"):
        loaded(tmp_path, {"prompt": "  "}, {"prompt": "\n"})


@pytest.mark.parametrize("row", [{"prompt": 5}, {"prompt": True}, {"messages": user("Why?")}], ids=str)
def test_a_prompt_of_the_wrong_type_is_named(tmp_path, row):
    with pytest.raises(UserError, match="line 2"):
        loaded(tmp_path, {"prompt": "fine"}, row)


def test_a_prompt_that_is_no_unicode_is_named(tmp_path):
    with pytest.raises(UserError, match="line 1"):
        loaded(tmp_path, {"prompt": "\ud800"})


@pytest.mark.parametrize(
    "row", [{"prompt": ""}, {"messages": []}, {"turns": []}, {"instruction": "", "input": ""}], ids=str
)
def test_an_empty_prompt_is_left_out_like_a_blank_one(tmp_path, row):
    assert loaded(tmp_path, {"prompt": "a"}, row)[1]["left_out"] == {"empty_prompt": 1}


def test_the_id_zero_is_an_id(tmp_path):
    assert loaded(tmp_path, {"prompt": "a", "uid": 0})[0][0].uid == "0"


# ------------------------------------------------------------------------------------------------------ given answers

PROMPTS = [Prompt([user("Why?")], "1", "u1"), Prompt([user("How?\n\nA tale.")], "2", "u2"), Prompt([user("Who?")], "3")]


def answered(folder, rows, prompts=PROMPTS, name="given.jsonl"):
    path = folder / name
    if name.endswith(".json"):
        path.write_text(json.dumps(rows))
    else:
        write_jsonl(path, rows)
    return load_answers(str(path), prompts)


def test_answers_in_alpaca_evals_list(tmp_path):
    rows = [
        {"dataset": "x", "instruction": "Who?", "output": "Me.", "generator": "gpt4"},
        {"instruction": "How?", "input": "A tale.", "output": "Well.", "generator": "gpt4"},
        {"instruction": "Elsewhere?", "output": "No.", "generator": "gpt4"},
    ]
    model, found, source = answered(tmp_path, rows, name="outputs.json")
    assert (model, found) == ("gpt4", [None, "Well.", "Me."]) and source["rows"] == 3


def test_answers_in_arena_hards_rows_are_matched_by_uid(tmp_path):
    def line(uid, asked, answer):
        return {"uid": uid, "model": "gpt-4-0314", "messages": [user(asked), assistant({"answer": answer})]}

    # The texts are crossed: the uid decides. The third has another uid than any prompt, and the text of one without.
    rows = [line("u2", "Why?", "of u2"), line("u1", "How?\n\nA tale.", "of u1"), line("u9", "Who?", "by text")]
    model, found, _ = answered(tmp_path, rows)
    assert (model, found) == ("gpt-4-0314", ["of u1", "of u2", "by text"])


@pytest.mark.parametrize(
    "row",
    [
        {"question_id": "u1", "model_id": "m", "choices": [{"index": 0, "turns": [{"content": "So."}]}]},
        {"question_id": "u1", "model_id": "m", "choices": [{"index": 0, "turns": ["So."]}]},
        {"prompt": "Why?", "response": "So.", "model": "m"},
        {"question": "Why?", "answer": "So.", "generator": "m"},
        {"messages": [user("Why?"), assistant("So.")], "model": "m"},
        {"uid": "u1", "output": "So.", "model": "m"},
    ],
    ids=["old Arena-Hard", "MT-Bench", "prompt", "question", "messages", "uid alone"],
)
def test_answers_in_other_rows(tmp_path, row):
    assert answered(tmp_path, [row])[:2] == ("m", ["So.", None, None])


def test_an_empty_answer_is_an_answer_and_a_nameless_model_the_opponent(tmp_path):
    assert answered(tmp_path, [{"prompt": "Why?", "output": ""}])[:2] == ("opponent", ["", None, None])


def test_answers_to_other_prompts_are_refused(tmp_path):
    with pytest.raises(UserError, match="given.jsonl.*3 prompts"):
        answered(tmp_path, [{"prompt": "Where?", "output": "There."}, {"uid": "u7", "output": "x"}])


@pytest.mark.parametrize(
    "row", ["x", {"prompt": "Why?"}, {"output": 5, "uid": "u1"}, {"messages": [user("Why?")]}], ids=str
)
def test_a_row_without_an_answer_is_named(tmp_path, row):
    with pytest.raises(UserError, match="given.jsonl line 2"):
        answered(tmp_path, [{"uid": "u1", "output": "x"}, row])


@pytest.mark.parametrize(
    "row",
    [
        {"uid": "u1", "output": "So.", "input": ""},
        {"uid": "u1", "messages": [assistant("So.")]},
        {
            "uid": "u1",
            "messages": [user("Why?"), assistant({"answer": "?"}), user("Why?"), assistant({"answer": "So."})],
        },
    ],
    ids=["input", "answer alone", "two turns of Arena-Hard"],
)
def test_a_row_matched_by_uid_needs_no_prompt(tmp_path, row):
    assert answered(tmp_path, [row])[1] == ["So.", None, None]


@pytest.mark.parametrize("row", [{"choices": [{}]}, {"choices": ["x"]}, {"messages": ["x"]}], ids=str)
def test_a_malformed_answer_is_named(tmp_path, row):
    with pytest.raises(UserError, match="line 1"):
        answered(tmp_path, [{"uid": "u1", **row}])


def test_given_answers_are_counted_in_tokens(smol_tokenizer):
    found = given_answers(["one two", None, ""], smol_tokenizer)
    assert found == [
        {"text": "one two", "tokens": 2, "finish_reason": None}, None, {"text": "", "tokens": 0, "finish_reason": None}
    ]  # fmt: skip
