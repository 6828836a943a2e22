"""The card of the quantised repository, from the template in this folder."""

from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from preflab.gguf.files import TYPES
from preflab.gguf.verify import SPEED_PROMPT
from preflab.models.public_names import PublicName
from utils.markdown import code_block, code_span, escaped, visible
from utils.stage import Report
from utils.tables import cell, markdown_table, number

TEMPLATE = Path(__file__).with_name("gguf_card.md.jinja")


def gguf_card(
    name: str,
    source: str,
    model: str | None,
    base: PublicName | None,
    metrics: dict,
    files: dict[str, dict],
    checked: dict,
    tools: dict,
    template_written: bool,
    report: Report,
    run: dict,
) -> str:
    """The card of a folder of GGUF files.

    Args:
        name: of the run; file names start with it.
        source: the model that was exported, in words.
        model: its hub id, None where it is not published.
        base: the model that it was trained from.
        files: by type, as in gguf.json.
        checked: of `verify.ensure_same_text`.
        tools: versions of what wrote the files.
        template_written: whether the Modelfile has the chat template.
        run: the `run` section of the summary.
    """
    hub_id = model or (base.hub_id if base else None)
    data = ModelCardData(
        base_model=hub_id,
        # The hub knows four relations; files of a model that is not published are relatives of its base.
        base_model_relation=("quantized" if model else "finetune") if hub_id else None,
        library_name="gguf",
        pipeline_tag="text-generation",
        tags=["gguf", "llama.cpp", "ollama", "preference-tuning"],
        model_name=visible(name),
    )
    # The last file of a model is the smallest; an adapter's file does not answer alone.
    example = [kind for kind in files if kind in TYPES][-1]
    lines = [["file", "MB", "bits per weight", "perplexity", "same preference, %"]]
    lines += [
        [
            code_span(file["file"]),
            number(file["bytes"] / 1e6, 1),
            number(file["bits_per_weight"], 2),
            cell(metrics[f"ppl_{kind}"], 1, 3),
            cell(metrics[f"same_preference_{kind}"], 100),
        ]
        for kind, file in files.items()
    ]
    card = ModelCard.from_template(
        card_data=data,
        template_path=str(TEMPLATE),
        name=escaped(name),
        source=escaped(source),
        files=markdown_table(lines),
        pairs=metrics["ppl_source"]["n"],
        example=files[example]["file"],
        example_kind=example,
        ollama_name=name.lower(),
        template_written=template_written,
        stops=", ".join(map(code_span, checked["end_tokens"])) or "no further tokens",
        question=SPEED_PROMPT,
        answer=code_block(files[example]["answer"]) if files[example]["answer"] else None,
        checked=checked,
        # xllamacpp numbers its versions by year, month and llama.cpp's build.
        build=tools["xllamacpp"].rpartition(".")[2],
        table=code_block(report.text),
        run=run,
    )
    return str(card).rstrip() + "\n"
