"""AlpacaEval's files: references, model outputs, annotations, and what is made of them to be read."""

from pathlib import Path

from preflab.data.prompts import Prompt
from preflab.data.rows import read_rows
from preflab.judging.judge_prompt import Item, Verdict
from preflab.judging.judges import judge_all
from utils.artifacts import dumps, read_json, write_json, write_text
from utils.errors import UserError
from utils.provenance import sha256_of


def read_reference(name: str, limit: int | None = None) -> list[dict]:
    """Instructions with their reference answers: `{instruction, output, generator, dataset, where}` each.

    Raises UserError for a row without either, for an instruction that stands twice, and for an empty set.
    """
    rows, _ = read_rows(name, "eval")
    found, seen = [], {}
    for where, row in rows[:limit]:
        for key in ("instruction", "output"):
            if not isinstance(row, dict) or not isinstance(row.get(key), str) or not row[key].strip():
                raise UserError(f"{where}: no text under {key!r}; a reference row has instruction and output")
        if row["instruction"] in seen:
            raise UserError(f"{where}: the instruction of {seen[row['instruction']]} stands there again; drop one")
        seen[row["instruction"]] = where
        generator, dataset = row.get("generator") or "reference", row.get("dataset") or "unknown"
        named = {"generator": generator, "dataset": dataset, "category": row.get("category"), "where": where}
        found.append({"instruction": row["instruction"], "output": row["output"], **named})
    return found


def about(path: Path) -> dict:
    """What made a file, kept beside it as `<stem>.about.json`; empty for a file from elsewhere."""
    beside = path.with_suffix(".about.json")
    return read_json(beside) if beside.exists() else {}


def outputs_hash(rows: list[dict]) -> str:
    """What identifies a model's outputs: instructions and answers, in any order."""
    return sha256_of(*sorted(dumps([row["instruction"], row["output"]]) for row in rows))


def write_outputs(folder: Path, name: str, generator: str, reference: list[dict], answers: list[dict], made_by: dict):
    """model_outputs_<name>.json in alpaca_eval's format, and what made them in model_outputs_<name>.about.json."""
    rows = [
        {
            "instruction": row["instruction"],
            "output": answer["text"],
            "generator": generator,
            "dataset": row["dataset"],
            "tokens": answer["tokens"],
            "finish_reason": answer["finish_reason"],
        }
        for row, answer in zip(reference, answers, strict=True)
    ]
    write_json(folder / f"model_outputs_{name}.json", rows)
    write_json(folder / f"model_outputs_{name}.about.json", {**made_by, "outputs_sha256": outputs_hash(rows)})


def read_outputs(folder: Path, name: str, reference: list[dict], made_by: dict | None = None) -> list[dict]:
    """The outputs of model_outputs_<name>.json in the reference's order.

    Args:
        made_by: what this call's models and settings would write; a file that another model wrote is refused. A file
            without a word on its origin (the user's own outputs) is taken as it is.

    Raises:
        UserError: where the file is missing, another model's, holds an instruction twice, or lacks some.
    """
    path = folder / f"model_outputs_{name}.json"
    wrote = about(path)
    changed = [k for k, v in (made_by or {}).items() if wrote and wrote.get(k) != v]
    if changed:
        raise UserError(
            f"{path} was made by another model or with other settings ({', '.join(changed)}): --stage generate makes it"
            " anew"
        )
    if not path.exists():
        raise UserError(f"{path}: no such file; --stage generate makes it")
    by_text = {}
    for k, row in enumerate(read_json(path)):
        if (
            not isinstance(row, dict)
            or not isinstance(row.get("instruction"), str)
            or not isinstance(row.get("output"), str)
        ):
            raise UserError(f"{path} row {k}: needs instruction and output as text")
        if row["instruction"] in by_text:
            raise UserError(f"{path} row {k}: an instruction stands twice: {row['instruction'][:60]!r}")
        by_text[row["instruction"]] = row
    missing = [row["instruction"] for row in reference if row["instruction"] not in by_text]
    if missing:
        raise UserError(
            f"{path}: lacks {len(missing)} of the reference's {len(reference)} instructions (first:"
            f" {missing[0][:60]!r}); --stage generate --overwrite makes them anew, --reference names another set"
        )
    return [by_text[row["instruction"]] for row in reference]


# ------------------------------------------------------------------------------------------------------- annotations


def annotate(
    judge, reference: list[dict], outputs: list[dict], order: str, eval_out: str, overwrite=False
) -> list[dict]:
    """Annotations in alpaca_eval's format: preference in [1, 2], above 1.5 where output_2 (the model's) is better.

    Args:
        order: "package" shows the outputs in alpaca-eval's own random order, "both" takes the mean of both orders.
    """
    from preflab.alpacaeval.package import is_switched

    items, asked = [], []
    for row, answer in zip(reference, outputs, strict=True):
        prompt = Prompt([{"role": "user", "content": row["instruction"]}], row["where"])
        if getattr(judge, "orders_itself", False):
            orders = [False]
        else:
            orders = [False, True] if order == "both" else [is_switched(row["instruction"])]
        for switched in orders:
            pair = (answer["output"], row["output"]) if switched else (row["output"], answer["output"])
            items.append(Item(prompt, *pair))
        asked.append(orders)
    verdicts = iter(judge_all(judge, items, eval_out, overwrite))
    found = []
    for row, answer, orders in zip(reference, outputs, asked, strict=True):
        mine = [next(verdicts) for _ in orders]
        preferences = [preference(v, switched, judge) for v, switched in zip(mine, orders, strict=True)]
        known = None not in preferences
        found.append(
            {
                "instruction": row["instruction"],
                "output_1": row["output"],
                "generator_1": row["generator"],
                "dataset": row["dataset"],
                "category": row["category"],
                "output_2": answer["output"],
                "generator_2": answer.get("generator", "model"),
                "finish_reason": answer.get("finish_reason"),
                "annotator": judge.name,
                "preference": sum(preferences) / len(preferences) if known else None,
                "orders": [
                    {"is_switched_outputs": s, "preference": p, "mass": v.mass, "error": v.error}
                    for s, p, v in zip(orders, preferences, mine, strict=True)
                ],
            }
        )
    return found


def preference(verdict: Verdict, switched: bool, judge) -> float | None:
    """One verdict as alpaca_eval's preference: 1 where output_1 is better, 2 where output_2 is.

    Judges that tell a probability are weighted, as in AlpacaEval 2: 2 - P(first) where output_1 stands first. A reward
    model's probabilities are of its own scale, so only its order counts.
    """
    if verdict.first is None:
        return None
    weighted = verdict.probability is not None and not judge.name.startswith("rm:")
    first = verdict.probability if weighted else verdict.first
    return 1 + first if switched else 2 - first


def write_annotations(folder: Path, name: str, annotations: list[dict], made_by: dict) -> None:
    """annotations_<name>.json, and what made it in annotations_<name>.about.json.

    Args:
        made_by: judge, order, hashes of the outputs and of the reference, seconds.
    """
    write_json(folder / f"annotations_{name}.json", annotations)
    write_json(folder / f"annotations_{name}.about.json", made_by)


def ensure_same_judge(folder: Path, names: list[str], audit: dict | None) -> None:
    """Raise UserError where the folder's annotations are of different judges, orders, references or outputs."""
    made = {name: about(folder / f"annotations_{name}.json") for name in names}
    first = made[names[0]]
    for name, found in made.items():
        side = name.split("_")[0]
        for key in ("order", "reference_sha256", *(() if name != side else ("judge",))):
            if found.get(key) != first.get(key):
                raise UserError(
                    f"{folder}/annotations_{name}.json: another {key.removesuffix('_sha256')} than that of"
                    f" annotations_{names[0]}.json: --stage judge judges both alike"
                )
        outputs = about(folder / f"model_outputs_{side}.json").get("outputs_sha256")
        if outputs and found.get("outputs_sha256") != outputs:
            raise UserError(
                f"{folder}/annotations_{name}.json judges other answers than model_outputs_{side}.json holds: --stage"
                " judge judges these"
            )
    if audit and audit.get("identity") != first.get("judge"):
        raise UserError(f"{folder}/judge_audit.json audits another judge: --stage judge audits this one")


def read_annotations(path: Path) -> list[dict]:
    """A list of annotations in alpaca_eval's format, ours or the package's. Raises UserError naming file and row.

    0 and NaN, the package's old tie and its missing verdict, become 1.5 and None.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file; --stage judge makes it")
    rows = read_json(path)
    if not isinstance(rows, list) or not rows:
        raise UserError(f"{path}: expected a list of annotations")
    seen = set()
    for k, row in enumerate(rows):
        for key in ("instruction", "output_1", "output_2"):
            if not isinstance(row, dict) or not isinstance(row.get(key), str):
                raise UserError(f"{path} row {k}: no text under {key!r}; is it an annotations.json of alpaca_eval?")
        if row["instruction"] in seen:
            raise UserError(f"{path} row {k}: an instruction is judged twice: {row['instruction'][:60]!r}")
        seen.add(row["instruction"])
        value = row.get("preference")
        value = 1.5 if value == 0 else value
        # alpaca-eval caches a failed judgement as -1.
        if value is None or value != value or value == -1:
            row["preference"] = None
        elif isinstance(value, bool) or not isinstance(value, (int, float)) or not 1 <= value <= 2:
            raise UserError(f"{path} row {k}: preference must lie in [1, 2], found {value!r}")
        else:
            row["preference"] = float(value)
        row.setdefault("annotator", "unknown")
        row.setdefault("generator_1", "reference")
        row.setdefault("generator_2", "model")
    return rows


# ------------------------------------------------------------------------------------------------------- to be read


def write_samples(path: Path, sides: dict[str, list[dict]], count: int = 20) -> None:
    """Side-by-sides of instruction, reference, base and tuned, evenly over the set, with the judge's preferences."""
    total = len(sides["base"])
    parts = [
        "# Answers side by side\n\nPreference: 1 for the reference, 2 for the model's answer, as the judge said.\n"
    ]
    for k in sorted({round(i * (total - 1) / max(1, count - 1)) for i in range(min(count, total))}):
        rows = {name: found[k] for name, found in sides.items()}
        parts.append(f"---\n\n**Instruction.** {rows['base']['instruction']}\n")
        parts.append(f"**Reference** ({rows['base']['generator_1']}).\n\n{rows['base']['output_1']}\n")
        for name, row in rows.items():
            said = "no verdict" if row["preference"] is None else f"{row['preference']:.2f}"
            parts.append(f"**{name}** (preference {said}).\n\n{row['output_2']}\n")
    write_text(path, "\n".join(parts))


def write_llm_comparator(path: Path, annotations: list[dict]) -> None:
    """The tuned model (A) against the reference (B) in the format of PAIR's LLM Comparator: scores in [-1.5, 1.5]."""
    examples = []
    for row in annotations:
        if row["preference"] is None:
            continue
        raters = [
            {
                "score": 3 * (order["preference"] - 1.5),
                # A is the model's answer: where the package switched, it stood first, as here.
                "is_flipped": not order["is_switched_outputs"],
                "rating_label": "A" if order["preference"] > 1.5 else "B" if order["preference"] < 1.5 else "same",
                "rationale": "",
            }
            for order in row.get("orders", [])
        ]
        examples.append(
            {
                "input_text": row["instruction"],
                "tags": [row["category"]] if row.get("category") else [],
                "output_text_a": row["output_2"],
                "output_text_b": row["output_1"],
                "score": 3 * (row["preference"] - 1.5),
                "individual_rater_scores": raters,
                "custom_fields": {},
            }
        )
    first = annotations[0]
    content = {
        "metadata": {"source_path": path.name, "custom_fields_schema": []},
        "models": [{"name": first["generator_2"]}, {"name": first["generator_1"]}],
        "examples": examples,
    }
    write_text(path, dumps(content) + "\n")
