"""Prompt sets in all supported formats, and given answers matched to them."""

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


FORMATS = {
    "prompt": ({"prompt": "Why?"}, [user("Why?")]),
    "instruction": ({"instruction": "Why?", "input": ""}, [user("Why?")]),
    "instruction and input": ({"instruction": "Sum up.", "input": "A tale."}, [user("Sum up.\n\nA tale.")]),
    "question": ({"question": "Why?", "answer": "So."}, [user("Why?")]),
    "messages": ({"messages": [user("Hi"), assistant("Yes?"), user("Why?")]},
                 [user("Hi"), assistant("Yes?"), user("Why?")]),
    "messages with their answer": ({"messages": [user("Why?"), assistant("So.")]}, [user("Why?")]),
    "history as messages": ({"history": [user("Hi"), assistant("Yes?"), user("Why?")]},
                            [user("Hi"), assistant("Yes?"), user("Why?")]),
    "prompt as messages": ({"prompt": [{"role": "system", "content": "Be brief."}, user("Why?")]},
                           [{"role": "system", "content": "Be brief."}, user("Why?")]),
    "turns as text": ({"turns": ["Why?", "And then?"]}, [user("Why?")]),
    "turns of Arena-Hard": ({"turns": [{"content": "Why?"}]}, [user("Why?")]),
    "preference, text": ({"prompt": "Why?", "chosen": "So.", "rejected": "No."}, [user("Why?")]),
    "preference, messages": (make_pairs(1)[0], [user("Tell me about river number 0.")]),
    "preference, transcript": ({"chosen": "\n\nHuman: Why?\n\nAssistant: So.",
                                "rejected": "\n\nHuman: Why?\n\nAssistant: No."}, [user("Why?")]),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_prompt_formats(tmp_path, name):
    row, expected = FORMATS[name]
    (prompt,), summary = loaded(tmp_path, row)
    assert prompt.messages == expected
    assert prompt.source.endswith("rows.jsonl line 1") and summary["prompts"] == 1 and summary["left_out"] == {}


def test_duplicate_prompts_are_counted(tmp_path):
    rows = [{"prompt": "a"}, {"instruction": "a"}, {"prompt": "b"}, {"turns": ["a", "z"]}, {"prompt": " "}]
    prompts, summary = loaded(tmp_path, *rows)
    assert [p.text for p in prompts] == ["a", "b"]
    assert summary["left_out"] == {"duplicate_prompt": 2, "empty_prompt": 1}


def test_spellings_of_a_prompt_are_duplicates(tmp_path):
    """Battles and human evaluations take prompts as independent: other case or spacing adds no evidence."""
    texts = [f"{start} about {k}{end}" for k in range(12) for start, end in (("Write", "."), (" write ", ". "))]
    rows = [{"prompt": text} for text in texts] + [
        {"messages": [user("WRITE\nabout 0.")]},
        {"prompt": "Write about 0?"},
    ]
    prompts, summary = loaded(tmp_path, *rows)
    assert [p.text for p in prompts] == [*texts[::2], "Write about 0?"]
    assert summary["left_out"] == {"duplicate_prompt": 13}
    # Given answers belong to the prompt with their exact text, so both spellings may have one.
    answers = [{"prompt": text, "output": f"{k}"} for k, text in enumerate(texts)]
    _, given, _ = load_answers(str(write_jsonl(tmp_path / "answers.jsonl", answers)), prompts)
    assert given == [*map(str, range(0, 24, 2)), None]


def test_row_without_user_turn_is_left_out(tmp_path):
    prompts, summary = loaded(tmp_path, {"messages": [assistant("Hello")]}, {"prompt": "a"})
    assert [p.text for p in prompts] == ["a"] and summary["left_out"] == {"empty_prompt": 1}


def test_dropped_pairs_are_counted_by_reason(tmp_path):
    unusable = {"chosen": [user("a"), user("b")], "rejected": [user("a"), assistant("c")]}
    prompts, summary = loaded(tmp_path, unusable, *make_pairs(2))
    assert len(prompts) == 2 and summary["left_out"] == {"last_turn_not_assistant": 1}


def test_categories_and_ids(tmp_path):
    rows = [
        {"prompt": "a", "category": "math", "cluster": 3, "uid": "u1"},
        {"prompt": "b", "cluster": 4, "question_id": 81},
        {"prompt": "c"},
    ]
    assert [(p.uid, p.category) for p in loaded(tmp_path, *rows)[0]] == [("u1", "math"), ("81", None), (None, None)]
    assert [p.category for p in loaded(tmp_path, *rows, category_key="cluster")[0]] == ["3", "4", None]


def test_several_sources_in_order(tmp_path):
    files = {"one": ["a", "b"], "two": ["b", "c"]}
    names = [str(write_jsonl(tmp_path / f"{n}.jsonl", [{"prompt": t} for t in ts])) for n, ts in files.items()]
    prompts, summary = load_prompts([{"name": name, "split": "test"} for name in names])
    assert [p.text for p in prompts] == ["a", "b", "c"] and summary["left_out"] == {"duplicate_prompt": 1}
    assert [s["name"] for s in summary["sources"]] == names


def test_limit_counts_prompts_not_rows(tmp_path):
    rows = [{"prompt": text} for text in ("a", "a", "b", "c")]
    assert [p.text for p in loaded(tmp_path, *rows, limit=2)[0]] == ["a", "b"]


def test_prompt_text_and_key():
    assert Prompt([user("Why?")], "").text == "Why?"
    messages = [{"role": "system", "content": "Be brief."}, user("Hi"), assistant("Yes?"), user("Why?")]
    assert Prompt(messages, "").text == "System: Be brief.\n\nUser: Hi\n\nAssistant: Yes?\n\nUser: Why?"
    assert Prompt([user("a")], "x").key == Prompt([user("a")], "y", "u").key != Prompt([user("b")], "x").key


BAD_ROWS = {
    "not an object": ("Why?", "str"),
    "no prompt": ({"text": "Why?"}, "keys: text"),
    "turn without content": ({"messages": [{"role": "user"}]}, "'messages', message 0: content"),
    "unknown role": (
        {"messages": [{"role": "critic", "content": "x"}]},
        "'messages', message 0: unknown role 'critic'",
    ),
    "content not text": ({"turns": [{"content": ["x"]}]}, "'turns', message 0: content"),
    "list of numbers": ({"prompt": [1, 2]}, "'prompt', message 0: content"),
    "chosen of another type": ({"prompt": "a", "chosen": "x", "rejected": [assistant("y")]}, "'rejected'"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_row_is_named(tmp_path, case):
    row, words = BAD_ROWS[case]
    with pytest.raises(UserError) as error:
        loaded(tmp_path, {"prompt": "fine"}, row)
    assert "rows.jsonl line 2" in str(error.value) and words in str(error.value)


def test_no_prompt_left_is_an_error(tmp_path):
    with pytest.raises(UserError, match="rows.jsonl.*empty_prompt"):
        loaded(tmp_path, {"prompt": "  "}, {"prompt": "\n"})


@pytest.mark.parametrize("row", [{"prompt": 5}, {"prompt": True}, {"messages": user("Why?")}], ids=str)
def test_prompt_of_wrong_type_is_named(tmp_path, row):
    with pytest.raises(UserError, match="line 2"):
        loaded(tmp_path, {"prompt": "fine"}, row)


def test_prompt_with_invalid_unicode_is_named(tmp_path):
    with pytest.raises(UserError, match="line 1"):
        loaded(tmp_path, {"prompt": "\ud800"})


@pytest.mark.parametrize(
    "row",
    [{"prompt": ""}, {"messages": []}, {"turns": []}, {"instruction": "", "input": ""}, {"system": "x", "prompt": []}],
    ids=str,
)
def test_empty_prompt_is_left_out(tmp_path, row):
    assert loaded(tmp_path, {"prompt": "a"}, row)[1]["left_out"] == {"empty_prompt": 1}


def test_uid_zero(tmp_path):
    assert loaded(tmp_path, {"prompt": "a", "uid": 0})[0][0].uid == "0"


# ------------------------------------------------------------------------------------------------------ given answers

PROMPTS = [Prompt([user("Why?")], "1", "u1"), Prompt([user("How?\n\nA tale.")], "2", "u2"), Prompt([user("Who?")], "3")]


def answered(folder, rows, prompts=PROMPTS, name="given.jsonl", **kwargs):
    path = folder / name
    if name.endswith(".json"):
        path.write_text(json.dumps(rows))
    else:
        write_jsonl(path, rows)
    return load_answers(str(path), prompts, **kwargs)


def test_answers_of_alpaca_eval(tmp_path):
    rows = [
        {"dataset": "x", "instruction": "Who?", "output": "Me.", "generator": "gpt4"},
        {"instruction": "How?", "input": "A tale.", "output": "Well.", "generator": "gpt4"},
        {"instruction": "Elsewhere?", "output": "No.", "generator": "gpt4"},
    ]
    model, answers, about = answered(tmp_path, rows, name="outputs.json")
    assert (model, answers) == ("gpt4", [None, "Well.", "Me."]) and about["rows"] == 3


def test_answers_of_arena_hard_match_by_uid(tmp_path):
    def line(uid, prompt, answer):
        return {"uid": uid, "model": "gpt-4-0314", "messages": [user(prompt), assistant({"answer": answer})]}

    # The first two texts are swapped, so only the uid can match them. The third uid is unknown: its text matches.
    rows = [line("u2", "Why?", "of u2"), line("u1", "How?\n\nA tale.", "of u1"), line("u9", "Who?", "by text")]
    model, answers, _ = answered(tmp_path, rows)
    assert (model, answers) == ("gpt-4-0314", ["of u1", "of u2", "by text"])


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
def test_answers_in_other_formats(tmp_path, row):
    assert answered(tmp_path, [row])[:2] == ("m", ["So.", None, None])


@pytest.mark.parametrize(
    "question",
    [
        {"system": "Be brief.", "prompt": "Why?"},
        {"history": [["Hi", "Yes?"]], "instruction": "Why?"},
        {"query": "Why?"},
        {"instruction": "Sum up.", "context": "A tale."},
        {"prompt": [user("Why?")]},
        {"messages": [user("Why?")]},
        {"conversations": [{"from": "human", "value": "Why?"}]},
    ],
    ids=str,
)
def test_a_prompt_set_with_answers_added_matches_itself(tmp_path, question):
    prompts, _ = loaded(tmp_path, question)
    assert answered(tmp_path, [{**question, "output": "So."}], prompts)[1] == ["So."]


@pytest.mark.parametrize(
    "row",
    [{"task": "Why?", "reply": "So."}, {"prompt": "Why?", "reply": "So."}, {"uid": "u1", "reply": "So."},
     {"task": "Why?", "prompt": "No. 7", "reply": "So.", "output": "raw"}],
    ids=str,
)  # fmt: skip
def test_columns_of_answers(tmp_path, row):
    columns = ["prompt=task", "output=reply"]
    assert answered(tmp_path, [row], columns=columns)[1] == ["So.", None, None]


def test_columns_of_answers_that_are_missing(tmp_path):
    with pytest.raises(UserError, match="given.jsonl: --columns output=replies: no such column .*reply"):
        answered(tmp_path, [{"task": "Why?", "reply": "So."}], columns=["output=replies"])


def test_empty_answer_and_unnamed_model(tmp_path):
    assert answered(tmp_path, [{"prompt": "Why?", "output": ""}])[:2] == ("opponent", ["", None, None])


def test_answers_to_other_prompts(tmp_path):
    with pytest.raises(UserError, match="given.jsonl.* 3 prompts"):
        answered(tmp_path, [{"prompt": "Where?", "output": "There."}, {"uid": "u7", "output": "x"}])


@pytest.mark.parametrize(
    "row", ["x", {"prompt": "Why?"}, {"output": 5, "uid": "u1"}, {"messages": [user("Why?")]}], ids=str
)
def test_row_without_answer_is_named(tmp_path, row):
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
def test_row_with_uid_needs_no_prompt(tmp_path, row):
    assert answered(tmp_path, [row])[1] == ["So.", None, None]


@pytest.mark.parametrize("row", [{"choices": [{}]}, {"choices": ["x"]}, {"messages": ["x"]}], ids=str)
def test_malformed_answer_is_named(tmp_path, row):
    with pytest.raises(UserError, match="line 1"):
        answered(tmp_path, [{"uid": "u1", **row}])


@pytest.mark.parametrize("keys", [{"uid": "u1"}, {"prompt": "Why?"}], ids=str)
def test_second_answer_to_a_prompt_is_refused(tmp_path, keys):
    rows = [{**keys, "output": "first"}, {"prompt": "Who?", "output": "x"}, {**keys, "output": "second"}]
    with pytest.raises(UserError, match="given.jsonl line 3: .*given.jsonl line 1"):
        answered(tmp_path, rows)
    # Prompts of another set may repeat.
    other = [{"prompt": "Where?", "output": "x"}] * 2
    assert answered(tmp_path, [*other, rows[0]])[1] == ["first", None, None]


def test_lone_surrogate_in_an_answer_is_named(tmp_path):
    with pytest.raises(UserError, match="given.json row 0: .*Unicode"):
        answered(tmp_path, [{"prompt": "Why?", "output": "cut \ud83d"}], name="given.json")


def test_given_answers_have_token_counts(smol_tokenizer):
    answers = given_answers(["one two", None, ""], smol_tokenizer)
    assert answers == [
        {"text": "one two", "tokens": 2, "finish_reason": None}, None, {"text": "", "tokens": 0, "finish_reason": None}
    ]  # fmt: skip
