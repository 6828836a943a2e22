"""Uploads of a run's weights to the hub, while it trains and at its end, under transformers' keys (--push_to_hub).

transformers would upload the folder of the run, with run.json (paths of this machine), the held-out rows and pickled
arguments. Here a repository gets weights, settings, tokenizer and model card; with --hub_strategy checkpoint or
all_checkpoints also the checkpoints, from which training can be resumed.
"""

import sys
from pathlib import Path

from transformers import TrainerCallback
from transformers.trainer_utils import HubStrategy

from preflab.evaluation.runs import checkpoints
from preflab.models.public_names import public_name
from preflab.models.weight_files import SMALL, WEIGHTS, matches
from utils.artifacts import dumps, read_json
from utils.errors import UserError, first_line, is_main_process
from utils.hub import upload_errors

# Pickled by transformers, with paths of this machine; no resume reads it.
PRIVATE = "training_args.bin"


class HubUploads(TrainerCallback):
    """Uploads in the background after each save; a failed one is reported, and training continues."""

    def __init__(self, config, base: str):
        """Take the settings of a run.

        Args:
            config: its RunConfig, after its name was chosen.
            base: the model that it trains, for adapter_config.json.
        """
        self.repository = config.hub_model_id or config.run_name
        self.strategy = HubStrategy(config.hub_strategy)
        self.always, self.private = config.hub_always_push, config.hub_private_repo
        self.base = public_name(base, config.base_hub_id)
        self.jobs = []

    @property
    def flag(self) -> str:
        """The flag with its repository, for messages."""
        return f"--push_to_hub {self.repository}"

    def create(self) -> None:
        """Create the repository if there is none. Rank 0 only.

        Raises:
            UserError: no access, or no network.
        """
        from huggingface_hub import HfApi

        with upload_errors(self.flag, "the same command tries again"):
            made = HfApi().create_repo(self.repository, private=self.private, exist_ok=True)
        # With the owner, where only a name was given.
        self.repository = made.repo_id

    def on_save(self, args, state, control, **kwargs):
        """Upload the newest checkpoint, unless the last upload still runs (--hub_always_push: then too)."""
        if not is_main_process() or self.strategy == HubStrategy.END:
            return
        self._report_failures()
        if self.jobs and not self.always:
            return
        folder = checkpoints(args.output_dir)[0]
        files = self._public_files(folder)
        if self.strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            place = "last-checkpoint" if self.strategy == HubStrategy.CHECKPOINT else folder.name
            inside = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != PRIVATE]
            files |= {f"{place}/{path.relative_to(folder).as_posix()}": path for path in inside}
        self._start(files, f"Training in progress, step {state.global_step}", background=True)

    def finish(self, folder: Path) -> str:
        """Upload the finished weights and their card, after all earlier uploads. Rank 0 only.

        Returns:
            A sentence for the user.

        Raises:
            UserError: the upload failed; the run itself is finished.
        """
        for job in self.jobs:
            # Waits; the reason is reported below.
            job.exception()
        self._report_failures()
        with upload_errors(self.flag, f"the run is finished; upload it with `hf upload {self.repository} {folder}`"):
            self._start(self._public_files(folder), "End of training", background=False)
        return f"uploaded to {self.repository}"

    def _public_files(self, folder: Path) -> dict[str, Path | bytes]:
        """{name in the repository: file or content} of a folder of weights."""
        names = (*WEIGHTS, *SMALL, "README.md")
        files = {p.name: p for p in sorted(folder.iterdir()) if p.is_file() and matches(p.name, names)}
        if "adapter_config.json" in files and self.base.hub_id:
            config = read_json(files["adapter_config.json"]) | {"base_model_name_or_path": self.base.hub_id}
            files["adapter_config.json"] = f"{dumps(config)}\n".encode()
        return files

    def _start(self, files: dict[str, Path | bytes], message: str, background: bool) -> None:
        from huggingface_hub import CommitOperationAdd, HfApi

        add = [CommitOperationAdd(name, str(f) if isinstance(f, Path) else f) for name, f in files.items()]
        commit = {"repo_id": self.repository, "operations": add, "commit_message": message}
        if background:
            self.jobs.append(HfApi().create_commit(**commit, run_as_future=True))
        else:
            HfApi().create_commit(**commit)

    def _report_failures(self) -> None:
        """Name the uploads that failed, and forget all that have ended."""
        for job in [job for job in self.jobs if job.done()]:
            self.jobs.remove(job)
            try:
                with upload_errors(self.flag, "training continues, and the next save is uploaded again"):
                    job.result()
            except UserError as error:
                print(f"\nwarning: {error}", file=sys.stderr)
            # A checkpoint that was deleted while it was sent, for example.
            except Exception as error:
                print(f"\nwarning: {self.flag}: {first_line(error)}; training continues", file=sys.stderr)
