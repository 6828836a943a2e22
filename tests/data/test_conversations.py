"""SFT data: all formats give the same conversation, and only the answers' tokens are labelled."""

import pytest
from conftest import ROOT, write_jsonl

from preflab.data.chat_template import ChatRenderer
from preflab.data.conversation_rows import Conversation, to_conversation
from preflab.data.conversations import ConversationData, SFTArguments, hold_out, load_conversations, tokenize
from preflab.data.sources import without_overlap
from utils.errors import UserError

QUESTION, ANSWER = {"role": "user", "content": "Two plus two?"}, {"role": "assistant", "content": "Four."}


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [QUESTION, ANSWER]},
        {"conversations": [{"from": "human", "value": "Two plus two?"}, {"from": "gpt", "value": "Four."}]},
        {"instruction": "Two plus two?", "output": "Four."},
        {"instruction": "Two plus two?", "input": "", "output": "Four.", "text": "whatever"},
        {"prompt": "Two plus two?", "completion": "Four."},
        {"prompt": [QUESTION], "completion": [ANSWER]},
        {"prompt": "Two plus two?", "response": "Four."},
        {"prompt": "Two plus two?", "chosen": [QUESTION, ANSWER], "rejected": [QUESTION, ANSWER]},
        {"prompt": [QUESTION], "chosen": [QUESTION, ANSWER], "rejected": [QUESTION, ANSWER]},
        {"prompt": "Two plus two?", "chosen": "Four.", "rejected": "Five."},
        {"messages": [QUESTION, ANSWER, {"role": "user", "content": "And then?"}]},
    ],
)
def test_all_formats_give_the_same_conversation(row):
    assert to_conversation(row, "x").turns == [QUESTION, ANSWER]


def test_alpaca_input_is_joined_for_chat_templates(smol_tokenizer):
    conversation = to_conversation({"instruction": "Add.", "input": "2 and 2", "output": "4"}, "x")
    assert conversation.turns[0]["content"] == "Add.\n\n2 and 2" and conversation.input == "2 and 2"
    assert "Add.\n\n2 and 2<|im_end|>" in ChatRenderer(smol_tokenizer).answers(conversation.turns)[0]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"instruction": "", "output": "Four."}, "empty_prompt"),
        ({"messages": [QUESTION, {"role": "assistant", "content": " "}]}, "empty_response"),
        ({"messages": [QUESTION]}, "empty_prompt"),
    ],
)
def test_unusable_rows_are_counted(row, reason, tmp_path):
    assert to_conversation(row, "x") == reason
    data = load_conversations([{"name": str(write_jsonl(tmp_path / "x.jsonl", [row])), "split": "train"}])
    assert data.dropped == {reason: 1} and data.rows == 1


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"question": "a"}, ("row 7", "keys: question")),
        ({"instruction": "a", "output": 3}, ("row 7", "'output'", "int")),
        ({"messages": [{"role": "robot", "content": "a"}]}, ("row 7", "'messages', message 0", "'robot'")),
        ({"conversations": [{"from": ["gpt"], "value": "a"}]}, ("row 7", "'conversations', message 0", "['gpt']")),
        ({"prompt": "a", "completion": 3}, ("row 7", "'completion', message 0", "int")),
        ({"prompt": 3, "completion": "a"}, ("row 7", "'prompt', message 0", "int")),
        ({"messages": "a"}, ("row 7", "'messages'", "str")),
        ({"prompt": "a", "answers": [{"answer": "x", "rank": 1}]}, ("row 7", "Nectar", "pairs.py --answers given")),
        ({"instruction": "a", "completions": [{"response": "x"}]}, ("row 7", "UltraFeedback", "--answers given")),
        ([1], ("row 7", "list")),
        ({"messages": [QUESTION, {"role": "assistant", "content": "\ud800"}]}, ("row 7", "Unicode")),
    ],
)
def test_schema_error_names_row_and_key(row, words):
    with pytest.raises(UserError) as error:
        to_conversation(row, "row 7")
    assert all(word in str(error.value) for word in words), error.value


def conversations(count: int) -> ConversationData:
    rows = [Conversation([{"role": "user", "content": f"Ask {k}"}, ANSWER], f"row {k}") for k in range(count)]
    return ConversationData(conversations=rows, sources=[{"name": "x"}], rows=count)


def test_hold_out_depends_on_text_only():
    data, other = conversations(40), conversations(60)
    other.conversations.reverse()
    held = {c.prompt_key for c in hold_out(data, 10).conversations}
    assert len(held) == 10 and len(data.conversations) == 30
    assert not held & {c.prompt_key for c in data.conversations}
    again = hold_out(other, 60 - 1).conversations
    order = [c.prompt_key for c in sorted(again, key=lambda c: c.prompt_key)]
    assert held <= set(order), "additional rows do not change which smaller hashes are held out"
    twice = conversations(5)
    twice.conversations += conversations(5).conversations
    out = hold_out(twice, 3)
    assert len(out.conversations) == 4, "both rows of a prompt are held out together"
    assert hold_out(conversations(3), 0) is None
    with pytest.raises(UserError, match="--test_rows 3"):
        hold_out(conversations(3), 3)


def test_sources_of_the_test_split():
    named = SFTArguments(dataset_name="x", dataset_test_split="test")
    assert named.sources()[1] == [{"name": "x", "config": None, "revision": None, "split": "test"}]
    assert SFTArguments(dataset_name="x").sources()[1] == []
    assert SFTArguments(dataset_name="x", dataset_test_split="none").sources()[1] == []
    mix = SFTArguments(datasets=[{"path": "a", "test_split": "t"}, {"path": "b"}])
    assert [s["split"] for s in mix.sources()[1]] == ["t"]
    data = conversations(3)
    assert len(without_overlap(data.conversations, data.conversations[:1], "drop", data.dropped)) == 2


# --------------------------------------------------------------------------------------------------------- templates


def with_template(tokenizer, name: str):
    import copy

    changed = copy.deepcopy(tokenizer)
    changed.chat_template = (ROOT / "configs" / "templates" / f"{name}.jinja").read_text()
    return changed


@pytest.fixture(scope="module")
def llama3(smol_tokenizer):
    """SmolLM2's vocabulary with Llama 3's special tokens and configs/templates/llama3.jinja."""
    tokenizer = with_template(smol_tokenizer, "llama3")
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    tokenizer.add_special_tokens(
        {"bos_token": special[0], "eos_token": special[1], "extra_special_tokens": special[2:]}
    )
    return tokenizer


def labelled(tokenizer, row: dict, loss_on="responses", max_length=None):
    """(ids, labels, bytes) of one row."""
    data = ConversationData(conversations=[to_conversation(row, "x")], sources=[], rows=1)
    row = tokenize(data, tokenizer, loss_on, max_length)[0][0]
    return row["input_ids"], row["labels"], row["bytes"]


def test_llama3_template_token_by_token(llama3):
    """As in Meta's documentation: per turn a header, two newlines, the text, <|eot_id|>; <|begin_of_text|> once."""

    def ids(text):
        return llama3(text, add_special_tokens=False)["input_ids"]

    names = ("begin_of_text", "start_header_id", "end_header_id", "eot_id")
    begin, header, end_header, eot = (llama3.convert_tokens_to_ids(f"<|{name}|>") for name in names)

    def turn(role, text):
        # This vocabulary splits the newlines depending on the next character; Llama 3's has one token for both.
        return [header, *ids(role), end_header, *ids(f"\n\n{text}"), eot]

    system = {"role": "system", "content": "Be brief."}
    tokens, labels, _ = labelled(llama3, {"messages": [system, QUESTION, ANSWER]})
    expected = [begin, *turn("system", "Be brief."), *turn("user", "Two plus two?"), *turn("assistant", "Four.")]
    assert tokens == expected
    answer = [*ids("\n\nFour.")[len(ids("\n")) * 2 :], eot]
    assert llama3.decode(answer) == "Four.<|eot_id|>"
    assert labels == [-100] * (len(expected) - len(answer)) + answer
    prompt = ChatRenderer(llama3)
    assert prompt.prompt_text([system, QUESTION]) == llama3.decode(expected[: -len(answer)])
    assert prompt.end_ids() == {eot} and not prompt.folds_system


@pytest.mark.parametrize("context", ["", "The sum of 2 and 2."])
def test_alpaca_template_equals_stanford(smol_tokenizer, context):
    """tatsu-lab/stanford_alpaca, train.py: PROMPT_DICT, the output, the end-of-text token."""
    tokenizer = with_template(smol_tokenizer, "alpaca")
    if context:
        opening = (
            "Below is an instruction that describes a task, paired with an input that provides further context. "
            "Write a response that appropriately completes the request.\n\n"
            f"### Instruction:\nAdd.\n\n### Input:\n{context}\n\n### Response:\n"
        )
    else:
        opening = (
            "Below is an instruction that describes a task. "
            "Write a response that appropriately completes the request.\n\n"
            "### Instruction:\nAdd.\n\n### Response:\n"
        )
    ids, labels, _ = labelled(tokenizer, {"instruction": "Add.", "input": context, "output": "Four."})
    assert tokenizer.decode(ids) == tokenizer.bos_token + opening + "Four." + tokenizer.eos_token
    assert tokenizer.decode([i for i in labels if i != -100]) == "Four." + tokenizer.eos_token
    chat = ChatRenderer(tokenizer)
    assert chat.reads_input and chat.end_ids() == {tokenizer.eos_token_id}


def test_alpaca_template_rejects_second_turn(smol_tokenizer):
    data = ConversationData(
        conversations=[to_conversation({"messages": [QUESTION, ANSWER, QUESTION, ANSWER]}, "x")], sources=[], rows=1
    )
    with pytest.raises(UserError, match="x: Alpaca's template has one instruction"):
        tokenize(data, with_template(smol_tokenizer, "alpaca"), "responses", None)


# ------------------------------------------------------------------------------------------------------------- labels

LONGER = [
    QUESTION,
    ANSWER,
    {"role": "user", "content": "And three plus three?"},
    {"role": "assistant", "content": "Six 🐦!"},
]


def test_labels_cover_every_answer_and_its_end(smol_tokenizer, gemma_like_tokenizer):
    for tokenizer, end in ((smol_tokenizer, "<|im_end|>\n"), (gemma_like_tokenizer, "<end_of_turn>\n")):
        ids, labels, size = labelled(tokenizer, {"messages": LONGER})
        assert tokenizer.decode([i for i in labels if i != -100]) == f"Four.{end}Six 🐦!{end}"
        # Special tokens do not count as text, as in eval_perplexity.py.
        assert size == len("Four.\nSix 🐦!\n".encode())
        full_text = ChatRenderer(tokenizer).full_text(LONGER[:-1], "Six 🐦!")
        assert ids == tokenizer(full_text, add_special_tokens=False)["input_ids"]


def test_labels_equal_transformers_assistant_mask(smol_tokenizer):
    """The same template with transformers' {% generation %} marks around the assistant's text."""
    import copy

    marked = copy.deepcopy(smol_tokenizer)
    marked.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] + '<|im_end|>\n' }}{% endgeneration %}{% else %}"
        "{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    expected = marked.apply_chat_template(LONGER, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    ids, labels, _ = labelled(marked, {"messages": LONGER})
    assert ids == expected["input_ids"]
    assert [int(label != -100) for label in labels] == list(expected["assistant_masks"])


def test_answers_rendered_differently_are_unlabelled(smol_tokenizer):
    """Templates that drop earlier reasoning render the first answer differently once a turn follows it."""
    import copy

    reasoning = copy.deepcopy(smol_tokenizer)
    reasoning.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' and not loop.last %}..."
        "{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    _, labels, _ = labelled(reasoning, {"messages": LONGER})
    assert reasoning.decode([i for i in labels if i != -100]).startswith("Six 🐦!<|im_end|>")


def test_empty_offset_inside_answer_is_labelled(smol_tokenizer):
    """GPT-NeoX's and Pythia's tokenizers trim offsets: a lone space has an empty span."""
    import copy

    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from tokenizers.processors import ByteLevel as Trim

    trimming = copy.deepcopy(smol_tokenizer)
    trimming.backend_tokenizer.post_processor = Trim(trim_offsets=True)
    trimming.backend_tokenizer.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(False)])
    talk = {"messages": [QUESTION, {"role": "assistant", "content": "return 1"}]}
    text = ChatRenderer(trimming).full_text([QUESTION], "return 1")
    offsets = trimming(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    assert any(a == b for a, b in offsets), "no token has an empty span, so this tests nothing"
    _, labels, _ = labelled(trimming, talk)
    assert trimming.decode([i for i in labels if i != -100]) == "return 1<|im_end|>\n"


def test_loss_on_everything_and_truncation(smol_tokenizer):
    ids, labels, size = labelled(smol_tokenizer, {"messages": LONGER}, "everything")
    assert labels == ids and size == len(smol_tokenizer.decode(ids[1:], skip_special_tokens=True).encode())
    cut, cut_labels, _ = labelled(smol_tokenizer, {"messages": LONGER}, max_length=len(ids) - 3)
    assert cut == ids[:-3] and len(cut_labels) == len(cut)
    data = ConversationData(
        conversations=[to_conversation({"messages": [QUESTION, ANSWER]}, "x")] * 2, sources=[], rows=2
    )
    data.conversations[1] = to_conversation({"instruction": "?", "output": "A."}, "y")
    room = len(labelled(smol_tokenizer, {"instruction": "?", "output": "A."})[0])
    rows, counts = tokenize(data, smol_tokenizer, "responses", room - 1)
    assert len(rows) >= 1 and counts["truncated"] == 2


def test_nothing_left_names_max_length_only_where_it_cuts(smol_tokenizer):
    for answer, max_length in ((ANSWER, 8), ({**ANSWER, "weight": 0}, 1024)):
        with pytest.raises(UserError, match="nothing_left_to_train_on': 1") as error:
            labelled(smol_tokenizer, {"messages": [QUESTION, answer]}, max_length=max_length)
        assert ("--max_length 8: raise it" in str(error.value)) == (max_length == 8)
