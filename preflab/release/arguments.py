"""Flags of release.py. Scripts import this for --help, so it imports neither torch nor transformers."""

import re
from dataclasses import dataclass

from utils.cli import option
from utils.errors import UserError
from utils.markdown import visible

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass
class ReleaseArguments:
    """Keys of release.py."""

    run_name: str | None = option("Run to release (default: the one that finished last).")
    checkpoints: str = option("Folder of the training runs.", "checkpoints")
    eval_out: str = option("Folder of the results.", "eval_out")
    release_dir: str | None = option("Folder of the release (default: <checkpoints>/<run_name>-release).")
    merged: bool = option("Release the folder that merge_adapter.py wrote, not the adapter.", False)
    base_hub_id: str | None = option("Hub id of a base model that is a local folder.")
    license: str | None = option("Licence, as the hub's id (default: the base's).")
    language: list[str] | None = option("Languages, as ISO codes (default: the base's).")
    family: list[str] | None = option("Related repositories, LABEL=OWNER/NAME each.")
    tracker: str | None = option("Address of the run in an experiment tracker.")
    system: str | None = option("System prompt of the usage example.")
    temperature: float = option("Sampling of the usage example; 0: greedy only.", 0.7)
    top_k: int = option("Sampling of the usage example.", 50)
    top_p: float = option("Sampling of the usage example.", 0.95)
    published: str = option("Published rows of the comparison table.", "configs/published/comparison.yaml")
    push: str | None = option("Repository on the hub, OWNER/NAME, to upload the folder to.")
    dry_run: bool = option("Of --push: only list files and sizes; --no_dry_run uploads.", True)
    private: bool = option("Of --push: make a new repository private.", False)
    seed: int = option("Recorded in the summary; nothing here is random.", 42)

    def check(self) -> None:
        """Raise UserError for contradicting flags and values out of range."""
        for flag in ("push", "base_hub_id"):
            value = getattr(self, flag)
            if value is not None and not REPOSITORY.fullmatch(value):
                raise UserError(f"--{flag} {visible(value)}: must be OWNER/NAME of letters, digits, . _ -")
        if not self.push and (not self.dry_run or self.private):
            raise UserError("--no_dry_run and --private need --push OWNER/NAME")
        if self.temperature < 0:
            raise UserError(f"--temperature {self.temperature}: must be at least 0")
        if self.top_k < 0:
            raise UserError(f"--top_k {self.top_k}: must be at least 0 (0: all tokens)")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top_p {self.top_p}: must be above 0 and at most 1")
        if self.tracker is not None and not re.fullmatch(r"https?://[^\s<>()@]+", self.tracker):
            raise UserError(f"--tracker {visible(self.tracker)}: must be an http(s) address without a login")
        self.related()

    def related(self) -> dict[str, str]:
        """`{label: repository}` of --family. Raises UserError for an entry of another form."""
        related = {}
        for entry in self.family or []:
            label, _, repository = entry.partition("=")
            if not label.strip() or not REPOSITORY.fullmatch(repository):
                raise UserError(f"--family {visible(entry)}: must be LABEL=OWNER/NAME, e.g. GGUF=me/my-model-GGUF")
            related[label] = repository
        return related
