"""Chat templates that loop without an end, allocate too much or fail: one error line, soon."""

import time

import jinja2
import pytest
from conftest import assert_one_line, train_args

from preflab.data import template_limits
from preflab.data.chat_template import ChatRenderer, TemplateRefused, training_template
from utils.errors import UserError

USER = [{"role": "user", "content": "Hello."}]


class Tokenizer:
    """As much of a tokenizer as a renderer needs, with the sandbox that transformers uses."""

    name_or_path = "somebody/model"

    def __init__(self, template):
        self.chat_template = template

    def apply_chat_template(self, messages, tokenize, add_generation_prompt, **arguments):
        from transformers.utils.chat_template_utils import render_jinja_template

        template = arguments.pop("chat_template", None) or self.chat_template
        arguments.pop("tools", None)
        texts, _ = render_jinja_template(
            conversations=[messages], chat_template=template, add_generation_prompt=add_generation_prompt, **arguments
        )
        return texts[0]


DOUBLING = "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}"
TOO_LONG = [
    "{% for i in range(99999) %}{% for j in range(99999) %}{{ j }}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% set x = i * j %}{% endfor %}{% endfor %}",
    "{{ 9 ** (9 ** 9) }}",
    "{{ 7 ** (7 ** 10) % 13 }}",
]
TOO_LARGE = [
    "{{ 'a' * 10 ** 11 }}",
    "{{ [0] * 10 ** 11 }}",
    "{{ 'a' | center(10 ** 11) }}",
    "{{ '%99999999999d' | format(1) }}",
    "{{ '{:>99999999999}'.format(1) }}",
    "{{ 'a'.ljust(10 ** 11) }}",
    DOUBLING,
    "{{ 'a' | indent(10 ** 11) }}",
]
FAILING = [
    "{{ 1 // 0 }}",
    "{{ 1 % 0 }}",
    "{{ 2.0 ** 5000 }}",
    "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "{% for i in range(10 ** 9) %}{% endfor %}",
    "{{ messages[7].content }}",
    "{{ messages.nothing.content }}",
    "{{ 'a' + 1 }}",
    "{{ 'a' | int('b') + none }}",
    "{{ raise_exception('No.') }}",
    "{{ ''.encode('no such codec') }}",
    "{% if %}",
    "{{ " + "(" * 5000 + ")" * 5000 + " }}",
    "{{ " + "[" * 150 + "]" * 150 + " }}",
    "{% if 1 %}" * 500 + "{% endif %}" * 500,
]


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(template_limits.template_limits.__wrapped__, "__defaults__", (0.3, 2**28))


@pytest.mark.parametrize("template", TOO_LONG + TOO_LARGE)
def test_too_much_is_one_line(template):
    started = time.process_time()
    with pytest.raises(UserError, match=r"chat template of somebody/model .*--chat_template_path"):
        ChatRenderer(Tokenizer(template))
    assert time.process_time() - started < 3


@pytest.mark.parametrize("template", FAILING)
def test_failing_template_refuses_conversations(template):
    try:
        renderer = ChatRenderer(Tokenizer(template))
        with pytest.raises(TemplateRefused):
            renderer.prompt_text(USER)
    # What Python cannot compile, since it is nested too deeply.
    except UserError as error:
        assert "nested too deeply" in str(error)
    assert training_template(Tokenizer(template)) is None


def test_limit_holds_for_a_later_conversation():
    """A template that misbehaves in a conversation of a certain length only."""
    renderer = ChatRenderer(
        Tokenizer("{{ messages | length }}{% if messages | length > 2 %}" + DOUBLING + "{% endif %}")
    )
    assert renderer.prompt_text(USER) == "1"
    with pytest.raises(UserError, match="chat template"):
        renderer.prompt_text(USER * 3)


def test_limits_end_with_the_context():
    with pytest.raises(UserError), template_limits.template_limits("m"):
        bytearray(2**30)
    assert len(bytearray(2**30)) == 2**30
    with template_limits.template_limits("m", seconds=0.05):
        pass
    started = time.process_time()
    while time.process_time() - started < 0.3:
        pass
    with pytest.raises(jinja2.TemplateError), template_limits.template_limits("m"):
        raise jinja2.TemplateError


@pytest.mark.parametrize(
    "template", ["{{ 1 // 0 }}", "{{ 'a' * 10 ** 11 }}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"]
)
def test_training_with_such_a_template(template, train, tiny, prefs, tmp_path):
    path = tmp_path / "template.jinja"
    path.write_text(template)
    code, out, err = train(*train_args(tiny, prefs, tmp_path, "--chat_template_path", path))
    assert code == 2, out + err
    assert_one_line(err, "template")
    assert "batch" not in err
