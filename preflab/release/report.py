"""The printed report of a release."""

from pathlib import Path

from preflab.release.card import Release
from preflab.reporting.stages import title_of
from utils.stage import Report, fits_terminal
from utils.tables import paragraphs


@fits_terminal
def render(folder: Path, release: Release, left_out: list[str], files: str) -> Report:
    """Files with sizes, stages in the card, and what is not in it."""
    stages = ", ".join(title_of(artifact) for artifact in release.shown) or "none"
    verdict = f"{folder.name} is ready to upload; the card has figures of: {stages}."
    lines = [f"not in the card: {reason}" for reason in left_out]
    if release.args.push and release.args.dry_run:
        lines.append("Nothing was uploaded (dry run): --no_dry_run uploads the folder.")
    return Report("\n\n".join([files, paragraphs(verdict), *map(paragraphs, lines)]), verdict)
