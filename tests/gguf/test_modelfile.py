"""The Modelfile's Go template renders what the model's Jinja template renders."""

import re

import jinja2
import pytest

from preflab.data.chat_template import ChatRenderer
from preflab.gguf.modelfile import modelfile, turns_of

LLAMA2_LIKE = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set turns = messages[1:] %}"
    "{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}{% for m in turns %}"
    "{% if m['role'] == 'user' %}[INST] {% if loop.first and system %}<<SYS>>{{ system }}<</SYS>>{% endif %}"
    "{{ m['content'] }} [/INST]{% else %} {{ m['content'] }} {% endif %}{% endfor %}"
)
LLAMA3_LIKE = (
    "{{ bos_token }}{% for m in messages %}<|start|>{{ m['role'] }}<|end|>\n\n{{ m['content'] | trim }}<|eot|>"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant<|end|>\n\n{% endif %}"
)


def as_jinja(go: str) -> str:
    """A template of Go in Jinja, by its syntax alone: an independent reading of what Ollama runs."""
    rules = (
        (r"\{\{ if not \.System \}\}", "{% if not system %}"),
        (r"\{\{ range \.Messages \}\}", "{% for m in messages %}"),
        (r'\{\{ (else )?if eq \.Role "(\w+)" \}\}', r"{% \1if m.role == '\2' %}"),
        (r"\{\{ \.Content \}\}", "{{ m.content }}"),
        (r'\{\{ "\{\{" \}\}', "{{ '{{' }}"),
    )
    for pattern, replacement in rules:
        go = re.sub(pattern, replacement, go)
    # What an `end` closes follows from what is open.
    open_blocks, parts = [], re.split(r"(\{[{%].*?[%}]\})", go)
    for k, part in enumerate(parts):
        opened = re.match(r"\{% (if|for)", part)
        if opened:
            open_blocks.append(opened[1])
        elif part == "{{ end }}":
            parts[k] = f"{{% end{open_blocks.pop()} %}}"
    return "".join(parts).replace("{% else if", "{% elif")


def rendered(go: str, messages: list[dict]) -> str:
    system = "\n\n".join(m["content"] for m in messages if m["role"] == "system")
    environment = jinja2.Environment(keep_trailing_newline=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(as_jinja(go)).render(messages=messages, system=system)


CONVERSATIONS = [
    [("user", "Why?")],
    [("system", "Be brief."), ("user", "Why?")],
    [("user", "Why?"), ("assistant", "Because."), ("user", "{{ really }}?")],
    [("system", "Be brief."), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "e")],
]


def conversations(with_system: bool = True) -> list[list[dict]]:
    return [
        [{"role": role, "content": text} for role, text in turns]
        for turns in CONVERSATIONS
        if with_system or turns[0][0] != "system"
    ]


def test_smollm_with_its_default_system_text(smol_tokenizer):
    go = turns_of(smol_tokenizer, adds_bos=False).go()
    assert "if not .System" in go and "You are a helpful AI assistant named SmolLM" in go
    for messages in conversations():
        assert rendered(go, messages) == ChatRenderer(smol_tokenizer).prompt_text(messages)


def test_gemma_without_system_role_and_with_a_bos(gemma_like_tokenizer):
    chat = ChatRenderer(gemma_like_tokenizer)
    own, added = turns_of(gemma_like_tokenizer, False).go(), turns_of(gemma_like_tokenizer, True).go()
    for messages in conversations(with_system=False):
        assert rendered(own, messages) == chat.prompt_text(messages)
        # llama.cpp adds the BOS itself.
        assert f"<bos>{rendered(added, messages)}" == chat.prompt_text(messages)
    assert "<bos>" not in added and '"system"' not in added


def test_bos_in_front_of_a_system_turn(gemma_like_tokenizer, monkeypatch):
    monkeypatch.setattr(gemma_like_tokenizer, "chat_template", LLAMA3_LIKE)
    go = turns_of(gemma_like_tokenizer, True).go()
    for messages in conversations():
        assert f"<bos>{rendered(go, messages)}" == ChatRenderer(gemma_like_tokenizer).prompt_text(messages)


def test_template_without_a_go_form_is_not_written(smol_tokenizer, monkeypatch):
    monkeypatch.setattr(smol_tokenizer, "chat_template", LLAMA2_LIKE)
    assert turns_of(smol_tokenizer, False) is None
    text = modelfile("a.gguf", None, ["</s>"], False)
    assert "TEMPLATE" not in text and "cannot be written" in text


@pytest.mark.parametrize("stop", ["<|im_end|>", 'a"b', "a\\b"])
def test_stop_texts_are_quoted(stop):
    line = modelfile("a.gguf", None, [stop], False).splitlines()[-1]
    assert line == 'PARAMETER stop "' + stop.replace("\\", "\\\\").replace('"', '\\"') + '"'
