"""Text and picture of export_gguf.py."""

from preflab.gguf.files import TYPES
from utils.plots import CHOSEN, SMALL, figure, interval_lengths, name_bars, save
from utils.stage import Report, fits_terminal
from utils.tables import cell, difference, estimate, number
from utils.tables import render as table


@fits_terminal
def render(metrics: dict, files: dict[str, dict], title: str, source: dict, note: str | None = None) -> Report:
    """The tables of all files beside the model that they were made from, with the verdict.

    Args:
        metrics: of `metrics.file_metrics` and `metrics.source_metrics`.
        files: by type: size in bytes, bits per weight, speed, fallback tensors.
        source: the source model's size and speed.
        note: where the pairs are from, if they were not held out.
    """
    changes, levels = table_lines(metrics, files, source)
    notes = [note] if note else []
    fallback = {kind: file["fallback_tensors"] for kind, file in files.items() if file.get("fallback_tensors")}
    if fallback:
        kinds = ", ".join(f"{kind} {count}" for kind, count in fallback.items())
        notes.append(
            f"Tensors in another type than the file's name says, because their rows are not a multiple of 256: {kinds}."
        )
    verdict = verdict_of(metrics, list(files))
    blocks = [table(title, changes), table("model and files", levels), *notes, verdict]
    return Report("\n\n".join(blocks), verdict)


def table_lines(metrics: dict, files: dict[str, dict], source: dict) -> tuple[list[tuple], list[tuple]]:
    """The lines of both tables, their heads first: changes against the model, and the model beside its files."""
    pairs = metrics["ppl_source"]["n"]
    # Without a base model, the model's own likelihood ranks the pairs.
    ranking = "reward_accuracy" if "reward_accuracy_source" in metrics else "likelihood_ranking"
    ranked = ranking.replace("_", " ")
    changes = [
        (f"{pairs} pairs, against the model", "log-prob, nats per answer", "perplexity, ratio", "same preference, %"),
        *(
            (
                kind,
                difference(metrics[f"logp_difference_{kind}"], None, 1, 3),
                estimate(metrics[f"ppl_ratio_{kind}"], 1, 3),
                cell(metrics[f"same_preference_{kind}"], 100),
            )
            for kind in files
        ),
    ]
    levels = [
        ("", "perplexity", f"{ranked}, %", "size, MB", "bits per weight", "scored tokens/s", "answer tokens/s"),
        ("model", cell(metrics["ppl_source"], 1, 3), cell(metrics[f"{ranking}_source"], 100), *figures(source)),
        *(
            (
                kind,
                cell(metrics[f"ppl_{kind}"], 1, 3),
                cell(metrics[f"{ranking}_{kind}"], 100),
                *figures(file),
            )
            for kind, file in files.items()
        ),
    ]
    return changes, levels


def figures(file: dict) -> tuple[str, str, str, str]:
    """Size, bits per weight and both speeds as cells."""
    return (
        number(file["bytes"] / 1e6, 1),
        number(file["bits_per_weight"], 2),
        number(file["scored_tokens_per_second"], 0),
        number(file["answer_tokens_per_second"], 1),
    )


def verdict_of(metrics: dict, kinds: list[str]) -> str:
    """What is equal, and how far the figures move, in two sentences; no claim beyond the measured pairs."""
    # An adapter's file has no vocabulary and no template of its own.
    kinds = [kind for kind in kinds if kind in TYPES]
    ratios = {kind: metrics[f"ppl_ratio_{kind}"]["value"] for kind in kinds}
    same = {kind: metrics[f"same_preference_{kind}"]["value"] for kind in kinds}
    best, worst = min(ratios, key=ratios.get), max(ratios, key=ratios.get)
    lowest = min(same, key=same.get)
    files = "The file has" if len(kinds) == 1 else f"All {len(kinds)} files have"
    spread = f"{100 * (ratios[best] - 1):+.2f}% ({best})"
    spread += f" to {100 * (ratios[worst] - 1):+.2f}% ({worst})" if best != worst else ""
    return (
        f"{files} the model's token ids and chat template. The perplexity of {metrics['ppl_source']['n']} pairs of"
        f" answers changes by {spread}; at least {same[lowest]:.1%} of preferences are the model's own ({lowest})."
    )


def draw(path, metrics: dict, files: dict[str, dict], title: str) -> None:
    """Left: change of perplexity over size. Right: change of the answers' log-probability. Paired 95% intervals."""
    fig, (sizes, changes) = figure(1, 2, title)
    points = {"fmt": "o", "color": CHOSEN, "capsize": 2}
    models = [kind for kind in files if kind in TYPES]
    ratios = [metrics[f"ppl_ratio_{kind}"] for kind in models]
    megabytes = [files[kind]["bytes"] / 1e6 for kind in models]
    sizes.errorbar(megabytes, [m["value"] for m in ratios], yerr=interval_lengths(ratios), **points)
    for x, m, kind in zip(megabytes, ratios, models, strict=True):
        sizes.annotate(kind, (x, m["value"]), textcoords="offset points", xytext=(5, 4), fontsize=SMALL)
    sizes.axhline(1, color="grey", ls=":", lw=1)
    sizes.set(xlabel="file size (MB)", ylabel="perplexity, file / model", title="perplexity of the answers")
    sizes.margins(x=0.2)
    shifts = [metrics[f"logp_difference_{kind}"] for kind in files]
    changes.errorbar([m["value"] for m in shifts], range(len(shifts)), xerr=interval_lengths(shifts), **points)
    name_bars(changes, list(files))
    changes.axvline(0, color="grey", ls=":", lw=1)
    changes.set(xlabel="file - model (nats per answer)", title="log-probability of the answers")
    save(fig, path)
