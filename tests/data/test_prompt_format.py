"""Text prompts: which become user turns of the chat template, which stay text, and what the run says about it."""

import json
from collections import Counter

import pytest
from conftest import assert_one_line, save_tiny, train_args, write_jsonl
from helpers import sft_args, stock_sft_rows

from preflab.data.conversations import load_conversations
from preflab.data.conversations import tokenize as tokenize_conversations
from preflab.data.preferences import load_pairs, tokenize
from preflab.data.prompt_format import LEFT_AS_TEXT, WRAPPED, PromptFormat, sentence
from preflab.evaluation.comparison import _run_arguments

PLAIN = [{"prompt": f"Name river {i}.", "chosen": f"River {i}.", "rejected": f"Stone {i}."} for i in range(8)]


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        (PLAIN[0], WRAPPED),
        ({"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}, "continuation"),
        ({"prompt": "The sky is", "chosen": "The sky is blue.", "rejected": "The sky is green."}, "continuation"),
        ({"chosen": "The sky is blue.", "rejected": "The sky is green."}, "no_prompt_column"),
        ({"prompt": "<|im_start|>user\nHi<|im_end|>\n", "chosen": "Hello", "rejected": "No"}, "special_tokens"),
        ({"prompt": "<start_of_turn>user\nHi<end_of_turn>", "chosen": "Hello", "rejected": "No"}, "special_tokens"),
        ({"prompt": "[INST] Hi [/INST]", "chosen": "Hello", "rejected": "No"}, "special_tokens"),
        ({"prompt": "Human: Hi\nAssistant:", "chosen": "Hello", "rejected": "No"}, "dialogue"),
        ({"prompt": "### Instruction:\nHi\n### Response:", "chosen": "Hello", "rejected": "No"}, "dialogue"),
        ({"prompt": "A human: why?", "chosen": "Because.", "rejected": "No"}, WRAPPED),
    ],
)
def test_auto_wraps_plain_prompts_only(row, kind, smol_tokenizer, tmp_path):
    sources = [{"name": str(write_jsonl(tmp_path / "x.jsonl", [row])), "split": "train"}]
    data = load_pairs(sources, prompt_format=PromptFormat.of("auto", smol_tokenizer))
    assert data.summary()["prompts"] == {kind: 1}
    assert (data.pairs[0].messages is not None) == (kind == WRAPPED)


def test_wrapped_rows_have_the_tokens_of_conversations(smol_tokenizer, tmp_path):
    turns = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            **{side: [{"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")},
        }
        for row in PLAIN
    ]
    ids = []
    for name, rows in (("text", PLAIN), ("turns", turns)):
        sources = [{"name": str(write_jsonl(tmp_path / f"{name}.jsonl", rows)), "split": "train"}]
        data = load_pairs(sources, prompt_format=PromptFormat.of("auto", smol_tokenizer))
        ids.append(tokenize(data, smol_tokenizer, None, None)[0].to_dict())
    assert ids[0] == ids[1]


def test_auto_is_text_without_a_template():
    class Tokenizer:
        chat_template = None

    assert PromptFormat.of("auto", Tokenizer()).kind("Hi", ("a", "b"), "") == "no_template"


def test_every_reason_is_said():
    kinds = Counter({**dict.fromkeys(LEFT_AS_TEXT, 2), WRAPPED: 3, "turns": 4})
    text = sentence(kinds)
    assert all(f"2 left as text: {reason}" in text for reason in LEFT_AS_TEXT.values())
    assert "3 of 19 text wrapped as user turns" in text and "4 conversations" in text


def test_preflight_says_what_was_done_and_the_run_stores_it(train, tiny, tmp_path):
    data = write_jsonl(tmp_path / "mine.jsonl", PLAIN)
    args = train_args(tiny, data, tmp_path, "--dataset_test_split", "none", "--preflight_only")
    code, out, err = train(*args)
    assert code == 0, err
    assert "text wrapped as user turns of the model's chat template (off: --prompt_format text)" in out
    assert "every sequence starts with the BOS token <|im_start|>" in out
    assert _run_arguments(tmp_path / "ck" / "r")["prompt_format"] == "auto"
    code, out, err = train(*args, "--prompt_format", "text")
    assert code == 0 and "plain text, no chat template: --prompt_format text" in out, err
    assert _run_arguments(tmp_path / "ck" / "r")["prompt_format"] == "text"


def test_evaluations_of_older_runs_keep_their_text(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"args": {"prompt_format": "auto"}}))
    assert _run_arguments(tmp_path)["prompt_format"] == "text"


# ----------------------------------------------------------------------------------------------------------------- SFT

CONTINUATIONS = [{"prompt": f"The sky {i} is", "completion": f" blue {i}."} for i in range(8)]


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"prompt": "Name a river.", "completion": "Tay."}, WRAPPED),
        ({"question": "Name a river.", "answer": "Tay."}, WRAPPED),
        ({"prompt": "Name a river.", "chosen": "Tay.", "rejected": "No."}, WRAPPED),
        ({"prompt": "Name a river.", "response_0": "No.", "response_1": "Tay.", "better_response_id": 1}, WRAPPED),
        ({"system": "Be brief.", "prompt": "The sky is", "completion": " blue."}, WRAPPED),
        ({"instruction": "### Instruction: none", "output": " blue."}, WRAPPED),
        ({"prompt": [{"role": "user", "content": "The sky is"}], "completion": " blue."}, "turns"),
        ({"chosen": "\n\nHuman: Hi\n\nAssistant: Hello", "rejected": "\n\nHuman: Hi\n\nAssistant: No"}, "turns"),
        (CONTINUATIONS[0], "continuation"),
        ({"prompt": "The sky is", "chosen": "The sky is blue.", "rejected": "The sky is green."}, "continuation"),
        ({"chosen": "The sky is blue.", "rejected": "The sky is green."}, "no_prompt_column"),
        ({"prompt": "<|im_start|>user\nHi<|im_end|>\n", "completion": "Hello"}, "special_tokens"),
        ({"prompt": "Human: Hi\nAssistant:", "completion": "Hello"}, "dialogue"),
    ],
)  # fmt: skip
def test_sft_decides_as_training_on_pairs(row, kind, smol_tokenizer, tmp_path):
    sources = [{"name": str(write_jsonl(tmp_path / "x.jsonl", [row])), "split": "train"}]
    data = load_conversations(sources, prompt_format=PromptFormat.of("auto", smol_tokenizer))
    assert data.summary()["prompts"] == {kind: 1} and not data.dropped and not data.unused
    (conversation,) = data.conversations
    assert conversation.is_text == (kind in LEFT_AS_TEXT)
    if "rejected" in row:
        (pair,) = load_pairs(sources, prompt_format=PromptFormat.of("auto", smol_tokenizer)).pairs
        prompt = pair.messages or [{"role": "user", "content": pair.text}]
        assert pair.prompt_kind == kind
        assert conversation.turns == [*prompt, {"role": "assistant", "content": pair.chosen}]


def test_text_rows_of_sft_have_the_tokens_of_trl(smol_tokenizer, tmp_path):
    """Prompt without loss, completion with the end of the text, as stock SFTTrainer has them; BOS where it is added."""
    sources = [{"name": str(write_jsonl(tmp_path / "x.jsonl", CONTINUATIONS)), "split": "train"}]
    data = load_conversations(sources, prompt_format=PromptFormat.of("auto", smol_tokenizer))
    own, counts = tokenize_conversations(data, smol_tokenizer, "responses", None)
    expected = stock_sft_rows(CONTINUATIONS, smol_tokenizer, completion_only_loss=True)
    assert own["input_ids"][:] == expected["input_ids"][:] and own["labels"][:] == expected["labels"][:]
    assert counts["answers"] == counts["answers_trained"] == 8


def test_sft_preflight_says_what_was_done(call, tiny, smol_tokenizer, tmp_path):
    data = write_jsonl(tmp_path / "mine.jsonl", [*CONTINUATIONS, {"prompt": "Name a river.", "completion": "Tay."}])
    flags = ("--test_rows", 0, "--preflight_only")
    code, out, err = call("sft_train_instruction", *sft_args(tiny, data, tmp_path / "a", *flags))
    assert code == 0, err
    out = " ".join(out.split())
    assert "1 of 9 text wrapped as user turns of the model's chat template (off: --prompt_format text)" in out
    assert f"8 left as text: {LEFT_AS_TEXT['continuation']}" in out
    assert _run_arguments(tmp_path / "a/ck/r")["prompt_format"] == "auto"
    # A base model without a chat template trains on the same rows as text.
    from transformers import AutoTokenizer

    bare = AutoTokenizer.from_pretrained(tiny)
    bare.chat_template = None
    base = save_tiny(tmp_path / "base", bare)
    flags = ("--test_rows", 2, "--max_steps", 1)
    code, out, err = call("sft_train_instruction", *sft_args(base, data, tmp_path / "b", *flags))
    assert code == 0, err
    assert "plain text, no chat template: the model has no chat template" in " ".join(out.split())
    with_system = write_jsonl(tmp_path / "s.jsonl", [{"system": "Be brief.", **row} for row in CONTINUATIONS])
    args = sft_args(tiny, with_system, tmp_path / "c", "--test_rows", 0, "--preflight_only", "--prompt_format", "text")
    code, _, err = call("sft_train_instruction", *args)
    assert code == 2
    assert_one_line(err, "s.jsonl line 1", "system text", "--prompt_format chat")
