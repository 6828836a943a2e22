"""The validator of chat messages that preferences, conversations and prompts share."""

import pytest

from preflab.data.messages import check_messages, check_unicode, read_transcript, role_of, up_to_last
from utils.errors import UserError


def test_messages_have_role_and_content_only():
    turns = [
        {"role": "system", "content": "s", "name": "x"},
        {"from": "human", "value": "q"},
        {"from": "gpt", "value": ""},
    ]
    assert check_messages(turns, "row 1", "messages") == [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": ""},
    ]
    assert check_messages([{"content": "q"}], "row 1", "turns", default_role="user") == [
        {"role": "user", "content": "q"}
    ]


@pytest.mark.parametrize(
    ("turns", "words"),
    [
        ("text", ("row 1", "'chosen'", "str")),
        (None, ("row 1", "'chosen'", "NoneType")),
        (["text"], ("row 1", "'chosen', message 0")),
        ([{"content": "no role"}], ("row 1", "'chosen', message 0", "'role'")),
        (
            [{"role": "user", "content": "q"}, {"role": "critic", "content": "x"}],
            ("message 1", "'critic'", "assistant"),
        ),
        ([{"role": None, "content": "x"}], ("message 0", "None")),
        ([{"role": ["user"], "content": "x"}], ("message 0", "['user']")),
        ([{"role": "user", "content": [{"text": "x"}]}], ("message 0", "content", "list")),
        ([{"role": "user"}], ("message 0", "content", "null")),
    ],
)
def test_invalid_messages_name_row_key_and_message(turns, words):
    with pytest.raises(UserError) as error:
        check_messages(turns, "row 1", "chosen")
    assert all(word in str(error.value) for word in words), error.value


def test_role_of_anything():
    assert [role_of(m) for m in ({"role": "human"}, {"from": "gpt"}, {"role": 3}, {}, "user", None)] == [
        "user", "assistant", None, None, None, None
    ]  # fmt: skip


def test_up_to_last():
    messages = [{"role": role, "content": ""} for role in ("user", "assistant", "user")]
    assert up_to_last(messages, "assistant") == messages[:2] and up_to_last(messages, "user") == messages
    assert up_to_last(messages, "system") == []


def test_transcript_starts_with_human():
    assert [m["role"] for m in read_transcript("\n\nHuman: a\n\nAssistant: b", "row 1", "chosen")] == [
        "user",
        "assistant",
    ]
    with pytest.raises(UserError, match="row 1.*'chosen'.*Human"):
        read_transcript("Hello\n\nHuman: a", "row 1", "chosen")


def test_lone_surrogates_are_refused():
    check_unicode(["ä", "🐦", ""], "row 1")
    with pytest.raises(UserError, match="row 1.*Unicode"):
        check_unicode(["fine", "\ud83d"], "row 1")
