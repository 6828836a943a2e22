"""Everything that a release is made of, checked before a file is written."""

from pathlib import Path

from preflab.models.public_names import PublicName, public_name
from preflab.release.arguments import ReleaseArguments
from preflab.release.base import inherited
from preflab.release.card import Release
from preflab.release.files import has_weights
from preflab.release.results import used
from preflab.reporting.artifacts import RunArtifacts, read_all, select
from preflab.reporting.lineage import lineage
from preflab.reporting.published import read_comparison
from utils.errors import UserError


def gather(name: str, args: ReleaseArguments) -> tuple[Path, Release, list[str]]:
    """(folder of the weights, what is released, which results are left out and why).

    Raises:
        UserError: the run is not finished, weights are missing, or licence, language or the base's hub id is unknown.
    """
    runs = read_all(Path(args.checkpoints), Path(args.eval_out))
    run = select(runs, [name], "--run_name")[0]
    if run.training is None or not run.run.state.startswith("finished"):
        raise UserError(f"--run_name {name}: is not a finished training run ({run.run.state}); finish it first")
    if run.training.stage == "reward_model":
        raise UserError(
            f"--run_name {name}: is a reward model; its folder {run.weights} is complete, with its card:"
            f" `hf upload OWNER/NAME {run.weights}` uploads it"
        )
    weights = run.weights.with_name(f"{name}-merged") if args.merged else run.weights
    if not has_weights(weights):
        fix = "run merge_adapter.py first" if args.merged else "train it again, or name another run"
        raise UserError(f"{weights}: holds no complete weights; {fix}")
    base, folder = base_of(run, args.base_hub_id)
    peft = (weights / "adapter_config.json").exists()
    if base.hub_id is None:
        raise UserError(f"--base_hub_id: the base is the {base.shown}, which others do not have; give its OWNER/NAME")
    if peft and run.training.part("start").get("merged") and not args.base_hub_id:
        raise UserError(
            f"--run_name {name}: its adapter fits a base with another adapter merged into it, not {base.shown}: run"
            " merge_adapter.py and pass --merged, or give the hub id of that merged base with --base_hub_id"
        )
    ensure_system_prompt(weights, args.system)
    shown, left_out = used(run)
    pictures = {"training_curves.png": run.training.picture()}
    release = Release(
        run,
        shown,
        base,
        peft,
        inherited(base, folder, args),
        read_comparison(args.published),
        lineage(runs),
        args,
        {name: path for name, path in pictures.items() if path},
    )
    return weights, release, left_out


def base_of(run: RunArtifacts, hub_id: str | None) -> tuple[PublicName, str]:
    """(the base for readers elsewhere, its name on this machine)."""
    start = run.training.part("start")
    # After a merge the model is a local folder; the hub's base model is the one that was merged into.
    folder = str(start.get("base") or run.training.part("model").get("name"))
    return public_name(folder, hub_id), folder


def ensure_system_prompt(weights: Path, system: str | None) -> None:
    """Raise UserError if the chat template refuses a system prompt."""
    template = weights / "chat_template.jinja"
    if system and template.exists() and "System role not supported" in template.read_text(encoding="utf-8"):
        raise UserError("--system: the model's chat template has no system role; remove the flag")
