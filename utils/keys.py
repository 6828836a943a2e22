"""Keys of dataclasses, which are YAML keys and flags: their types, defaults, choices and valid values."""

import dataclasses
import enum
import types
import typing
from dataclasses import dataclass

# Lists that several flags make together. Not in the fields' metadata, which goes to argparse.
REPEATABLE = {"judge"}


@dataclass(frozen=True)
class Key:
    """One key.

    Attributes:
        hint: its type, resolved.
        field: its dataclass field.
    """

    name: str
    hint: object
    field: dataclasses.Field

    @property
    def members(self) -> tuple:
        """The types that the key accepts, without None."""
        return tuple(member for member in _members(self.hint) if member is not type(None))

    @property
    def is_switch(self) -> bool:
        """Whether the key is true or false and nothing else."""
        return self.members == (bool,)

    @property
    def is_list(self) -> bool:
        """Whether a flag takes several words: the type is a list and nothing else."""
        return len(self.members) == 1 and typing.get_origin(self.members[0]) is list

    @property
    def is_repeatable(self) -> bool:
        """Whether several flags of a list make one list, instead of the last one replacing the others."""
        return self.name in REPEATABLE

    @property
    def choices(self) -> list[str]:
        """The accepted words, or an empty list where any word is accepted."""
        if "choices" in self.field.metadata:
            return [str(choice) for choice in self.field.metadata["choices"]]
        for member in self.members:
            if isinstance(member, type) and issubclass(member, enum.Enum):
                return [str(choice.value) for choice in member]
            # Union[str, Literal[False]] accepts any text.
            if typing.get_origin(member) is typing.Literal and len(self.members) == 1:
                return [str(choice) for choice in typing.get_args(member)]
        return []

    @property
    def default(self):
        """The dataclass's default, or None where there is none."""
        if self.field.default is not dataclasses.MISSING:
            return self.field.default
        return self.field.default_factory() if self.field.default_factory is not dataclasses.MISSING else None

    @property
    def default_text(self) -> str:
        """The default as it would be typed; empty where there is none."""
        value = self.default
        if value is None or value == [] or value == "":
            return ""
        if isinstance(value, list):
            return " ".join(map(str, value))
        # str() of an enum of libraries may be `Class.member`.
        value = value.value if isinstance(value, enum.Enum) else value
        return (
            str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)
        )

    @property
    def help(self) -> str:
        """The field's description as one line."""
        return " ".join((self.field.metadata.get("help") or "").split())

    @property
    def type_name(self) -> str:
        """What a flag takes, for help pages: a|b|c, true|false, N (integer), X (number), TEXT; `...` after a list."""
        if self.choices:
            return "|".join(self.choices)
        if self.is_switch:
            return "true|false"
        member = self.members[0] if self.members else str
        suffix = ""
        if typing.get_origin(member) is list:
            member, suffix = (typing.get_args(member) or (str,))[0], " ..."
        return {int: "N", float: "X"}.get(member, "JSON" if _is_dict(member) else "TEXT") + suffix

    @property
    def wanted(self) -> str:
        """The accepted values in words, for error messages."""
        if typing.get_origin(self.hint):
            return str(self.hint)
        return getattr(self.hint, "__name__", str(self.hint))


def keys_of(dataclass_types: tuple) -> dict[str, Key]:
    """Every key of the dataclasses by name."""
    keys = {}
    for owner in dataclass_types:
        # get_type_hints, because dataclasses of the libraries have their annotations as strings.
        hints = typing.get_type_hints(owner)
        keys |= {f.name: Key(f.name, hints[f.name], f) for f in dataclasses.fields(owner) if f.init}
    return keys


def _members(hint) -> tuple:
    """The types of a union; of any other type, itself."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _is_dict(hint) -> bool:
    return hint is dict or typing.get_origin(hint) is dict


def fits(value, hint) -> bool:
    """Whether a YAML value is valid for a key of this type. A number may be text: PyYAML reads 5e-7 as a string."""
    origin, members = typing.get_origin(hint), _members(hint)
    if len(members) > 1:
        # bool is a subclass of int: `seed: true` must not count as a number.
        if isinstance(value, bool) and bool not in members:
            return False
        return any(fits(value, member) for member in members)
    if hint in (None, type(None)):
        return value is None
    if value is None:
        return False
    if origin is list:
        (item,) = typing.get_args(hint) or (typing.Any,)
        # A scalar is accepted for a list, as a single value is on the command line.
        return all(fits(v, item) for v in value) if isinstance(value, list) else fits(value, item)
    if _is_dict(hint):
        return isinstance(value, dict)
    if origin is typing.Literal:
        return value in typing.get_args(hint)
    if hint is typing.Any:
        return True
    if hint is bool:
        return isinstance(value, bool)
    if hint is int:
        return not isinstance(value, bool) and (isinstance(value, int) or _is_number(value, int))
    if hint is float:
        return not isinstance(value, bool) and (isinstance(value, (int, float)) or _is_number(value, float))
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return value in [member.value for member in hint]
    if dataclasses.is_dataclass(hint):
        return isinstance(value, dict)
    return isinstance(value, str)


def _is_number(value, kind) -> bool:
    try:
        kind(value)
    except (TypeError, ValueError):
        return False
    # int(1.5) succeeds, so a float for an integer key must be excluded here.
    return isinstance(value, str)
