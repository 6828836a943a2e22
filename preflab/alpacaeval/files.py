"""AlpacaEval's files: reference answers, model outputs, annotations, side-by-side samples and LLM Comparator input."""

from pathlib import Path

from preflab.alpacaeval.package import is_switched
from preflab.data.files import read_file
from preflab.data.messages import check_unicode
from preflab.data.prompts import PROMPT_KEYS, Prompt, prompt_messages
from preflab.data.rows import read_rows
from preflab.judging.judge_prompt import Item, Verdict
from preflab.judging.judges import judge_all
from utils.artifacts import dumps, read_json, write_json
from utils.errors import UserError
from utils.provenance import sha256_of, sha256_of_files
from utils.tables import answer_label, side_by_side


def read_reference(name: str, limit: int | None = None) -> list[dict]:
    """Instructions with reference answers: instruction, messages, output, generator, dataset, category, source.

    `messages` are the turns that the models answer: the instruction with its `input`, after a system prompt and earlier
    turns where the row has them. `instruction` is all of it as one text (`Prompt.text`): alpaca_eval's files and judge
    prompts have one field for it.

    Raises UserError for a row without a prompt or an output, for a duplicate instruction, and for an empty set.
    """
    rows, _ = read_rows(name, "eval")
    reference, source_of = [], {}
    # In file order, unlike alpaca_eval's max_instances, which shuffles first.
    for source, row in rows[:limit]:
        prompt, output = _prompt_of(row, source), row.get("output")
        if not isinstance(output, str) or not output.strip():
            raise UserError(f"{source}: no text under 'output'; a reference row needs a prompt and its output")
        check_unicode([output], source)
        # Files are joined by instruction text, so it must identify a row.
        if prompt.text in source_of:
            raise UserError(f"{source}: duplicate instruction, first in {source_of[prompt.text]}; remove one of them")
        source_of[prompt.text] = source
        reference.append(
            {
                "instruction": prompt.text,
                "messages": prompt.messages,
                "output": output,
                "generator": row.get("generator") or "reference",
                "dataset": row.get("dataset") or "unknown",
                "category": row.get("category"),
                "source": source,
            }
        )
    return reference


def _prompt_of(row, source: str) -> Prompt:
    """The turns of a row of a reference or of model outputs. Raises UserError for a row without a prompt."""
    # alpaca_eval's key goes before all others: what else its rows hold is not the prompt.
    messages = prompt_messages(row, source, ("instruction", *PROMPT_KEYS))
    if isinstance(messages, str):
        raise UserError(f"{source}: no text under 'instruction'; a row needs a prompt and its output")
    return Prompt(messages, source)


# ----------------------------------------------------------------------------------------------------- model outputs


def read_origin(path: Path) -> dict:
    """What made a file, from `<stem>.about.json` beside it; empty for a file that another tool wrote."""
    about = path.with_suffix(".about.json")
    return read_json(about) if about.exists() else {}


def outputs_hash(rows: list[dict]) -> str:
    """Hash of instructions and answers, whatever their order."""
    # Answers only: generator names and token counts do not change a judgement.
    return sha256_of(*sorted(dumps([row["instruction"], row["output"]]) for row in rows))


def ensure_outputs_may_be_replaced(folder: Path, overwrite: bool) -> None:
    """Raise UserError where generating would replace outputs that were edited, or that another tool wrote."""
    for path in sorted(folder.glob("model_outputs_*.json")) if not overwrite else ():
        if not path.name.endswith(".about.json") and outputs_hash(_rows(path)) != read_origin(path).get(
            "outputs_sha256"
        ):
            raise UserError(
                f"{path}: edited, or not written by this script; judge these outputs with --stage judge, or replace"
                " them with --overwrite"
            )


def _rows(path: Path) -> list[dict]:
    """The rows of a model_outputs file. Raises UserError, naming the row, for one without instruction and output."""
    rows = []
    for source, row in read_file(path):
        # Outputs that another tool wrote may have the other columns of the reference.
        instruction = _prompt_of(row, source).text
        if not isinstance(row.get("output"), str):
            raise UserError(f"{source}: needs instruction and output as text")
        check_unicode([row["output"]], source)
        rows.append({**row, "instruction": instruction, "source": source})
    return rows


def write_outputs(folder: Path, name: str, generator: str, reference: list[dict], answers: list[dict], origin: dict):
    """Write model_outputs_<name>.json in alpaca_eval's format and its origin as model_outputs_<name>.about.json."""
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
    # In a separate file, because alpaca_eval's format has no place for it.
    write_json(folder / f"model_outputs_{name}.about.json", {**origin, "outputs_sha256": outputs_hash(rows)})


def read_outputs(folder: Path, name: str, reference: list[dict], expected: dict | None = None) -> list[dict]:
    """The outputs in model_outputs_<name>.json, in the reference's order.

    Args:
        expected: the origin that this call's models and settings would record. It is compared where the file has an
            origin; the user's own outputs have none and are accepted.

    Raises:
        UserError: the file is missing, of another model or other settings, has a duplicate instruction, or has no
            output for some instruction.
    """
    path = folder / f"model_outputs_{name}.json"
    origin = read_origin(path)
    # The origin also records engine and seconds, which a later call need not repeat.
    changed = [k for k, v in (expected or {}).items() if origin and origin.get(k) != v]
    if changed:
        raise UserError(
            f"{path}: made by another model or with other settings ({', '.join(changed)}); run --stage generate again"
        )
    if not path.exists():
        raise UserError(f"{path}: no such file; run --stage generate first")
    outputs = {}
    for row in _rows(path):
        if row["instruction"] in outputs:
            raise UserError(f"{row['source']}: duplicate instruction {row['instruction'][:60]!r}; remove one of them")
        outputs[row["instruction"]] = row
    missing = [row["instruction"] for row in reference if row["instruction"] not in outputs]
    if missing:
        raise UserError(
            f"{path}: no output for {len(missing)} of the reference's {len(reference)} instructions (first:"
            f" {missing[0][:60]!r}); run --stage generate --overwrite, or name another set with --reference"
        )
    # Further outputs in the file are ignored, so that a trial run with --limit can use a complete file.
    return [outputs[row["instruction"]] for row in reference]


# ------------------------------------------------------------------------------------------------------- annotations


def annotate(
    judge, reference: list[dict], outputs: list[dict], order: str, eval_out: str, overwrite=False
) -> list[dict]:
    """Annotations in alpaca_eval's format: preference in [1, 2], above 1.5 where output_2 (the model's) is better.

    Args:
        order: "package" shows the outputs in alpaca-eval's own random order, "both" averages over both orders.
    """
    orders = [_orders(judge, row["instruction"], order) for row in reference]
    # Flat over rows and orders; `_annotation` below takes the verdicts from an iterator in the same order.
    items = [
        item
        for row, answer, row_orders in zip(reference, outputs, orders, strict=True)
        for item in _items(row, answer, row_orders)
    ]
    verdicts = iter(judge_all(judge, items, eval_out, overwrite))
    return [
        _annotation(judge, row, answer, [(switched, next(verdicts)) for switched in row_orders])
        for row, answer, row_orders in zip(reference, outputs, orders, strict=True)
    ]


def _orders(judge, instruction: str, order: str) -> list[bool]:
    """The orders to judge: False shows the reference first, True the model's output."""
    # The package's evaluators switch the outputs inside and switch the preference back.
    if getattr(judge, "orders_itself", False):
        return [False]
    return [False, True] if order == "both" else [is_switched(instruction)]


def _items(row: dict, answer: dict, orders: list[bool]) -> list[Item]:
    prompt = Prompt([{"role": "user", "content": row["instruction"]}], row["source"])
    texts = (row["output"], answer["output"])
    return [Item(prompt, *(texts[::-1] if switched else texts)) for switched in orders]


def _annotation(judge, row: dict, answer: dict, verdicts: list[tuple[bool, Verdict]]) -> dict:
    preferences = [preference(verdict, switched, judge) for switched, verdict in verdicts]
    return {
        "instruction": row["instruction"],
        "output_1": row["output"],
        "generator_1": row["generator"],
        "dataset": row["dataset"],
        "category": row["category"],
        "output_2": answer["output"],
        "generator_2": answer.get("generator", "model"),
        "finish_reason": answer.get("finish_reason"),
        "annotator": judge.name,
        # With both orders, a row counts only if both have a verdict: one alone would bring back the position bias.
        "preference": None if None in preferences else sum(preferences) / len(preferences),
        "orders": [
            {
                "is_switched_outputs": switched,
                "preference": p,
                "mass": verdict.mass,
                "error": verdict.error,
                **({"note": verdict.note} if verdict.note else {}),
            }
            for (switched, verdict), p in zip(verdicts, preferences, strict=True)
        ],
    }


def preference(verdict: Verdict, switched: bool, judge) -> float | None:
    """A verdict as alpaca_eval's preference: 1 where output_1 is better, 2 where output_2 is; None without a verdict.

    Probabilities are used as weights, as in AlpacaEval 2: 2 - P(first) where output_1 was shown first. The probability
    of a reward model, ranker or implicit reward has no calibrated scale, so only its order counts.
    """
    if verdict.first is None:
        return None
    weighted = verdict.probability is not None and not judge.name.startswith(("rm:", "pair:", "implicit:"))
    first = verdict.probability if weighted else verdict.first
    # `first` is the share of the answer shown first: the model's output if switched, else the reference.
    return 1 + first if switched else 2 - first


def write_annotations(folder: Path, name: str, annotations: list[dict], origin: dict) -> None:
    """Write annotations_<name>.json and its origin as annotations_<name>.about.json.

    Args:
        origin: judge, order, hashes of outputs and reference, seconds.
    """
    write_json(folder / f"annotations_{name}.json", annotations)
    write_json(folder / f"annotations_{name}.about.json", origin)


def ensure_same_judge(folder: Path, annotations: dict[str, list[dict]], audit: dict | None) -> None:
    """Raise UserError where the folder's annotations mix judges, orders, references or outputs.

    Args:
        annotations: rows by `<side>` or `<side>_<control>`; the others are compared to the first.
    """
    names = list(annotations)
    origins = {name: read_origin(folder / f"annotations_{name}.json") for name in names}
    first = origins[names[0]]
    # The outputs as they are now, so that an edit after the judging is detected, and one before it accepted.
    answers = {
        side: {row["instruction"]: row["output"] for row in _rows(path)}
        for side in dict.fromkeys(name.split("_")[0] for name in names)
        if (path := folder / f"model_outputs_{side}.json").exists()
    }
    for name, origin in origins.items():
        side = name.split("_")[0]
        # A control's judge differs from the judge's on purpose.
        for key in ("order", "reference_sha256", *(() if name != side else ("judge",))):
            if origin.get(key) != first.get(key):
                raise UserError(
                    f"{folder}/annotations_{name}.json: another {key.removesuffix('_sha256')} than in"
                    f" annotations_{names[0]}.json; run --stage judge again"
                )
        # A trial run with --limit judges a part of a complete file, so the judged instructions decide.
        judged = annotations[name]
        if side in answers and any(answers[side].get(row["instruction"]) != row["output_2"] for row in judged):
            raise UserError(
                f"{folder}/annotations_{name}.json: judges other answers than those in model_outputs_{side}.json; run"
                " --stage judge again"
            )
    if audit and audit.get("identity") != first.get("judge"):
        raise UserError(f"{folder}/judge_audit.json: audits another judge; run --stage judge again")


def ensure_same_file(summary: Path, annotations: Path, overwrite: bool) -> None:
    """Raise UserError where a summary is of other judgements than this annotations file."""
    if overwrite or not summary.exists():
        return
    if read_json(summary).get("annotations", {}).get("sha256") != sha256_of_files([annotations]):
        raise UserError(
            f"{summary}: has figures of other judgements; choose another folder with --output_dir, or replace them with"
            " --overwrite"
        )


def read_annotations(path: Path) -> list[dict]:
    """Annotations in alpaca_eval's format, written by this project or by the package.

    The package writes an old-style tie as 0 (here 1.5) and a failed judgement as NaN or -1 (here None).

    Raises UserError, naming file and row, for a file or a row of another format and for a duplicate instruction.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file; run --stage judge first")
    rows = read_file(path)
    if not rows:
        raise UserError(f"{path}: expected a list of annotations")
    seen = set()
    for source, row in rows:
        for key in ("instruction", "output_1", "output_2"):
            if not isinstance(row, dict) or not isinstance(row.get(key), str):
                raise UserError(f"{source}: no text under {key!r}; give an annotations.json of alpaca_eval")
        check_unicode([row["instruction"], row["output_1"], row["output_2"]], source)
        if row["instruction"] in seen:
            raise UserError(f"{source}: instruction {row['instruction'][:60]!r} is judged twice; remove one row")
        seen.add(row["instruction"])
        value = row.get("preference")
        value = 1.5 if value == 0 else value
        # `value != value` is true for NaN only, which Python's JSON parser accepts.
        if value is None or value != value or value == -1:
            row["preference"] = None
        elif isinstance(value, bool) or not isinstance(value, (int, float)) or not 1 <= value <= 2:
            raise UserError(f"{source}: preference must be in [1, 2], found {value!r}")
        else:
            row["preference"] = float(value)
        # The defaults of rows that another tool wrote without these columns.
        row.setdefault("annotator", "unknown")
        row.setdefault("generator_1", "reference")
        row.setdefault("generator_2", "model")
    return [row for _, row in rows]


# --------------------------------------------------------------------------------------------------- files for people


def samples(sides: dict[str, list[dict]], count: int = 20) -> str:
    """Markdown of instructions spread evenly over the set: reference, base, tuned, and the judge's preferences."""
    total = len(sides["base"])
    entries = []
    # First and last row included; the set removes indices that rounding made equal.
    for k in sorted({round(i * (total - 1) / max(1, count - 1)) for i in range(min(count, total))}):
        base = sides["base"][k]
        answers = {f"Reference ({base['generator_1']})": base["output_1"]}
        for name, rows in sides.items():
            judged = "no verdict" if rows[k]["preference"] is None else f"preference {rows[k]['preference']:.2f}"
            answers[answer_label(f"{name} ({judged})", rows[k].get("finish_reason") == "length")] = rows[k]["output_2"]
        entries.append((f"Instruction {k + 1}", base["instruction"], answers))
    note = "Preference: 1 where the judge prefers the reference, 2 where it prefers the model's answer."
    return side_by_side("Answers side by side", entries, note)


def llm_comparator(annotations: list[dict], file_name: str) -> dict:
    """The model (A) against the reference (B) in the format of PAIR's LLM Comparator: scores in [-1.5, 1.5]."""
    examples = []
    for row in annotations:
        if row["preference"] is None:
            continue
        raters = [
            {
                # Maps the preference range [1, 2] to [-1.5, 1.5]; above 0 the model (A) is better.
                "score": 3 * (order["preference"] - 1.5),
                # A is the model's answer. Where the package switched, it was shown first, which is A's place.
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
    return {
        "metadata": {"source_path": file_name, "custom_fields_schema": []},
        "models": [{"name": first["generator_2"]}, {"name": first["generator_1"]}],
        "examples": examples,
    }
