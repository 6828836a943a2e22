"""YAML files of `--config`: strict keys and types, and a fix for a file that does not exist."""

from pathlib import Path

from utils.errors import UserError
from utils.keys import Key, fits
from utils.provenance import ROOT
from utils.suggestions import choose_from, meant_key, nearest


def check_config(path: str, keys: dict[str, Key]) -> None:
    """Raise UserError for what TRL's parser accepts in YAML: duplicate keys, values of a wrong type or choice."""
    for name, value in read_config(path).items():
        # TrlParser sets the entries of `env` as environment variables.
        if name == "env":
            continue
        if name not in keys:
            meant = meant_key(str(name), keys)
            raise UserError(
                f"{path}: unknown key {name!r}; " + (f"did you mean {meant!r}?" if meant else "see --help_all")
            )
        key = keys[name]
        if key.choices and isinstance(value, str) and value not in key.choices:
            raise UserError(f"{path}: key {name!r}: {value!r} is unknown; {choose_from(value, key.choices)}")
        if not fits(value, key.hint):
            raise UserError(f"{path}: key {name!r} must be {key.wanted}, got {value!r}")


def read_config(path: str) -> dict:
    """Read a YAML mapping.

    Raises:
        UserError: no such file (names similar ones), invalid YAML, a key given twice, or no mapping.
    """
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
        raise UserError(f"--config {path}: {error.strerror}; {similar_files(path)}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML ({error})") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: expected `key: value` lines")
    return config


def similar_files(path: str) -> str:
    """A sentence that names the config files most like `path`: the nearest spelling, else those of configs/."""
    folder = ROOT / "configs"
    shipped = {file.stem: file for file in sorted(folder.rglob("*.yaml"), key=lambda file: -len(file.parts))}
    beside = {file.stem: file for file in Path(path).parent.glob("*.y*ml")}
    files = shipped | beside
    match = nearest(Path(path).stem, files)
    if match:
        return f"did you mean {_shown(files[match])}?"
    top = [file.stem for file in sorted(folder.glob("*.yaml"))]
    return f"{_shown(folder)}/ has {', '.join(top)} (.yaml)"


def _shown(path: Path) -> str:
    """The path as it would be typed: relative to the current folder where it is below it."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
