"""Tools, tool calls, thoughts and template arguments: the token ids of stock DPOTrainer and SFTTrainer (TRL 1.16)."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import trl
from conftest import small_tokenizer, write_jsonl
from datasets import Dataset
from helpers import stock_sft_rows
from trl import DPOTrainer
from trl.chat_template_utils import get_training_chat_template

from preflab.data.conversations import load_conversations
from preflab.data.conversations import tokenize as tokenize_conversations
from preflab.data.preferences import load_pairs, tokenize
from utils.errors import UserError

TEMPLATES = ("qwen3", "qwen2_5", "llama3_1", "deepseek_r1_distill", "glm4moe")
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "The weather.", "parameters": {
    "type": "object", "properties": {"city": {"type": "string", "description": "A city."}}}}}]  # fmt: skip
CALL = [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}]


def message(role, content, **keys) -> dict:
    return {"role": role, "content": content, **keys}


ASK = [message("user", "Is it cold in Oslo?")]
LOOKED_UP = [*ASK, message("assistant", "", tool_calls=CALL), message("tool", "-5", name="weather")]
GOOD, BAD = message("assistant", "Yes, -5."), message("assistant", "No idea.")
PAIRS = {
    "tools": {"prompt": ASK, "chosen": [GOOD], "rejected": [BAD], "tools": TOOLS},
    "tools as JSON text": {"prompt": ASK, "chosen": [GOOD], "rejected": [BAD], "tools": json.dumps(TOOLS)},
    "a call in the answer": {"prompt": ASK, "chosen": [{**GOOD, "tool_calls": CALL}], "rejected": [BAD]},
    "a call in the prompt": {"prompt": LOOKED_UP, "chosen": [GOOD], "rejected": [BAD], "tools": TOOLS},
    "thoughts under a key": {"prompt": ASK, "chosen": [{**GOOD, "reasoning_content": "Norway."}],
                             "rejected": [{**BAD, "reasoning_content": "Hm."}]},
    "thoughts in the text": {"prompt": ASK, "chosen": [message("assistant", "<think>\nNorway.\n</think>\n\nYes.")],
                             "rejected": [message("assistant", "<think>\nHm.\n</think>\n\nNo.")]},
    "template arguments": {"prompt": ASK, "chosen": [GOOD], "rejected": [BAD],
                           "chat_template_kwargs": {"enable_thinking": False}},
}  # fmt: skip


@pytest.fixture(scope="module")
def under():
    """under(name): the small tokenizer with TRL's copy of a family's chat template."""
    tokenizer = small_tokenizer()

    def with_template(name):
        tokenizer.chat_template = (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text()
        return tokenizer

    return with_template


def read(folder, rows, load, **kwargs):
    return load([{"name": str(write_jsonl(folder / "x.jsonl", rows)), "split": "x"}], **kwargs)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("name", PAIRS)
def test_pairs_have_the_ids_of_stock_dpo(name, template, under, tmp_path):
    if (name, template) == ("a call in the prompt", "deepseek_r1_distill"):
        pytest.skip("this template refuses a tool call with an object as its arguments")
    tokenizer, row = under(template), PAIRS[name]
    stock = SimpleNamespace(_tokenizer=tokenizer)
    args = SimpleNamespace(dataset_num_proc=None, max_length=None, truncation_mode="keep_start")
    try:
        expected = DPOTrainer._prepare_dataset(stock, Dataset.from_list([row]), tokenizer, args, "train")
    except Exception as error:  # the template's own refusal, of any type
        with pytest.raises(UserError, match="template_refused"):
            tokenize(read(tmp_path, [row], load_pairs), tokenizer, None, None)
        pytest.skip(f"stock refuses too: {type(error).__name__}")
    if expected["chosen_ids"] == expected["rejected_ids"]:
        pytest.fail("the row shows nothing")
    ids, _ = tokenize(read(tmp_path, [row], load_pairs), tokenizer, None, None)
    for key in ("prompt_ids", "chosen_ids", "rejected_ids"):
        assert ids[key] == expected[key], tokenizer.decode(ids[key][0])


CONVERSATIONS = {
    "three turns": {"messages": [*ASK, GOOD, message("user", "Sure?"), message("assistant", "Quite."),
                                 message("user", "Why?"), message("assistant", "North.")]},
    "tools": {"messages": [*LOOKED_UP, GOOD], "tools": TOOLS},
    "thoughts": {"messages": [*ASK, message("assistant", "<think>\nNorway.\n</think>\n\nYes."),
                              message("user", "Sure?"), message("assistant", "<think>\nHm.\n</think>\n\nQuite.")]},
    "thoughts under a key": {"messages": [*ASK, {**GOOD, "reasoning_content": "Norway."}, message("user", "Sure?"),
                                          {**BAD, "reasoning_content": "Hm."}]},
    "template arguments": {"messages": [*ASK, GOOD], "chat_template_kwargs": {"enable_thinking": False}},
}  # fmt: skip


@pytest.mark.parametrize("template", ["qwen3", "qwen2_5", "deepseek_r1_distill"])
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_conversations_have_the_ids_of_stock_sft(name, template, under, tmp_path):
    tokenizer, row = under(template), CONVERSATIONS[name]
    if (name, template) == ("tools", "deepseek_r1_distill"):
        pytest.skip("this template refuses a tool call with an object as its arguments")
    training = get_training_chat_template(tokenizer)
    expected = stock_sft_rows([row], tokenizer, chat_template=training, assistant_only_loss=True)
    ids, counts = tokenize_conversations(read(tmp_path, [row], load_conversations), tokenizer, "responses", None)
    assert ids["input_ids"] == expected["input_ids"]
    assert counts["answers_trained"] == counts["answers"] and counts["training_template"] == 1
    # Stock's labels also cover the part of the generation prompt that some templates put inside their markers.
    pairs = list(zip(ids["labels"][0], expected["labels"][0], strict=True))
    assert all(ours in (-100, stock) for ours, stock in pairs)
    extra = tokenizer.decode([stock for ours, stock in pairs if ours == -100 and stock != -100])
    assert not set(extra) - set("\n<think></think><｜Assistant｜>"), extra
