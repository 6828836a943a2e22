"""Strict command lines on TRL's parser: YAML sets defaults, flags override them, an unknown key is an error."""

import re
import sys
from dataclasses import field
from pathlib import Path

from utils.artifacts import with_limit_suffix
from utils.config_file import check_config
from utils.errors import UserError
from utils.help_all import all_keys_page
from utils.keys import Key, keys_of
from utils.markdown import visible
from utils.provenance import local_path, version_page
from utils.suggestions import choose_from, meant_key

# What may follow a switch, and what it means.
SWITCH_WORDS = dict.fromkeys(("true", "t", "yes", "y", "on", "1"), "true")
SWITCH_WORDS |= dict.fromkeys(("false", "f", "no", "n", "off", "0"), "false")


def quick_help(page: str, runs_bare: bool = False) -> None:
    """Print a script's docstring or the versions and exit if --help or --version is given. Call before heavy imports.

    Args:
        runs_bare: whether the script runs without arguments; if not, a call without any prints the help too.
    """
    # Arguments after `--` belong to another program (run_lm_eval.sh).
    argv = sys.argv[1 : sys.argv.index("--")] if "--" in sys.argv else sys.argv[1:]
    if "--version" in argv:
        print(version_page())
        sys.exit(0)
    if (len(sys.argv) == 1 and not runs_bare) or {"-h", "--help"} & set(argv):
        print(page.strip())
        sys.exit(0)


def parse(dataclass_types: tuple, argv: list[str] | None = None) -> tuple:
    """Fill the dataclasses from `--config FILE.yaml` and the command line with TRL's parser.

    A flag may be written with underscores or dashes (--max_length, --max-length). A switch is turned on by `--x` or
    `--x true` and off by `--no_x` or `--x false`, whatever its default and the YAML file say.

    Raises:
        UserError: an unknown or duplicate key, a value of the wrong type, a missing file. Names key and file.
    """
    # Inside the function, because TRL imports torch and transformers: --help comes before.
    from trl import TrlParser

    class StrictParser(TrlParser):
        def error(self, message):
            raise UserError(f"command line: {message}; see --help, or --help_all for all keys")

    argv, keys = list(sys.argv[1:] if argv is None else argv), keys_of(dataclass_types)
    asked = next((i for i, arg in enumerate(argv) if arg in ("--help_all", "--help-all")), None)
    if asked is not None:
        # The words up to the next flag are what is searched for.
        print(all_keys_page(keys, dataclass_types, _take(argv[asked + 1 :], len(argv))))
        sys.exit(0)
    argv = normalised(argv, keys)
    if "--config" in argv:
        place = argv.index("--config") + 1
        argv[place] = str(local_path(argv[place]))
        check_config(argv[place], keys)
    # argparse's abbreviations would let a mistyped flag set another one (--max for --max_length).
    parser = StrictParser(dataclass_types, allow_abbrev=False)
    for action in parser._actions:
        # HfArgumentParser reads a key that is text or a switch as a switch, so that it would refuse the text.
        if action.dest in keys and {str, bool} <= set(keys[action.dest].members):
            action.type = str
    try:
        parsed = parser.parse_args_and_config(argv)
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(f"arguments: {error}") from error
    for part in parsed:
        # Every stage with a run name, before it does anything.
        if getattr(part, "run_name", None) is not None:
            check_name(part.run_name)
    return parsed


def normalised(argv: list[str], keys: dict[str, Key]) -> list[str]:
    """The command line in the one form that argparse reads right: `--key=value`, switches with their value.

    Raises:
        UserError: a flag that does not exist, a missing value, or a word that belongs to no flag. Names the word.
    """
    result, before, rest, lists = [], None, list(argv), {}
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or word == "--":
            raise UserError(f"command line: {_stray(word, before, keys)}")
        flag, equals, value = word.partition("=")
        values = [value] if equals else []
        if flag == "--config":
            if flag in result:
                raise UserError("command line: --config is given twice; give it once")
            values = values or _take(rest, 1)
            if values in ([], [""]):
                raise UserError("command line: --config needs a file, e.g. --config configs/quickstart.yaml")
            result, before = [*result, flag, *values], "--config"
            continue
        key, negated = _key_of(flag, keys)
        has_value = equals or (rest and rest[0].lower() in SWITCH_WORDS)
        if negated and has_value:
            raise UserError(f"command line: {flag} takes no value; it is the short form of --{key.name} false")
        if key.is_switch:
            if has_value:
                values = values or [rest.pop(0)]
            result.append(f"--{key.name}={_switch_value(flag, values, negated)}")
        elif key.is_list:
            values = values or _take(rest, len(rest))
            _check_values(flag, key, values)
            # Of several flags the last counts, as for other keys, but `--judge A --judge B` is a list of two.
            lists[key.name] = [*(lists.get(key.name, []) if key.is_repeatable else []), *values]
        elif not values and bool in key.members and (not rest or rest[0].startswith("--")):
            result.append(f"--{key.name}=true")
        else:
            values = values or _take(rest, 1)
            _check_values(flag, key, values)
            # With the equals sign argparse does not mistake -1e-5 for a flag.
            result.append(f"--{key.name}={values[0]}")
        before = flag
    # argparse takes the words of a list only without the equals sign.
    return result + [word for name, values in lists.items() for word in (f"--{name}", *values)]


def _take(rest: list[str], count: int) -> list[str]:
    """Remove and return up to `count` words before the next flag."""
    taken = []
    while rest and len(taken) < count and not rest[0].startswith("--"):
        taken.append(rest.pop(0))
    return taken


def _key_of(flag: str, keys: dict[str, Key]) -> tuple[Key, bool]:
    """(the key that a flag names, whether the flag is its `--no_` form)."""
    name = flag.removeprefix("--").replace("-", "_")
    if name in keys:
        return keys[name], False
    positive = name.removeprefix("no_")
    if positive in keys and positive != name:
        if not keys[positive].is_switch:
            raise UserError(f"command line: unknown flag {flag}: --{positive} is not a switch, it takes a value")
        return keys[positive], True
    meant = meant_key(name, keys)
    hint = f"did you mean --{meant}?" if meant else "see --help_all, or --help_all WORD to search"
    raise UserError(f"command line: unknown flag {flag}; {hint}")


def _switch_value(flag: str, values: list[str], negated: bool) -> str:
    if negated:
        return "false"
    value = values[0] if values else "true"
    if value.lower() not in SWITCH_WORDS:
        raise UserError(f"command line: {flag}={value}: must be true or false")
    return SWITCH_WORDS[value.lower()]


def _check_values(flag: str, key: Key, values: list[str]) -> None:
    """Raise UserError for a flag without a value, and for a value that is not one of its choices."""
    if not values:
        raise UserError(f"command line: {flag} needs a value ({key.type_name}); see --help_all {key.name}")
    for value in values:
        if key.choices and value not in key.choices:
            raise UserError(f"command line: {flag} {value}: unknown; {choose_from(value, key.choices)}")


def _stray(word: str, before: str | None, keys: dict[str, Key]) -> str:
    """Why a word that is neither a flag nor a flag's value is not understood, and what may have been meant."""
    start = f"{word!r} is not understood"
    # Copied from a formatted page, two hyphens are often one of these dashes; `-bf16` has one hyphen too few.
    name = re.sub(r"^[-\u2010-\u2015\u2212]+", "", word).partition("=")[0]
    if name != word.partition("=")[0] and not re.match(r"-[\d.]", word):
        meant = meant_key(name, keys)
        return f"{start}: a flag starts with two hyphens" + (f"; did you mean --{meant}?" if meant else "")
    if word.endswith((".yaml", ".yml")) and before != "--config":
        return f"{start}: did you mean --config {word}?"
    if "=" in word and meant_key(name, keys):
        return f"{start}: did you mean --{meant_key(name, keys)} {word.partition('=')[2]}?"
    if before == "--config" and word.endswith((".yaml", ".yml")):
        return f"{start}: --config takes one file"
    # A file after --config is its only value, so a further word belongs to no flag.
    if before in (None, "--config"):
        meant = meant_key(word, keys)
        hint = f"did you mean --{meant}?" if meant else "see --help"
        return f"{start}: it follows no flag; {hint}"
    key, negated = _key_of(before.partition("=")[0], keys)
    if negated:
        return f"{start}: it follows {before}, which takes no value"
    if key.is_switch:
        return f"{start}: it follows {before}, which takes true, false or nothing"
    return f"{start}: it follows {before}, which takes one value (quote a value that contains spaces)"


# Characters that a name may not have: they separate paths on some system, or mean something to a shell or in a card.
NOT_IN_NAMES = set('/\\<>:"|?*`')
# In bytes. File systems allow 255, and files and folders are named after a run with suffixes.
LONGEST_NAME = 150


def check_name(name: str, flag: str = "--run_name") -> None:
    """Raise UserError if `name` cannot be the name of a folder, a title and a heading in a model card at once."""
    shown = visible(name) if len(name) <= 60 else f"{visible(name[:60])}…"
    if not name.strip():
        problem = "must not be empty"
    elif len(name.encode("utf-8", "surrogatepass")) > LONGEST_NAME:
        problem = f"has {len(name)} characters; at most {LONGEST_NAME} bytes fit into file names"
    elif name[0] in ".-~ " or name[-1] in ". ":
        problem = "must not start with a dot, dash, tilde or space, or end with a dot or space"
    elif not name.isprintable():
        problem = "must not contain line breaks or other control characters"
    elif NOT_IN_NAMES & set(name):
        problem = f"must not contain {''.join(sorted(NOT_IN_NAMES & set(name)))}"
    else:
        return
    raise UserError(f"{flag} {shown}: {problem}; it names a folder, so letters, digits, - and _ are safe")


def run_name(requested: str | None, source: str, suffix: str, limit: int | None) -> str:
    """The run's name: --run_name, else the config file's stem, else `source` and `suffix`; marked under --limit.

    Args:
        source: a path, hub id or `builtin:` name, of which the last part is used.
    """
    name = requested
    # The file's name is not in the parsed dataclasses, so it is read from the command line again.
    argv = [part for arg in sys.argv for part in (arg.split("=", 1) if arg.startswith("--config=") else [arg])]
    if not name and "--config" in argv:
        name = Path(argv[argv.index("--config") + 1]).stem
    name = name or f"{Path(source.split(':')[-1]).name}-{suffix}"
    check_name(name)
    return with_limit_suffix(name, limit)


def option(text: str, default=None, **extra):
    """Define a dataclass field with a help text; `extra` goes to its metadata (choices, ...)."""
    metadata = {"help": text, **extra}
    if isinstance(default, list):
        # A list as default would be shared by all objects of the class.
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)
