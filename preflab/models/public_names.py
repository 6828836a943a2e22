"""Names of models, adapters and data for readers elsewhere: hub ids where there are any, no paths of this machine."""

import re
from dataclasses import dataclass
from pathlib import Path

from preflab.models.loading import hub_name
from utils.parsing import parse_json

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# A download in the hub's cache: models--ORG--NAME/snapshots/COMMIT.
SNAPSHOT = re.compile(r"models--([^/]+?)--([^/]+)/snapshots/[^/]+/?$")


@dataclass(frozen=True)
class PublicName:
    """A model or adapter as a card names it.

    Attributes:
        shown: for sentences: `org/name`, `builtin:name`, or `local folder NAME`.
        hub_id: what others can load, None where it is only on this machine.
        folder: the last part of a local folder's path, None for a hub id.
    """

    shown: str
    hub_id: str | None
    folder: str | None = None

    @property
    def loads(self) -> str:
        """The argument of `from_pretrained` in a snippet."""
        return self.hub_id or self.folder


def public_name(name: str, hub_id: str | None = None) -> PublicName:
    """How a card names a model or adapter.

    Args:
        name: as it was given: a hub id, a builtin, or a path.
        hub_id: the user's own (`--base_hub_id`); default: that of the hub's cache or of the folder's config.
    """
    if name.startswith("builtin:"):
        return PublicName(name, hub_name(name))
    snapshot = SNAPSHOT.search(name)
    if snapshot:
        return PublicName("/".join(snapshot.groups()), "/".join(snapshot.groups()))
    path = Path(name).expanduser()
    if not (path.is_dir() or name.startswith((".", "/", "~")) or name.count("/") != 1):
        return PublicName(name, name)
    # resolve(): "." and "runs/.." have no name.
    folder = path.resolve().name
    hub_id = hub_id or _hub_id_in_config(path)
    return PublicName(f"{hub_id} (local folder {folder})" if hub_id else f"local folder {folder}", hub_id, folder)


def _hub_id_in_config(folder: Path) -> str | None:
    """The hub id that a folder's config.json was made from; transformers records it in some versions."""
    try:
        source = parse_json((folder / "config.json").read_text(encoding="utf-8")).get("_name_or_path")
    except (OSError, ValueError, AttributeError):
        return None
    # The recorded name may also be a path on the machine that wrote the file.
    is_hub_id = isinstance(source, str) and HUB_ID.fullmatch(source) and not Path(source).exists()
    return source if is_hub_id else None


def public_source(source: dict) -> str:
    """How a card names a data source (`preflab.data.sources`): a hub id in full, a file or folder by its name."""
    return source["name"] if "revision" in source else Path(source["name"]).resolve().name
