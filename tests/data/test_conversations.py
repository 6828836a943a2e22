"""Instruction data: every format to the same conversation, and token ids whose labels are the answers and no more."""

import pytest
from conftest import ROOT, write_jsonl

from preflab.data.chat_template import ChatRenderer
from preflab.data.conversations import (
    Conversation,
    ConversationData,
    SFTArguments,
    hold_out,
    load_conversations,
    to_conversation,
    tokenize,
)
from preflab.data.sources import without_overlap
from utils.errors import UserError

ASKED, SAID = {"role": "user", "content": "Two plus two?"}, {"role": "assistant", "content": "Four."}


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [ASKED, SAID]},
        {"conversations": [{"from": "human", "value": "Two plus two?"}, {"from": "gpt", "value": "Four."}]},
        {"instruction": "Two plus two?", "output": "Four."},
        {"instruction": "Two plus two?", "input": "", "output": "Four.", "text": "whatever"},
        {"prompt": "Two plus two?", "completion": "Four."},
        {"prompt": [ASKED], "completion": [SAID]},
        {"prompt": "Two plus two?", "response": "Four."},
        {"prompt": "Two plus two?", "chosen": [ASKED, SAID], "rejected": [ASKED, SAID]},
        {"prompt": [ASKED], "chosen": [ASKED, SAID], "rejected": [ASKED, SAID]},
        {"prompt": "Two plus two?", "chosen": "Four.", "rejected": "Five."},
        {"messages": [ASKED, SAID, {"role": "user", "content": "And then?"}]},
    ],
)
def test_every_format_is_the_same_conversation(row):
    assert to_conversation(row, "x").turns == [ASKED, SAID]


def test_alpacas_input_stands_apart_for_its_template_and_joined_for_a_chat(smol_tokenizer):
    found = to_conversation({"instruction": "Add.", "input": "2 and 2", "output": "4"}, "x")
    assert found.turns[0]["content"] == "Add.\n\n2 and 2" and found.input == "2 and 2"
    assert "Add.\n\n2 and 2<|im_end|>" in ChatRenderer(smol_tokenizer).answers(found.turns)[0]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"instruction": "", "output": "Four."}, "empty_prompt"),
        ({"messages": [ASKED, {"role": "assistant", "content": " "}]}, "empty_response"),
        ({"messages": [ASKED]}, "empty_prompt"),
    ],
)
def test_what_nothing_can_be_learned_from_is_left_out_and_counted(row, reason, tmp_path):
    assert to_conversation(row, "x") == reason
    data = load_conversations([{"name": str(write_jsonl(tmp_path / "x.jsonl", [row])), "split": "train"}])
    assert data.dropped == {reason: 1} and data.rows == 1


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"question": "a"}, ("x", "question")),
        ({"instruction": "a", "output": 3}, ("output", "text")),
        ({"messages": [{"role": "robot", "content": "a"}]}, ("turn 0",)),
        ({"messages": "a"}, ("list",)),
        ([1], ("list",)),
        ({"messages": [ASKED, {"role": "assistant", "content": "\ud800"}]}, ("Unicode",)),
    ],
)
def test_what_is_no_instruction_is_named(row, words):
    with pytest.raises(UserError) as error:
        to_conversation(row, "x")
    assert all(word in str(error.value) for word in words), error.value


def conversations(count: int) -> ConversationData:
    found = [Conversation([{"role": "user", "content": f"Ask {k}"}, SAID], f"row {k}") for k in range(count)]
    return ConversationData(found, [{"name": "x"}], count)


def test_held_out_rows_depend_on_their_text_alone():
    data, other = conversations(40), conversations(60)
    other.conversations.reverse()
    held = {c.prompt_key for c in hold_out(data, 10).conversations}
    assert len(held) == 10 and len(data.conversations) == 30
    assert not held & {c.prompt_key for c in data.conversations}
    again = hold_out(other, 60 - 1).conversations
    order = [c.prompt_key for c in sorted(again, key=lambda c: c.prompt_key)]
    assert held <= set(order), "more rows push out none of those that were held out by a smaller hash"
    twice = conversations(5)
    twice.conversations += conversations(5).conversations
    out = hold_out(twice, 3)
    assert len(out.conversations) == 4, "both rows of a prompt go together"
    assert hold_out(conversations(3), 0) is None
    with pytest.raises(UserError, match="--test_rows 3"):
        hold_out(conversations(3), 3)


def test_a_named_test_split_a_mix_and_none():
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

    found = copy.deepcopy(tokenizer)
    found.chat_template = (ROOT / "configs" / "templates" / f"{name}.jinja").read_text()
    return found


@pytest.fixture(scope="module")
def llama3(smol_tokenizer):
    """SmolLM2's vocabulary with Llama 3's special tokens and this project's template for its base models."""
    tokenizer = with_template(smol_tokenizer, "llama3")
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    tokenizer.add_special_tokens(
        {"bos_token": special[0], "eos_token": special[1], "extra_special_tokens": special[2:]}
    )
    return tokenizer


def labelled(tokenizer, row: dict, loss_on="responses", max_length=None):
    """(ids, labels, bytes) of one row."""
    data = ConversationData([to_conversation(row, "x")], [], 1)
    found = tokenize(data, tokenizer, loss_on, max_length)[0][0]
    return found["input_ids"], found["labels"], found["bytes"]


def test_llama_3s_instruct_template_token_by_token(llama3):
    """As Meta documents it: header, two newlines, text, <|eot_id|>, for every turn; <|begin_of_text|> once."""

    def ids(text):
        return llama3(text, add_special_tokens=False)["input_ids"]

    names = ("begin_of_text", "start_header_id", "end_header_id", "eot_id")
    begin, header, end_header, eot = (llama3.convert_tokens_to_ids(f"<|{name}|>") for name in names)

    def turn(role, text):
        # This vocabulary cuts the newlines by what follows; Llama 3's own has one token for both.
        return [header, *ids(role), end_header, *ids(f"\n\n{text}"), eot]

    system = {"role": "system", "content": "Be brief."}
    found, labels, _ = labelled(llama3, {"messages": [system, ASKED, SAID]})
    wanted = [begin, *turn("system", "Be brief."), *turn("user", "Two plus two?"), *turn("assistant", "Four.")]
    assert found == wanted
    answer = [*ids("\n\nFour.")[len(ids("\n")) * 2 :], eot]
    assert llama3.decode(answer) == "Four.<|eot_id|>"
    assert labels == [-100] * (len(wanted) - len(answer)) + answer
    prompt = ChatRenderer(llama3)
    assert prompt.prompt_text([system, ASKED]) == llama3.decode(wanted[: -len(answer)])
    assert prompt.end_ids() == {eot} and not prompt.folds_system


@pytest.mark.parametrize("context", ["", "The sum of 2 and 2."])
def test_alpacas_template_is_stanfords_text(smol_tokenizer, context):
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


def test_alpacas_template_takes_one_instruction_and_says_so(smol_tokenizer):
    data = ConversationData([to_conversation({"messages": [ASKED, SAID, ASKED, SAID]}, "x")], [], 1)
    with pytest.raises(UserError, match="template.*\\bx\\b"):
        tokenize(data, with_template(smol_tokenizer, "alpaca"), "responses", None)


# ------------------------------------------------------------------------------------------------------------- labels

LONGER = [
    ASKED,
    SAID,
    {"role": "user", "content": "And three plus three?"},
    {"role": "assistant", "content": "Six 🐦!"},
]


def test_every_answer_of_a_conversation_is_trained_on_with_its_end(smol_tokenizer, gemma_like_tokenizer):
    for tokenizer, end in ((smol_tokenizer, "<|im_end|>\n"), (gemma_like_tokenizer, "<end_of_turn>\n")):
        ids, labels, size = labelled(tokenizer, {"messages": LONGER})
        assert tokenizer.decode([i for i in labels if i != -100]) == f"Four.{end}Six 🐦!{end}"
        # Tokens that frame the text are no text, as in eval_perplexity.py.
        assert size == len("Four.\nSix 🐦!\n".encode())
        whole = ChatRenderer(tokenizer).full_text(LONGER[:-1], "Six 🐦!")
        assert ids == tokenizer(whole, add_special_tokens=False)["input_ids"]


def test_labels_are_those_of_transformers_assistant_mask(smol_tokenizer):
    """The same template with transformers' own generation marks around what the assistant says."""
    import copy

    marked = copy.deepcopy(smol_tokenizer)
    marked.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] + '<|im_end|>\n' }}{% endgeneration %}{% else %}"
        "{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    theirs = marked.apply_chat_template(LONGER, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    ids, labels, _ = labelled(marked, {"messages": LONGER})
    assert ids == theirs["input_ids"]
    assert [int(label != -100) for label in labels] == list(theirs["assistant_masks"])


def test_an_answer_that_is_written_otherwise_later_is_left_out(smol_tokenizer):
    """As templates do that drop earlier thoughts: the first answer's rendering changes once a turn follows it."""
    import copy

    forgetful = copy.deepcopy(smol_tokenizer)
    forgetful.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' and not loop.last %}..."
        "{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    _, labels, _ = labelled(forgetful, {"messages": LONGER})
    assert forgetful.decode([i for i in labels if i != -100]).startswith("Six 🐦!<|im_end|>")


def test_a_token_without_characters_of_its_own_is_part_of_its_answer(smol_tokenizer):
    """GPT-NeoX's and Pythia's tokenizers trim offsets: a lone space begins where it ends."""
    import copy

    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from tokenizers.processors import ByteLevel as Trim

    trimming = copy.deepcopy(smol_tokenizer)
    trimming.backend_tokenizer.post_processor = Trim(trim_offsets=True)
    trimming.backend_tokenizer.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(False)])
    talk = {"messages": [ASKED, {"role": "assistant", "content": "return 1"}]}
    text = ChatRenderer(trimming).full_text([ASKED], "return 1")
    offsets = trimming(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    assert any(a == b for a, b in offsets), "the case under test"
    _, labels, _ = labelled(trimming, talk)
    assert trimming.decode([i for i in labels if i != -100]) == "return 1<|im_end|>\n"


def test_a_loss_on_everything_and_cutting(smol_tokenizer):
    ids, labels, size = labelled(smol_tokenizer, {"messages": LONGER}, "everything")
    assert labels == ids and size == len(smol_tokenizer.decode(ids[1:], skip_special_tokens=True).encode())
    cut, some, _ = labelled(smol_tokenizer, {"messages": LONGER}, max_length=len(ids) - 3)
    assert cut == ids[:-3] and len(some) == len(cut)
    data = ConversationData([to_conversation({"messages": [ASKED, SAID]}, "x")] * 2, [], 2)
    data.conversations[1] = to_conversation({"instruction": "?", "output": "A."}, "y")
    room = len(labelled(smol_tokenizer, {"instruction": "?", "output": "A."})[0])
    found, counts = tokenize(data, smol_tokenizer, "responses", room - 1)
    assert len(found) >= 1 and counts["truncated"] == 2
    with pytest.raises(UserError, match="nothing_left_to_train_on"):
        tokenize(
            ConversationData([to_conversation({"messages": [ASKED, SAID]}, "x")], [], 1), smol_tokenizer, "responses", 8
        )
