"""Flags of report.py. Scripts import this for --help, so it imports neither torch nor transformers."""

from dataclasses import dataclass

from utils.cli import option
from utils.errors import UserError


@dataclass
class ReportArguments:
    """Keys of report.py."""

    runs: list[str] | None = option("Runs to report (default: all).")
    compare: list[str] | None = option("Runs to compare with the baseline, by paired differences from their rows.")
    baseline: str | None = option("Run that --compare compares with (default: the first run of --compare).")
    status: bool = option(
        "Print what ran, what is stale, what to run next and what uses the disk; write no file.", False
    )
    checkpoints: str = option("Folder of the training runs.", "checkpoints")
    eval_out: str = option("Folder of the results.", "eval_out")
    output_dir: str | None = option("Folder of the report (default: --eval_out).")
    answers: int = option("Prompts shown side by side, per stage of a run.", 100)
    published: str = option("Published rows of the comparison table.", "configs/published/comparison.yaml")
    seed: int = option("Seed of the bootstrap of --compare.", 42)

    def check(self) -> None:
        """Raise UserError for contradicting flags and values out of range."""
        if self.answers < 0:
            raise UserError(f"--answers {self.answers}: must be at least 0")
        if self.baseline and not self.compare:
            raise UserError("--baseline needs --compare: name the runs to compare with it")
        for flag in ("compare", "runs"):
            names = getattr(self, flag)
            if names == []:
                raise UserError(f"--{flag}: give at least one run")
            if names and len(set(names)) < len(names):
                twice = next(name for name in names if names.count(name) > 1)
                raise UserError(f"--{flag}: {twice} is named twice; name it once")
        if self.compare and not self.others():
            raise UserError("--compare: give at least two runs, or one and another --baseline")
        if self.status and (self.compare or self.output_dir):
            raise UserError("--status prints only: remove --compare and --output_dir")

    def baseline_name(self) -> str:
        """The run that the others are compared with."""
        return self.baseline or self.compare[0]

    def others(self) -> list[str]:
        """The compared runs without the baseline."""
        return [name for name in self.compare if name != self.baseline_name()]
