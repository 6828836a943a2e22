"""Strict command lines on TRL's parser: YAML sets defaults, flags override them, an unknown key is an error."""

import dataclasses
import difflib
import enum
import sys
import types
import typing
from dataclasses import field
from pathlib import Path

from utils.artifacts import with_limit_suffix
from utils.errors import UserError


def quick_help(page: str, runs_bare: bool = False) -> None:
    """Print a script's docstring and exit if `--help` was given. Call before the heavy imports.

    Args:
        runs_bare: whether the script runs without arguments; if not, a call without any prints the help too.
    """
    if (len(sys.argv) == 1 and not runs_bare) or {"-h", "--help"} & set(sys.argv[1:]):
        print(page.strip())
        sys.exit(0)


def parse(dataclass_types: tuple, argv: list[str] | None = None) -> tuple:
    """Fill the dataclasses from `--config FILE.yaml` and the command line with TRL's parser.

    A flag may be written with underscores or dashes (--max_length, --max-length).

    Raises:
        UserError: an unknown or duplicate key, a value of the wrong type, a missing file. Names key and file.
    """
    # Inside the function, because TRL imports torch and transformers: --help comes before.
    from trl import TrlParser

    class StrictParser(TrlParser):
        def error(self, message):
            raise UserError(f"command line: {message}; see --help, or --help_all for all keys")

    # TRL's parser recognises `--config FILE` in two parts only.
    argv = [part for arg in (sys.argv[1:] if argv is None else argv) for part in _split_config(arg)]
    if "--help_all" in argv:
        StrictParser(dataclass_types, allow_abbrev=False).print_help()
        sys.exit(0)
    # get_type_hints, because dataclasses of the libraries have their annotations as strings.
    hints = {name: hint for d in dataclass_types for name, hint in typing.get_type_hints(d).items()}
    fields = [f for d in dataclass_types for f in dataclasses.fields(d) if f.init]
    keys = {f.name for f in fields}
    choices = {f.name: f.metadata["choices"] for f in fields if "choices" in f.metadata}
    if argv.count("--config") > 1:
        raise UserError("command line: --config is given twice; give it once")
    if "--config" in argv:
        at = argv.index("--config")
        if at + 1 == len(argv):
            raise UserError("command line: --config needs a file, e.g. --config configs/quickstart.yaml")
        _check_yaml(argv[at + 1], keys, hints, choices)
    for arg in argv:
        name = arg.split("=")[0]
        # argparse would report an unknown flag too, but without a suggestion. It adds `--no_x` for booleans that are
        # true by default.
        known = name.removeprefix("--").replace("-", "_")
        if name.startswith("--") and name != "--config" and known not in keys and known.removeprefix("no_") not in keys:
            raise UserError(f"command line: unknown flag {name}{_suggestion(known, keys, '--')}")
    try:
        # argparse's abbreviations would let a mistyped flag set another one (--max for --max_length).
        return StrictParser(dataclass_types, allow_abbrev=False).parse_args_and_config(argv)
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(f"arguments: {error}") from error


def _split_config(arg: str) -> list[str]:
    return arg.split("=", 1) if arg.startswith("--config=") else [arg]


def _suggestion(key: str, keys: set[str], dash: str = "") -> str:
    """The end of an error about an unknown key: the most similar known one."""
    matches = difflib.get_close_matches(key, keys, n=1, cutoff=0.6)
    return f"; did you mean {dash}{matches[0]}?" if matches else "; see --help_all"


def _check_yaml(path: str, keys: set[str], hints: dict, choices: dict) -> None:
    """Raise UserError for what TRL's parser accepts in YAML: duplicate keys, values of a wrong type or choice."""
    import yaml

    # PyYAML keeps the last of two equal keys without a warning.
    class UniqueKeys(yaml.SafeLoader):
        pass

    def mapping(loader, node, deep=False):
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise UserError(f"{path} line {key.start_mark.line + 1}: duplicate key {key.value!r}")
            seen.add(key.value)
        return yaml.SafeLoader.construct_mapping(loader, node, deep)

    UniqueKeys.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    try:
        with open(path, encoding="utf-8") as f:
            # A subclass of SafeLoader: YAML tags cannot create Python objects.
            config = yaml.load(f, UniqueKeys)
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML ({error})") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: expected `key: value` lines")
    for key, value in config.items():
        # TrlParser sets the entries of `env` as environment variables.
        if key == "env":
            continue
        if key not in keys:
            raise UserError(f"{path}: unknown key {key!r}{_suggestion(str(key), keys)}")
        if not _fits(value, hints[key]):
            kind = typing.get_origin(hints[key]) and str(hints[key]) or getattr(hints[key], "__name__", hints[key])
            raise UserError(f"{path}: key {key!r} must be {kind}, got {value!r}")
        if key in choices and value is not None and value not in choices[key]:
            raise UserError(f"{path}: key {key!r} must be one of {', '.join(choices[key])}, got {value!r}")


def _fits(value, hint) -> bool:
    """Whether a YAML value is valid for a key of this type. A number may be text: PyYAML reads 5e-7 as a string."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        members = typing.get_args(hint)
        # bool is a subclass of int: `seed: true` must not count as a number.
        if isinstance(value, bool) and bool not in members:
            return False
        return any(_fits(value, member) for member in members)
    if hint in (None, type(None)):
        return value is None
    if value is None:
        return False
    if origin is list:
        (item,) = typing.get_args(hint) or (typing.Any,)
        # A scalar is accepted for a list, as a single value is on the command line.
        return all(_fits(v, item) for v in value) if isinstance(value, list) else _fits(value, item)
    if origin is dict or hint is dict:
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


def run_name(requested: str | None, source: str, suffix: str, limit: int | None) -> str:
    """The run's name: --run_name, else the config file's stem, else `source` and `suffix`; marked under --limit.

    Args:
        source: a path, hub id or `builtin:` name, of which the last part is used.
    """
    name = requested
    # The file's name is not in the parsed dataclasses, so it is read from the command line again.
    argv = [part for arg in sys.argv for part in _split_config(arg)]
    if not name and "--config" in argv:
        name = Path(argv[argv.index("--config") + 1]).stem
    name = name or f"{Path(source.split(':')[-1]).name}-{suffix}"
    if "/" in name or name.startswith("."):
        raise UserError(f"--run_name {name}: must not contain / or start with a dot")
    return with_limit_suffix(name, limit)


def option(text: str, default=None, **extra):
    """Define a dataclass field with a help text; `extra` goes to its metadata (choices, ...)."""
    return field(default=default, metadata={"help": text, **extra})
