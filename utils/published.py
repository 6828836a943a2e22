"""Published results that a config or a flag names: read, checked, and never mixed with this project's own."""

from pathlib import Path

from utils.errors import UserError


def read_published(path: str, kind: type = dict) -> dict:
    """A YAML file of published results: source, setting and rows. Raises UserError naming the file.

    Args:
        kind: dict for rows by name, list for rows in order.
    """
    import yaml

    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"--published {path}: cannot be read ({error})") from None
    if not isinstance(found, dict) or not {"source", "setting", "rows"} <= set(found):
        raise UserError(f"--published {path}: needs source, setting and rows")
    if not isinstance(found["rows"], kind):
        raise UserError(f"--published {path}: rows must be {'a list' if kind is list else 'given by name'}")
    return found
