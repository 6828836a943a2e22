"""The ledger of a card: every number and sentence in it, with the file and the key that it was read from."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

from utils.errors import UserError
from utils.markdown import escaped, sentence
from utils.secrets_in_text import without_secrets
from utils.tables import decimals, number, p_value

# An absolute path, or one below a home folder; only its last part is for other machines.
MACHINE_PATH = re.compile(r"(?<![\w:/.~<-])(?:~|[A-Za-z]:)?[/\\](?:[\w.@+ -]+[/\\])+([\w.@+-]+)")


def public_text(text: str) -> str:
    """`text` without secrets, and with the last part of machine paths only."""
    return MACHINE_PATH.sub(r"\1", without_secrets(text))


@dataclass(frozen=True)
class Document:
    """A file whose content a card quotes: `name` is relative to the run's results, or to the repository."""

    name: str
    content: dict | list = field(repr=False)

    def at(self, keys: tuple):
        """The value under `keys`. Raises KeyError, IndexError or TypeError where there is none."""
        value = self.content
        for key in keys:
            value = value[key]
        return value


class Sources:
    """Formats figures and records where each is from.

    `entries` has for each: `section`, `shown`, `file`, `key` (a list) and `kind`: number (value × `scale`, `digits`
    decimals), product (of the values under `keys`, the same way), mean, p, text, name, or finding
    (preflab.reporting.findings over the run).
    """

    def __init__(self):
        self.entries: list[dict] = []
        self.section = ""

    @contextmanager
    def damage_named(self) -> Iterator[None]:
        """Raise UserError, naming the section of the card, where an artifact is not as its stage writes it."""
        try:
            yield
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise UserError(
                f"card, section {self.section!r}: the artifact is not as its stage writes it ({error!r}); run it"
                " again, or move its file away"
            ) from error

    def record(self, shown: str, kind: str, document: Document | None, keys: tuple, **more) -> str:
        """Append an entry and return `shown`."""
        file = document.name if document else None
        self.entries.append(
            {"section": self.section, "shown": shown, "kind": kind, "file": file, "key": list(keys), **more}
        )
        return shown

    def number(self, document: Document, *keys, scale: float = 1, digits: int = 1, sign: str = "") -> str:
        """A number with `digits` decimals, "-" for a missing one."""
        value = document.at(keys)
        if value is None:
            return "-"
        shown = number(scale * value, digits, sign)
        return self.record(shown, "number", document, keys, scale=scale, digits=digits)

    def value(self, document: Document, *keys) -> str:
        """A setting as the artifact has it; for counts, rates and versions."""
        value = document.at(keys)
        shown = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        return self.record(escaped(public_text(shown)), "value", document, keys)

    def product(self, document: Document, *places: tuple) -> str:
        """The product of several integers."""
        shown = str(prod(document.at(keys) for keys in places))
        return self.record(shown, "product", document, places)

    def mean(self, document: Document, places: list[tuple], scale: float, digits: int) -> str:
        """The mean of several numbers."""
        values = [document.at(keys) for keys in places]
        shown = number(scale * sum(values) / len(values), digits)
        return self.record(shown, "mean", document, places, scale=scale, digits=digits)

    def p(self, document: Document, *keys) -> str:
        """A p-value."""
        value = document.at(keys)
        return "-" if value is None else self.record(p_value(value), "p", document, keys)

    def estimate(self, document: Document, *keys, scale: float = 1, digits: int = 1, sign: str = "") -> str:
        """A metric with its 95% interval, else with its standard error: `71.7 [63.0, 79.0]`."""
        metric = document.at(keys)
        if metric["value"] is None:
            return "-"
        style = {"scale": scale, "digits": decimals(metric, scale, digits), "sign": sign}
        shown = self.number(document, *keys, "value", **style)
        if metric.get("ci95"):
            low, high = (self.number(document, *keys, "ci95", end, **style) for end in (0, 1))
            return f"{shown} [{low}, {high}]"
        if metric.get("stderr") is not None:
            return f"{shown} ± {self.number(document, *keys, 'stderr', **{**style, 'sign': ''})}"
        return shown

    def text(self, document: Document, *keys) -> str:
        """One of the project's own sentences, as stored."""
        shown = sentence(public_text(str(document.at(keys))))
        return self.record(shown, "text", document, keys)

    def name(self, shown: str, document: Document | None, *keys) -> str:
        """A name (of a model, data set or run), which may contain digits; as text."""
        return self.record(escaped(public_text(shown)), "name", document, keys)

    def finding(self, text: str) -> str:
        """A warning of the report."""
        return self.record(sentence(public_text(text)), "finding", None, ())


def name_in(path: Path, root: Path) -> str:
    """A file's name relative to `root`, or its last part where it is elsewhere."""
    try:
        return path.resolve().relative_to(root.resolve()).as_posix()
    except ValueError:
        return path.name
