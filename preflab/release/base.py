"""What a release inherits from its base model: licence and languages, from the base's own card."""

from pathlib import Path

from preflab.models.loading import BUILTIN, BUILTIN_CARD
from preflab.models.public_names import PublicName
from preflab.release.arguments import ReleaseArguments
from utils.errors import UserError
from utils.hub import fetch
from utils.markdown import visible

INHERITED = ("license", "license_name", "license_link", "language")


def inherited(base: PublicName, folder: str, args: ReleaseArguments) -> dict:
    """`{license, license_name, license_link, language}` of the release; the flags win over the base's card.

    Args:
        base: the base model as the card names it.
        folder: the base as it was loaded, perhaps a local folder.

    Raises:
        UserError: one of licence and language is in neither. Names the flags.
    """
    given = {key: getattr(args, key) for key in ("license", "language") if getattr(args, key)}
    if base.shown == BUILTIN:
        data, why = BUILTIN_CARD, ""
    else:
        data, why = ({}, "") if len(given) == 2 else base_card(base, folder)
    if "license" in given:
        # The name and the link belong to the base's licence.
        data = {key: value for key, value in data.items() if not key.startswith("license")}
    data = data | given
    missing = [key for key in ("license", "language") if not data.get(key)]
    if missing:
        example = {"license": "--license apache-2.0", "language": "--language en"}
        raise UserError(
            f"{', '.join(f'--{key}' for key in missing)}: not known for the base {visible(base.shown)} ({why});"
            f" give it, e.g. {' '.join(example[key] for key in missing)}"
        )
    return {key: data[key] for key in INHERITED if data.get(key)}


def base_card(base: PublicName, folder: str) -> tuple[dict, str]:
    """(metadata of the base's card, why something may be missing from it)."""
    from huggingface_hub import ModelCard

    local = Path(folder).expanduser() / "README.md"
    path, why = (local, f"{visible(local.name)} of its folder does not have it") if local.is_file() else (None, "")
    if path is None and base.hub_id:
        try:
            path, why = fetch(base.hub_id, "README.md", "model"), "its card on the hub does not have it"
        except UserError as error:
            why = str(error).partition(": check")[0]
    data = {}
    if path:
        try:
            metadata = ModelCard.load(path, ignore_metadata_errors=True).data.to_dict()
            data = {key: metadata[key] for key in INHERITED if metadata.get(key)}
        except (ValueError, OSError, TypeError) as error:
            why = f"its card cannot be read: {type(error).__name__}"
    return data, why or "it has no card"
