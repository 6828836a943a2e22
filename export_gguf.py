"""Export a model as GGUF files for llama.cpp and Ollama, each verified before it gets its name.

    bash install_gguf.sh                                   # once: llama.cpp and its tools
    python export_gguf.py                                  # the latest run: F16, Q8_0 and Q4_K_M
    python export_gguf.py --run_name gemma-2b-it-dpo --types Q8_0 Q5_K_M Q4_K_M
    python export_gguf.py --tuned_model FOLDER --dataset_name my_pairs.jsonl
    python export_gguf.py --run_name gemma-2b-it-dpo --lora    # the adapter as GGUF, too

An adapter is merged into its base first. Every file is compared with the model that it was made
from: token ids of 200 prompts and the chat template must be equal, and log-probabilities of
held-out answers (of shipped ones, where the run held none out) equal up to rounding in F32, F16 and
BF16. For all types, perplexity, reward accuracy, preferences, size and speed are measured. The
files go to checkpoints/<run_name>-gguf/, with the tokenizer, an Ollama Modelfile and a model card;
gguf.json, gguf_rows.jsonl and gguf.png to eval_out/<run_name>/.

The keys that matter (flags and YAML keys are the same, the command line wins; [x] is the default;
--help_all lists every key, --help_all WORD those about WORD):

  --run_name NAME | --base_model ID --adapter_path FOLDER | --tuned_model ID   --list (all runs)
  --types TYPE ...      F32 F16 BF16 Q8_0 Q6_K Q5_K_M Q5_K_S Q4_K_M Q4_K_S Q4_0 Q3_K_L Q3_K_M
                        Q3_K_S Q2_K (default: F16 Q8_0 Q4_K_M)
  --lora                also convert the adapter, for use on a GGUF of its base
  --gguf_dir FOLDER     folder of the files (default: <checkpoints>/<run_name>-gguf)
  --model_hub_id ID     hub id of the exported model, for the card
  --dataset_name ID|FILE|FOLDER   --split NAME   --limit N   pairs to compare on
  --overwrite           replace earlier files

After an interruption, the same command continues. In eval_win_rate.py and eval_perplexity.py, a
file is a model named gguf:FILE.
"""

from dataclasses import dataclass
from pathlib import Path

from preflab.evaluation.arguments import ComparisonArguments
from preflab.evaluation.run_list import print_runs
from utils.cli import option
from utils.errors import UserError, run
from utils.stage import start


@dataclass
class GgufArguments:
    """Arguments of this script."""

    types: list[str] | None = option("Types of the files (default: F16 Q8_0 Q4_K_M).")
    lora: bool = option("Also convert the adapter itself.", False)
    gguf_dir: str | None = option("Folder of the files (default: <checkpoints>/<run_name>-gguf).")
    model_hub_id: str | None = option("Hub id under which the exported model is published, for the model card.")
    base_hub_id: str | None = option("Hub id of a base model that is a local folder, for the model card.")


def main():
    stage, args, gguf_args = start("gguf", __doc__, ComparisonArguments, GgufArguments, listing=print_runs)

    # Heavy imports only now: --help is answered before torch is imported.
    from preflab.evaluation.comparison import resolve
    from preflab.gguf.card import gguf_card
    from preflab.gguf.export import Export
    from preflab.gguf.files import chosen_types
    from preflab.gguf.report import draw, render
    from preflab.gguf.source import base_of_merged, exported_name
    from preflab.models.llama_cpp import require_tools
    from preflab.models.public_names import public_name
    from utils.artifacts import write_text
    from utils.provenance import run_record

    # Arguments, then tools, before anything is loaded.
    types = chosen_types(gguf_args.types)
    if args.base_run:
        raise UserError("--base_run: only one run is exported; name it with --run_name")
    if args.tuned_model and not args.base_model and not (Path(args.tuned_model) / "run.json").exists():
        # A complete model of unknown origin has no rewards; its own likelihood ranks the pairs.
        args.base_model = base_of_merged(args.tuned_model) or args.tuned_model
    chooses_pairs = args.dataset_name is not None
    comparison = resolve(args)
    comparison.hold(comparison.path("gguf", ".json"))
    if gguf_args.lora and not comparison.adapter:
        raise UserError(f"--lora: {comparison.tuned} is a complete model, so there is no adapter to convert")
    require_tools()

    # Merge, write each file, verify it, and give it its name.
    folder = Path(gguf_args.gguf_dir or Path(args.checkpoints) / f"{comparison.name}-gguf")
    export = Export(comparison, folder, chooses_pairs)
    export.measure_source()
    for kind in types:
        export.add(kind)
    if gguf_args.lora:
        export.add_adapter()

    # Figures, then Modelfile, card and summary.
    metrics, files = export.metrics(), export.files
    title = f"{comparison.name}: GGUF files beside the model ({export.models.dtype})"
    report = render(metrics, files, title, export.source, export.note)
    base = None if comparison.base == comparison.tuned else public_name(comparison.base, gguf_args.base_hub_id)
    names = comparison.name, exported_name(comparison, base), gguf_args.model_hub_id, base
    written, modelfile = export.modelfile(list(files)[-1])
    made = report, run_record(args.seed, stage.seconds)
    card = gguf_card(*names, metrics, files, export.checked, export.tools, written, *made)
    write_text(export.folder.path / "Modelfile", modelfile)
    write_text(export.folder.path / "README.md", card)
    stage.publish(
        comparison.path("gguf", ".json"),
        export.models.describe(),
        metrics,
        report,
        run={"run_name": comparison.name, "limit": args.limit},
        seed=args.seed,
        rows=export.rows(),
        figure=lambda path: draw(path, metrics, files, title),
        gguf=files,
        folder=str(export.folder.path),
        source=export.source,
        checked=export.checked,
        modelfile={"template": written, "text": modelfile},
        tools=export.tools,
        data=export.data.summary(),
    )
    # Last: an interrupted call continues from it.
    export.folder.close()


if __name__ == "__main__":
    run(main, "give --dtype bfloat16, or compare on fewer pairs with --limit; finished files are used again")
