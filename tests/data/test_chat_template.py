"""The chat renderer: same ids as the template, a single BOS, system text never lost."""

import pytest

from preflab.data.chat_template import ChatRenderer, TemplateRefused, shared_prefix
from utils.errors import UserError

TURNS = [
    {"role": "system", "content": "Speak like a sailor."},
    {"role": "user", "content": "Hello?"},
    {"role": "assistant", "content": "Ahoy."},
    {"role": "user", "content": "Where to?"},
]


@pytest.mark.parametrize("which", ["smol_tokenizer", "gemma_like_tokenizer"])
def test_ids_equal_apply_chat_template(which, request):
    tokenizer = request.getfixturevalue(which)
    chat = ChatRenderer(tokenizer)
    for messages in (TURNS[1:], TURNS[1:2]):
        direct = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
        assert chat.ids([chat.prompt_text(messages)])[0] == direct["input_ids"]
        answered = [*messages, {"role": "assistant", "content": "West."}]
        direct = tokenizer.apply_chat_template(answered, tokenize=True, return_dict=True)["input_ids"]
        assert chat.ids([chat.full_text(messages, "West.")])[0] == direct


def test_single_bos_and_end_of_turn(gemma_like_tokenizer):
    chat = ChatRenderer(gemma_like_tokenizer)
    ids = chat.ids([chat.full_text(TURNS[1:], "West.")])[0]
    assert ids[0] == gemma_like_tokenizer.bos_token_id and ids.count(ids[0]) == 1
    end = gemma_like_tokenizer.convert_tokens_to_ids("<end_of_turn>")
    assert chat.end_ids() == {end} and end in ids[-3:]


def test_system_role_or_folded_system_text(smol_tokenizer, gemma_like_tokenizer):
    smol, gemma = ChatRenderer(smol_tokenizer), ChatRenderer(gemma_like_tokenizer)
    assert not smol.folds_system and gemma.folds_system
    assert "<|im_start|>system\nSpeak like a sailor.<|im_end|>" in smol.prompt_text(TURNS)
    assert "<start_of_turn>user\nSpeak like a sailor.\n\nHello?<end_of_turn>" in gemma.prompt_text(TURNS)


def test_end_ids_are_special_tokens_only(smol_tokenizer):
    template = smol_tokenizer.chat_template
    try:
        for tail in ("' ' + eos_token", "'\\n'"):
            smol_tokenizer.chat_template = "{% for m in messages %}{{ m['content'] + " + tail + " }}{% endfor %}"
            assert ChatRenderer(smol_tokenizer).end_ids() == {smol_tokenizer.eos_token_id}
        smol_tokenizer.chat_template = "{{ raise_exception('a system turn is needed') }}"
        assert ChatRenderer(smol_tokenizer).end_ids() == {smol_tokenizer.eos_token_id}
    finally:
        smol_tokenizer.chat_template = template


def test_rejected_conversation_and_missing_template(gemma_like_tokenizer, smol_tokenizer):
    with pytest.raises(TemplateRefused, match="alternate"):
        ChatRenderer(gemma_like_tokenizer).prompt_text([TURNS[1], TURNS[3]])
    template, smol_tokenizer.chat_template = smol_tokenizer.chat_template, None
    try:
        with pytest.raises(UserError, match="--chat_template_path"):
            ChatRenderer(smol_tokenizer)
    finally:
        smol_tokenizer.chat_template = template


def test_template_that_needs_too_much_memory(smol_tokenizer):
    """It is named, and not taken for a batch that is too large."""
    with pytest.raises(UserError, match="--chat_template_path"):
        ChatRenderer(smol_tokenizer, template="{{ 'x' * 10**17 }}")


def test_shared_prefix():
    assert shared_prefix([1, 2, 3], [1, 2, 4]) == 2 and shared_prefix([1], [1, 2]) == 1 and shared_prefix([], [1]) == 0
