"""Rows as people have them: every layout gives the right pair or conversation, and nothing is dropped silently."""

import json
from collections import Counter

import pytest
from conftest import ROOT, assert_one_line, train_args, write_jsonl

from preflab.data.conversation_rows import to_conversation
from preflab.data.pair_rows import to_pair
from preflab.data.preferences import load_pairs
from preflab.data.prompt_format import AS_CHAT
from preflab.data.prompts import load_prompts
from preflab.data.schemas import LISTS, PAIRS, SCORED, docs_table
from utils.errors import UserError

SYSTEM = {"role": "system", "content": "Answer in rhyme."}
ASK, GOOD, BAD = (
    {"role": role, "content": text}
    for role, text in (("user", "Why is grass green?"), ("assistant", "Chlorophyll."), ("assistant", "Paint."))
)
EARLIER = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
TEXTS = {"chosen": "Chlorophyll.", "rejected": "Paint."}


def share(message) -> dict:
    """The message as ShareGPT writes it."""
    return {"from": {"user": "human", "assistant": "gpt"}.get(message["role"], message["role"]),
            "value": message["content"]}  # fmt: skip


def parts(message) -> dict:
    return {"role": message["role"], "content": [{"type": "text", "text": message["content"]}]}


ONE_TURN = {
    "question": {"question": ASK["content"], **TEXTS},
    "instruction": {"instruction": ASK["content"], "input": "", **TEXTS},
    "query": {"query": ASK["content"], **TEXTS},
    "input": {"input": ASK["content"], **TEXTS},
    "empty system and no history": {"system": "", "history": None, "question": ASK["content"], **TEXTS},
    "conversations beside texts": {"conversations": [share(ASK)], **TEXTS},
    "messages beside texts": {"messages": [ASK], **TEXTS},
    "messages with the chosen answer": {"messages": [ASK, GOOD], **TEXTS},
    "context as turns": {"context": [ASK], **TEXTS},
    "single answers": {"conversations": [share(ASK)], "chosen": share(GOOD), "rejected": share(BAD)},
    "single answers of a model": {"question": ASK["content"], "chosen": {"from": "model", "value": "Chlorophyll."},
                                  "rejected": {"from": "model", "value": "Paint."}},
    "conversations with the answer": {"conversations": [share(ASK), {"from": "chatgpt", "value": "Chlorophyll."}],
                                      **TEXTS},
    "ShareGPT dialogues": {"chosen": [share(ASK), share(GOOD)], "rejected": [share(ASK), share(BAD)]},
    "parts": {"prompt": [parts(ASK)], "chosen": [parts(GOOD)], "rejected": [parts(BAD)]},
    "JSON text": {"prompt": json.dumps([ASK]), "chosen": json.dumps([GOOD]), "rejected": json.dumps([BAD])},
    "JSON text of dialogues": {"chosen": json.dumps([ASK, GOOD]), "rejected": json.dumps([ASK, BAD])},
    "argilla": {"instruction": ASK["content"], "chosen_response": GOOD["content"], "rejected_response": BAD["content"]},
    "HelpSteer 3": {"context": [ASK], "response1": "Paint.", "response2": "Chlorophyll.", "overall_preference": 2},
    "HelpSteer 3, first": {"context": [ASK], "response1": "Chlorophyll.", "response2": "Paint.",
                           "overall_preference": -1},
    "HelpSteer 2": {"prompt": ASK["content"], "response_1": "Chlorophyll.", "response_2": "Paint.",
                    "preference_strength": -2},
    "PKU": {"prompt": ASK["content"], "response_0": "Paint.", "response_1": "Chlorophyll.", "better_response_id": 1},
    "SHP": {"history": ASK["content"], "human_ref_A": "Chlorophyll.", "human_ref_B": "Paint.", "labels": 1},
    "WebGPT": {"question": {"full_text": ASK["content"]}, "answer_0": "Paint.", "answer_1": "Chlorophyll.",
               "score_0": -0.5, "score_1": 0.5},
    "summaries": {"info": {"post": ASK["content"]}, "summaries": [{"text": "Paint."}, {"text": "Chlorophyll."}],
                  "choice": 1},
    "OpenAI": {"input": {"messages": [ASK]}, "preferred_output": [GOOD], "non_preferred_output": [BAD]},
    "Arena": {"conversation_a": [ASK, BAD], "conversation_b": [ASK, GOOD], "winner": "model_b"},
    "Arena 55k": {"prompt": json.dumps([ASK["content"]]), "response_a": '["Paint."]', "response_b": '["Chlorophyll."]',
                  "winner_model_a": 0, "winner_model_b": 1, "winner_tie": 0},
    "Arena 55k, CSV": {"prompt": json.dumps([ASK["content"]]), "response_a": '["Chlorophyll."]',
                       "response_b": '["Paint."]', "winner_model_a": "1", "winner_model_b": "0", "winner_tie": "0"},
    "AlpacaFarm": {"instruction": ASK["content"], "input": "", "output_1": "Paint.", "output_2": "Chlorophyll.",
                   "preference": 2},
}  # fmt: skip


@pytest.mark.parametrize("name", ONE_TURN)
def test_one_turn(name):
    unused = Counter()
    pair = to_pair(ONE_TURN[name], "row 0", AS_CHAT, unused)
    assert (pair.messages, pair.chosen, pair.rejected) == ([ASK], "Chlorophyll.", "Paint.") and not unused
    assert to_conversation(ONE_TURN[name], "row 0").turns == [ASK, GOOD]


@pytest.mark.parametrize("name", ONE_TURN)
def test_prompt_sets_read_the_same_prompt(name, tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", [ONE_TURN[name]])
    assert load_prompts([{"name": str(path), "split": "x"}])[0][0].messages == [ASK]


@pytest.mark.parametrize(
    ("row", "turns"),
    [
        ({"system": SYSTEM["content"], "question": ASK["content"], **TEXTS}, [SYSTEM, ASK]),
        ({"system_prompt": SYSTEM["content"], "prompt": [ASK], **TEXTS}, [SYSTEM, ASK]),
        ({"system": "", "system_prompt": SYSTEM["content"], "prompt": [ASK], **TEXTS}, [SYSTEM, ASK]),
        ({"system": SYSTEM["content"], "chosen": [ASK, GOOD], "rejected": [ASK, BAD]}, [SYSTEM, ASK]),
        ({"system": SYSTEM["content"], "chosen": [SYSTEM, ASK, GOOD], "rejected": [SYSTEM, ASK, BAD]}, [SYSTEM, ASK]),
        ({"history": [["Hi", "Hello"]], "instruction": ASK["content"], **TEXTS}, [*EARLIER, ASK]),
        ({"history": '[["Hi", "Hello"]]', "instruction": ASK["content"], **TEXTS}, [*EARLIER, ASK]),
        ({"prompt": [{"role": None, "content": None, "from": "human", "value": ASK["content"]}], **TEXTS}, [ASK]),
        ({"history": EARLIER, "system": SYSTEM["content"], "prompt": ASK["content"], **TEXTS},
         [SYSTEM, *EARLIER, ASK]),
        ({"prompt": "\n\nHuman: Why is grass green?\n\nAssistant:", "system": SYSTEM["content"], **TEXTS},
         [SYSTEM, ASK]),
    ],
)  # fmt: skip
def test_system_and_history_become_turns(row, turns, tmp_path):
    assert to_pair(row, "row 0", AS_CHAT).messages == turns
    assert to_conversation(row, "row 0").turns == [*turns, GOOD]
    path = write_jsonl(tmp_path / "x.jsonl", [row])
    assert load_prompts([{"name": str(path), "split": "x"}])[0][0].messages == turns


def test_alpaca_with_system_and_history():
    row = {
        "instruction": "Add.",
        "input": "2 and 2",
        "output": "4",
        "system": "Be brief.",
        "history": [["Hi", "Hello"]],
    }
    turns = to_conversation(row, "row 0").turns
    assert [m["content"] for m in turns] == ["Be brief.", "Hi", "Hello", "Add.\n\n2 and 2", "4"]


def test_rows_that_differ_in_their_system_text_are_different_prompts(tmp_path):
    rows = [{"system": f"Style {i}.", "prompt": "Why?", "chosen": [GOOD], "rejected": [BAD]} for i in range(4)]
    data = load_pairs([{"name": str(write_jsonl(tmp_path / "x.jsonl", rows)), "split": "x"}])
    assert len(data.pairs) == 4 and not data.dropped


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"task": "Why?", **TEXTS}, ("'chosen' and 'rejected' are texts", "task", "--columns prompt=task")),
        ({"system": "Be brief.", **TEXTS}, ("system text", "--columns prompt=NAME")),
        ({"prompt": "a", "chosen": None, "rejected": "b"}, ("'chosen' is null", "--on_bad_row skip")),
        ({"a": "x", "b": "y"}, ("keys: a, b", "--columns prompt=A chosen=B rejected=C")),
        ({"prompt": "a", "answers": [{"answer": "x", "rank": 1}]}, ("Nectar", "--answers given")),
        ({"instruction": "a", "completions": [{"response": "x", "overall_score": 1}]}, ("UltraFeedback", "--answers")),
        ({"prompt": "a", "completion": "b", "label": True}, ("KTO", "--answers given")),
        ({"prompt": "a", "response": "b", "helpfulness": 3}, ("HelpSteer", "--answers given")),
        ({"system": "A", "chosen": [SYSTEM, ASK, GOOD], "rejected": [SYSTEM, ASK, BAD]}, ("system turn differ",)),
        ({"prompt": [{"role": "user", "content": [{"type": "image", "image": "x"}]}], **TEXTS}, ("'image'", "text")),
        ({"prompt": "a", "images": ["x.png"], **TEXTS}, ("'images'", "text")),
        ({"prompt": "a", "tools": "[{", "chosen": [GOOD], "rejected": [BAD]}, ("'tools'", "JSON")),
        ({"prompt": "a", "chat_template_kwargs": ["x"], **TEXTS}, ("'chat_template_kwargs'", "object", "list")),
        ({"prompt": "a", "chat_template_kwargs": {"chat_template": "x"}, **TEXTS}, ("must not set 'chat_template'",)),
        ({"prompt": "a", "chat_template_kwargs": '{"messages": []}', **TEXTS}, ("must not set 'messages'",)),
        ({"prompt": "a", "score_chosen": 10**400, **TEXTS}, ("'score_chosen'", "number")),
        ({"history": "[[", "prompt": "a", **TEXTS}, ("'history'", "JSON")),
        ({"history": "Hi", "prompt": "a", **TEXTS}, ("'history'", "[question, answer]")),
        ({**ONE_TURN["HelpSteer 3"], "overall_preference": ""}, ("'overall_preference'", "--on_bad_row skip")),
        ({**ONE_TURN["HelpSteer 3"], "overall_preference": float("nan")}, ("'overall_preference'", "no number")),
        ({**ONE_TURN["WebGPT"], "score_1": "n/a"}, ("'score_1'", "number", "n/a")),
        ({**ONE_TURN["WebGPT"], "score_1": ""}, ("'score_1'", "no number")),
        ({**ONE_TURN["summaries"], "summaries": ["a", "b"]}, ("'summaries'", "'text'")),
        ({**ONE_TURN["summaries"], "summaries": [{"text": "a"}]}, ("'summaries'", "two")),
        ({**ONE_TURN["PKU"], "prompt": 5}, ("'prompt'", "int")),
        ({**ONE_TURN["Arena 55k"], "response_a": "Paint."}, ("'response_a'", "JSON")),
        ({**ONE_TURN["Arena 55k"], "response_a": "[" * 100_000}, ("'response_a'", "JSON", "deeply")),
        ({**ONE_TURN["Arena 55k"], "response_a": "[1]"}, ("'response_a'", "list", "text of each turn")),
        ({**ONE_TURN["Arena 55k"], "response_a": '["a", "b"]'}, ("'prompt' has 1", "'response_a' 2")),
    ],
)
def test_what_cannot_be_read_is_refused(row, words):
    with pytest.raises(UserError) as error:
        to_pair(row, "row 7")
    assert all(word in str(error.value) for word in ("row 7", *words)), error.value


def test_prompt_that_is_a_number_is_refused_for_conversations():
    for row in (ONE_TURN["PKU"], ONE_TURN["question"]):
        with pytest.raises(UserError, match="row 7: key 'prompt'.*int"):
            to_conversation({**row, "prompt": 5}, "row 7")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"context": [ASK], "response1": "a", "response2": "b", "overall_preference": 0}, "no_preference"),
        ({"conversation_a": [ASK, BAD], "conversation_b": [ASK, GOOD], "winner": "tie"}, "no_preference"),
        ({"chosen": [ASK, GOOD, ASK], "rejected": [ASK, BAD, ASK]}, "ends_with_user_turn"),
        ({**ONE_TURN["Arena 55k"], "winner_model_b": 0, "winner_tie": 1}, "no_preference"),
        ({**ONE_TURN["Arena 55k"], "response_a": "[null]"}, "empty_response"),
    ],
)
def test_rows_without_a_pair_have_a_reason(row, reason):
    assert to_pair(row, "row 0") == reason


def test_arena_rows_of_several_turns_are_pairs_where_the_earlier_answers_are_equal(tmp_path):
    """Both models answer their own dialogue: only with equal earlier turns do two last answers share a prompt."""
    order = {"winner_model_a": 1, "winner_model_b": 0, "winner_tie": 0}

    def row(earlier_a, earlier_b, **extra):
        texts = {"prompt": ["Hi", ASK["content"]], "response_a": [earlier_a, "Chlorophyll."],
                 "response_b": [earlier_b, "Paint."]}  # fmt: skip
        return {"id": 1, **{key: json.dumps(value) for key, value in texts.items()}, **order, **extra}

    rows = [row("Hello", "Hello"), row("Hello", "Hey"), row("Hi", "Hey"), ONE_TURN["Arena 55k"],
            row("Hello", "Hello", winner_model_a=0, winner_tie=1)]  # fmt: skip
    data = load_pairs([{"name": str(write_jsonl(tmp_path / "x.jsonl", rows)), "split": "x"}])
    assert [pair.messages for pair in data.pairs] == [[*EARLIER, ASK], [ASK]]
    assert {(pair.chosen, pair.rejected) for pair in data.pairs} == {("Chlorophyll.", "Paint.")}
    assert data.dropped == {"diverges_before_last_turn": 2, "no_preference": 1}
    # SFT trains on the winner's dialogue, whatever the other one was.
    assert to_conversation(rows[1], "row 1").turns == [*EARLIER, ASK, GOOD]


def test_metadata_is_no_prompt_and_unused_columns_are_named(tmp_path):
    rows = [{"chosen": f"The sky {i} is blue.", "rejected": f"The sky {i} is green.", "source": "x", "row_id": "a",
             "n": 3, "empty": ""} for i in range(3)]  # fmt: skip
    data = load_pairs([{"name": str(write_jsonl(tmp_path / "x.jsonl", rows)), "split": "x"}])
    assert len(data.pairs) == 3 and data.summary()["unused"] == {"source": 3, "row_id": 3, "n": 3}
    unused = Counter()
    to_pair({"prompt": [{**ASK, "id": 1, "weight": 0.5}], "chosen": [GOOD], "rejected": [BAD]}, "row 0", unused=unused)
    assert unused == {"messages: id": 1}


@pytest.mark.parametrize("names", [("chosen-rating", "rejected-rating"), ("rating_chosen", "rating_rejected"),
                                   ("score_chosen", "score_rejected")])  # fmt: skip
def test_scores_under_other_names(names):
    pair = to_pair({"prompt": "a", **TEXTS, names[0]: "4.5", names[1]: 2}, "row 0")
    assert (pair.score_chosen, pair.score_rejected) == (4.5, 2.0)


def test_scores_that_are_nan_are_missing(tmp_path):
    row = {"prompt": "Why?", **TEXTS, "score_chosen": float("nan"), "score_rejected": 1}
    assert to_pair(row, "row 0").score_chosen is None
    path = write_jsonl(tmp_path / "x.jsonl", [row])
    with pytest.raises(UserError, match="line 1: .*need 'score_chosen'"):
        load_pairs([{"name": str(path), "split": "x"}], min_score_margin=1)


def test_kto_rows_with_a_false_label_are_not_trained_on():
    row = {"prompt": "Why?", "completion": "So."}
    assert to_conversation({**row, "label": False}, "x") == "labelled_false"
    assert to_conversation({**row, "label": "false"}, "x") == "labelled_false"
    assert to_conversation({**row, "label": True}, "x").turns[-1]["content"] == "So."


def test_docs_have_the_table_of_schemas():
    assert docs_table() in (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    assert len({schema.name for schema in (*PAIRS, *LISTS, *SCORED)}) == len(PAIRS) + len(LISTS) + len(SCORED)


# ------------------------------------------------------------------------------------------- --columns, --on_bad_row


def test_columns_are_mapped(tmp_path):
    rows = [{"task": "Why?", "prompt": "internal 7", "output_a": "So.", "output_b": "No."}]
    columns = ["prompt=task", "chosen=output_a", "rejected=output_b"]
    source = {"name": str(write_jsonl(tmp_path / "x.jsonl", rows)), "split": "x", "columns": columns}
    data = load_pairs([source])
    assert (data.pairs[0].text, data.pairs[0].chosen, data.pairs[0].rejected) == ("Why?", "So.", "No.")
    assert data.unused == {"prompt (replaced)": 1} and data.sources[0]["columns"] == columns
    text = [{"note": "x", "chosen": "The sky is blue.", "rejected": "The sky is green."}]
    source = {"name": str(write_jsonl(tmp_path / "y.jsonl", text)), "split": "x", "columns": ["prompt=none"]}
    assert load_pairs([source]).pairs[0].text == "The sky is"


@pytest.mark.parametrize(
    ("columns", "words"),
    [(["prompt"], ("--columns prompt", "NAME=COLUMN")), (["choosen=a"], ("'choosen'", "chosen")),
     (["prompt=nothing"], ("nothing", "columns: chosen, rejected, task"))],
)  # fmt: skip
def test_wrong_columns_are_refused(columns, words, tmp_path):
    name = str(write_jsonl(tmp_path / "x.jsonl", [{"task": "Why?", **TEXTS}]))
    with pytest.raises(UserError) as error:
        load_pairs([{"name": name, "split": "x", "columns": columns}])
    assert all(word in str(error.value) for word in words), error.value


def test_bad_rows_are_refused_or_counted(train, tiny, tmp_path):
    lines = [json.dumps({"prompt": f"Why {i}?", "chosen": "So.", "rejected": "No."}) for i in range(6)]
    lines[1:3] = ['{"prompt": "Why?", "chosen": null, "rejected": "No."}', "{oops"]
    data = tmp_path / "x.jsonl"
    data.write_text("\n".join(lines) + "\n")
    args = train_args(tiny, data, tmp_path, "--dataset_test_split", "none", "--preflight_only")
    code, _, err = train(*args)
    assert code == 2
    assert_one_line(err, "x.jsonl line 3", "JSON")
    code, out, err = train(*args, "--on_bad_row", "skip")
    assert code == 0 and "bad_row 2" in out and "2 skipped; the first:" in out and "line 2" in out, err + out
