"""Command lines: TRL's parser, made strict. YAML gives defaults, the command line wins, an unknown key is an error."""

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
    """Print a script's docstring and leave, where `--help` was given: no heavy import comes first.

    So does a call with no argument, unless the script `runs_bare`.
    """
    if (len(sys.argv) == 1 and not runs_bare) or {"-h", "--help"} & set(sys.argv[1:]):
        print(page.strip())
        sys.exit(0)


def parse(dataclass_types: tuple, argv: list[str] | None = None) -> tuple:
    """The dataclasses, filled from `--config FILE.yaml` and the command line by TRL's parser.

    Raises UserError, naming key and file, for an unknown or doubled key, a value of the wrong type, a missing file.
    """
    from trl import TrlParser

    class StrictParser(TrlParser):
        def error(self, message):
            raise UserError(f"command line: {message}; see --help, or --help_all for every key")

    argv = [part for arg in (sys.argv[1:] if argv is None else argv) for part in _split_config(arg)]
    if "--help_all" in argv:
        StrictParser(dataclass_types, allow_abbrev=False).print_help()
        sys.exit(0)
    hints = {name: hint for d in dataclass_types for name, hint in typing.get_type_hints(d).items()}
    fields = [f for d in dataclass_types for f in dataclasses.fields(d) if f.init]
    keys = {f.name for f in fields}
    choices = {f.name: f.metadata["choices"] for f in fields if "choices" in f.metadata}
    if argv.count("--config") > 1:
        raise UserError("command line: --config is given twice; give one file")
    if "--config" in argv:
        at = argv.index("--config")
        if at + 1 == len(argv):
            raise UserError("command line: --config needs a file, e.g. --config configs/quickstart.yaml")
        _check_yaml(argv[at + 1], keys, hints, choices)
    for arg in argv:
        name = arg.split("=")[0]
        known = name.removeprefix("--").replace("-", "_")
        if name.startswith("--") and name != "--config" and known not in keys and known.removeprefix("no_") not in keys:
            raise UserError(f"command line: unknown flag {name}{_close(known, keys, '--')}")
    try:
        return StrictParser(dataclass_types, allow_abbrev=False).parse_args_and_config(argv)
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(f"arguments: {error}") from error


def _split_config(arg: str) -> list[str]:
    return arg.split("=", 1) if arg.startswith("--config=") else [arg]


def _close(key: str, keys: set[str], dash: str = "") -> str:
    found = difflib.get_close_matches(key, keys, n=1, cutoff=0.6)
    return f"; did you mean {dash}{found[0]}?" if found else "; see --help_all"


def _check_yaml(path: str, keys: set[str], hints: dict, choices: dict) -> None:
    """Refuse what TRL's parser lets pass in YAML: keys given twice, values of a wrong type or outside the choices."""
    import yaml

    class UniqueKeys(yaml.SafeLoader):
        pass

    def mapping(loader, node, deep=False):
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise UserError(f"{path} line {key.start_mark.line + 1}: key {key.value!r} stands twice")
            seen.add(key.value)
        return yaml.SafeLoader.construct_mapping(loader, node, deep)

    UniqueKeys.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    try:
        with open(path, encoding="utf-8") as f:
            config = yaml.load(f, UniqueKeys)
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML ({error})") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: expected `key: value` lines")
    for key, value in config.items():
        if key == "env":
            continue
        if key not in keys:
            raise UserError(f"{path}: unknown key {key!r}{_close(str(key), keys)}")
        if not _fits(value, hints[key]):
            kind = typing.get_origin(hints[key]) and str(hints[key]) or getattr(hints[key], "__name__", hints[key])
            raise UserError(f"{path}: key {key!r} must be {kind}, found {value!r}")
        if key in choices and value is not None and value not in choices[key]:
            raise UserError(f"{path}: key {key!r} must be one of {', '.join(choices[key])}, found {value!r}")


def _fits(value, hint) -> bool:
    """Whether a YAML value can stand for a key of this type. Numbers may be written as text (PyYAML reads 5e-7 so)."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        members = typing.get_args(hint)
        if isinstance(value, bool) and bool not in members:
            return False
        return any(_fits(value, member) for member in members)
    if hint in (None, type(None)):
        return value is None
    if value is None:
        return False
    if origin is list:
        (item,) = typing.get_args(hint) or (typing.Any,)
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
    return isinstance(value, str)


def run_name(asked: str | None, model_name: str, loss_type: list[str], limit: int | None) -> str:
    """--run_name, else the config's name, else model and loss; marked where --limit is on."""
    name = asked
    argv = [part for arg in sys.argv for part in (arg.split("=", 1) if arg.startswith("--config=") else [arg])]
    if not name and "--config" in argv:
        name = Path(argv[argv.index("--config") + 1]).stem
    name = name or f"{Path(model_name.split(':')[-1]).name}-{'-'.join(loss_type)}"
    if "/" in name or name.startswith("."):
        raise UserError(f"--run_name {name}: give a plain name, without / and without a leading dot")
    return with_limit_suffix(name, limit)


def option(text: str, default=None, **extra):
    """A dataclass field with its help text."""
    return field(default=default, metadata={"help": text, **extra})
