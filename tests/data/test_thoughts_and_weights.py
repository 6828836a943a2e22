"""Thoughts that a template removes, answers that the data exclude, and what the preflight says about both."""

import json
from pathlib import Path

import pytest
import trl
from conftest import assert_one_line, save_tiny, small_tokenizer, train_args, write_jsonl

from preflab.data.chat_template import ChatRenderer
from preflab.data.conversations import load_conversations
from preflab.data.conversations import tokenize as tokenize_conversations
from preflab.data.preferences import load_pairs, tokenize
from preflab.data.prompts import load_prompts
from preflab.data.reading_report import template_lines
from preflab.models.generation import as_plain_text
from utils.errors import UserError

ASK = {"role": "user", "content": "Name a river."}


def answer(text, **keys) -> dict:
    return {"role": "assistant", "content": text, **keys}


def thinking(thought) -> dict:
    return answer(f"<think>\n{thought}\n</think>\n\nThe Loire.")


@pytest.fixture(scope="module")
def r1():
    """The small tokenizer under DeepSeek R1's template, which removes all thoughts."""
    tokenizer = small_tokenizer()
    template = Path(trl.__file__).parent / "chat_templates" / "deepseek_r1_distill.jinja"
    tokenizer.chat_template = template.read_text(encoding="utf-8")
    return tokenizer


def read(folder, rows, load, **kwargs):
    return load([{"name": str(write_jsonl(folder / "x.jsonl", rows)), "split": "x"}], **kwargs)


def test_pairs_that_differ_in_their_thoughts_only_are_named_so(r1, tmp_path):
    rows = [
        {"prompt": [ASK], "chosen": [thinking("I recall it.")], "rejected": [thinking("No idea.")]},
        {"prompt": [{**ASK, "content": "And?"}], "chosen": [thinking("Hm.")], "rejected": [answer("The Rhine.")]},
    ]
    data = read(tmp_path, rows, load_pairs)
    _, counts = tokenize(data, r1, None, None)
    assert data.dropped == {"identical_without_thoughts": 1} and len(data.pairs) == 1
    assert counts["chosen_without_thoughts"] == 2 and counts["rejected_without_thoughts"] == 1


def test_template_that_renders_thoughts_loses_none(smol_tokenizer, tmp_path):
    rows = [{"prompt": [ASK], "chosen": [thinking("I recall it.")], "rejected": [thinking("No idea.")]}]
    data = read(tmp_path, rows, load_pairs)
    _, counts = tokenize(data, smol_tokenizer, None, None)
    assert not data.dropped and "chosen_without_thoughts" not in counts
    # SmolLM2's template does not read this key.
    rows = [{"prompt": [ASK], "chosen": [answer("Loire", reasoning_content="Hm.")], "rejected": [answer("Rhine")]}]
    _, counts = tokenize(read(tmp_path, rows, load_pairs), smol_tokenizer, None, None)
    assert counts["chosen_without_thoughts"] == 1


def test_parts_that_a_template_leaves_out_are_counted(smol_tokenizer, tmp_path):
    call = [{"type": "function", "function": {"name": "rivers", "arguments": {}}}]
    tools = [{"type": "function", "function": {"name": "rivers", "parameters": {"type": "object", "properties": {}}}}]
    pair = {"prompt": [ASK], "chosen": [answer("Loire", tool_calls=call)], "rejected": [answer("Rhine")],
            "tools": tools, "chat_template_kwargs": {"enable_thinking": False}}  # fmt: skip
    _, counts = tokenize(read(tmp_path, [pair], load_pairs), smol_tokenizer, None, None)
    row = {"messages": [ASK, answer("Loire", tool_calls=call)], "tools": tools}
    _, of_sft = tokenize_conversations(read(tmp_path, [row], load_conversations), smol_tokenizer, "responses", None)
    # SmolLM2's template reads neither.
    (line,) = template_lines(counts)
    assert line.endswith("tool calls of 1 chosen answers, chat template kwargs of 1 prompts, tools of 1 prompts")
    assert template_lines(of_sft) == [
        "  removed   by the chat template: tool calls of 1 answers, tools of 1 conversations"
    ]


def test_texts_that_are_already_rendered_are_counted(smol_tokenizer, tmp_path):
    rendered = "<|im_start|>user\nName a river.<|im_end|>\n<|im_start|>assistant\n"
    rows = [{"prompt": rendered, "completion": "Loire<|im_end|>"}, {"prompt": "a < b [c]?", "completion": "<p>No</p>"}]
    _, counts = tokenize_conversations(read(tmp_path, rows, load_conversations), smol_tokenizer, "responses", None)
    assert counts["rows_with_markers"] == 1 and "is it already rendered?" in template_lines(counts)[-1]
    rows = [{"prompt": [ASK], "chosen": [answer("Loire")], "rejected": [answer("</s> Rhine")]}]
    _, counts = tokenize(read(tmp_path, rows, load_pairs), smol_tokenizer, None, None)
    assert counts["rows_with_markers"] == 1


def test_answers_that_differ_beyond_the_cut_get_the_hint(smol_tokenizer, tmp_path):
    start = "word " * 100
    rows = [{"prompt": [ASK], "chosen": [answer(f"{start}a")], "rejected": [answer(f"{start}b")]}]
    with pytest.raises(UserError, match="identical_after_truncation.*--max_length 64.*raise it"):
        tokenize(read(tmp_path, rows, load_pairs), smol_tokenizer, 64, 32)


@pytest.mark.parametrize("loss_on", ["responses", "everything"])
def test_answers_of_weight_0_are_not_trained_on(loss_on, smol_tokenizer, tmp_path):
    turns = [ASK, answer("The Rhine.", weight=0), {"role": "user", "content": "Sure?"}, answer("No, Loire.", weight=1)]
    ids, counts = tokenize_conversations(
        read(tmp_path, [{"messages": turns}], load_conversations), smol_tokenizer, loss_on, None
    )
    trained = smol_tokenizer.decode([label for label in ids["labels"][0] if label != -100])
    assert "The Rhine." in smol_tokenizer.decode(ids["input_ids"][0])
    assert "The Rhine." not in trained and "No, Loire." in trained
    assert (counts["answers"], counts["answers_trained"], counts["answers_weight_0"]) == (2, 1, 1)


def test_evaluations_render_the_prompt_as_training_does(tmp_path):
    tokenizer = small_tokenizer()
    tokenizer.chat_template = (Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja").read_text(encoding="utf-8")
    tools = [{"type": "function", "function": {"name": "rivers", "parameters": {"type": "object", "properties": {}}}}]
    row = {"prompt": [ASK], "chosen": [answer("Loire")], "rejected": [answer("Rhine")], "tools": json.dumps(tools),
           "chat_template_kwargs": {"enable_thinking": False}}  # fmt: skip
    ids, _ = tokenize(read(tmp_path, [row], load_pairs), tokenizer, None, None)
    (prompt,), _ = load_prompts([{"name": str(tmp_path / "x.jsonl"), "split": "x"}])
    text = ChatRenderer(tokenizer).prompt_text(as_plain_text(prompt.messages, tokenizer))
    # In training the last token of the prompt may merge with the answer, as in stock TRL.
    rendered, trained = tokenizer(text, add_special_tokens=False)["input_ids"], ids["prompt_ids"][0]
    assert '"name": "rivers"' in text and rendered[: len(trained)] == trained and len(rendered) <= len(trained) + 1
    # Another tool makes another prompt, for caches and for duplicates.
    other = {**row, "tools": [{**tools[0], "type": "other"}]}
    write_jsonl(tmp_path / "x.jsonl", [row, other])
    assert len(load_prompts([{"name": str(tmp_path / "x.jsonl"), "split": "x"}])[0]) == 2


def test_preflights_say_it(call, r1, tmp_path):
    model = save_tiny(tmp_path / "model", r1)
    rows = [{"prompt": [{**ASK, "content": f"Name river {i}."}], "chosen": [thinking("Hm.")],
             "rejected": [answer(f"River {i}.")]} for i in range(4)]  # fmt: skip
    args = ("--dataset_test_split", "none", "--preflight_only")
    data = write_jsonl(tmp_path / "pairs.jsonl", rows)
    code, out, err = call("dpo_train_human_preference", *train_args(model, data, tmp_path / "dpo", *args))
    assert code == 0 and "removed   by the chat template: thoughts of 4 chosen answers" in out, err
    same = [{**row, "rejected": [thinking("No idea.")]} for row in rows]
    data = write_jsonl(tmp_path / "same.jsonl", same)
    code, _, err = call("dpo_train_human_preference", *train_args(model, data, tmp_path / "same", *args))
    assert code == 2
    assert_one_line(err, "identical_without_thoughts", "4")
    turns = [ASK, answer("Rhine.", weight=0), {"role": "user", "content": "Sure?"}, answer("Loire.")]
    data = write_jsonl(tmp_path / "sft.jsonl", [{"messages": turns, "note": i} for i in range(4)])
    code, out, err = call("sft_train_instruction", *train_args(model, data, tmp_path / "sft", *args))
    assert code == 0 and "answers   4 of 8 trained on" in out and "4 have weight 0" in out, err + out
    assert "TRL's training version" in out and "unused    columns (rows): note (4)" in out
