"""Remove passwords, keys and tokens from text before it is shown or stored."""

import os
import re

# user:password@ of an address. It may hold a second @, never a slash or white space.
# Libraries that take an address for a path write http:/ with one slash.
LOGIN = re.compile(r"(://|\bhttps?:/)[^/\s\"']*@")
# Values of a query whose names say that they are secret.
SECRET_VALUE = re.compile(r"([?&][^=&\s\"']*(?:key|token|secret|sig|pass)[^=&\s\"']*=)[^&\s\"']+", re.IGNORECASE)


# Tokens that are recognised by their form: of the hub, of OpenAI and its like, of GitHub.
TOKEN = re.compile(r"\b(?:hf_[A-Za-z0-9]{16,}|sk-[\w-]{16,}|gh[a-z]_[A-Za-z0-9]{16,})")
# Environment variables whose values are secret, and flags. Not every flag *_token: a tokenizer has an eos_token.
SECRET_VARIABLE = re.compile(r"(?:TOKEN|_KEY|SECRET|PASSWORD)$")
SECRET_FLAG = re.compile(r"(?:hf|hub|access|auth|api)_?token$|api_?key$|secret$|password$")
# A shorter value of such a variable may be part of ordinary text.
SHORTEST = 8


def without_secrets(text: str) -> str:
    """`text` without the login of addresses; keys in their queries, tokens and secrets of the environment become ***.

    Secrets of the environment are the values of variables such as HF_TOKEN and OPENAI_API_KEY.
    """
    for name, value in os.environ.items():
        if len(value) >= SHORTEST and value in text and SECRET_VARIABLE.search(name):
            text = text.replace(value, "***")
    return TOKEN.sub("***", SECRET_VALUE.sub(r"\1***", LOGIN.sub(r"\1", text)))


def without_secret_flags(argv: list[str]) -> list[str]:
    """The words of a command line with *** in place of the value of flags such as --hub_token."""
    shown, secret = [], False
    for word in argv:
        flag, equals, _ = word.partition("=")
        is_secret = flag.startswith("--") and SECRET_FLAG.search(flag.replace("-", "_")) is not None
        shown.append("***" if secret and not word.startswith("--") else f"{flag}=***" if is_secret and equals else word)
        secret = is_secret and not equals
    return [without_secrets(word) for word in shown]
