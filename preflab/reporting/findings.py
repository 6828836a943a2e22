"""What a reader must know before believing a figure: warnings from the artifacts of a run, and judge audits."""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from preflab.data.length_bias import sentence as length_bias_sentence
from preflab.judging.battle_report import judge_caveats
from preflab.reporting.artifacts import Artifact, RunArtifacts, part
from preflab.reporting.stages import title_of
from preflab.training.dpo_report import displacement
from preflab.training.preflight_checks import TRUNCATED
from utils.stats import direction
from utils.tables import cell, estimate, p_equals

# Shares of truncated sequences and answers from which there is a warning: as the preflight's.
MANY_TRUNCATED = TRUNCATED[0]
# How the claim of an evaluation starts whose prompts were trained on (preflab.evaluation.trained_prompts).
NOT_HELD_OUT = re.compile(r"(PARTLY )?NOT HELD OUT.*?(\.(?= |$)|$)")


@dataclass
class Finding:
    """A warning.

    Attributes:
        about: its topic: trial, displacement, length, truncation, contamination, judge, verdicts, files, stale, code.
        where: the stage that it concerns.
        text: one sentence.
    """

    about: str
    where: str
    text: str


@dataclass
class Audit:
    """A judge's audit: passed, failed, or not made (None)."""

    where: str
    judge: str
    passed: bool | None
    text: str


def findings_of(run: RunArtifacts) -> list[Finding]:
    """All warnings of a run but those about stale results, in the order of its stages."""
    findings = [Finding("files", "files", problem) for problem in run.problems]
    state = run.run.state
    if run.is_training and state != "finished" and not state.startswith("finished, trial"):
        findings.append(Finding("files", "Training", f"this run is not complete: {state}"))
    warnings = part(run.others, "preflight").get("warning")
    for warning in warnings if isinstance(warnings, list) else []:
        findings.append(Finding("preflight", "Preflight", str(warning)))
    findings += _truncated_sequences("Preflight", part(run.others, "preflight"))
    for artifact in run.artifacts:
        if artifact.problem:
            continue
        where = title_of(artifact)
        try:
            findings += [Finding(about, where, text) for about, text in _of_artifact(artifact)]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            findings.append(Finding("files", where, f"{artifact.path}: warnings could not be read ({error!r})"))
    return _once([*findings, *_code(run)])


def _overlap(section: dict) -> Iterator[str]:
    """What --contamination counted: of a harness's tasks together, or of one set of prompts."""
    tasks = section["tasks"].values() if "tasks" in section else [section]
    documents = sum(task["documents"] for task in tasks)
    counts: Counter = Counter()
    for task in tasks:
        counts.update(task["overlapping" if "tasks" in section else "removed"])
    shared = [f"{count} share {'an' if size == '8' else 'a'} {size}-gram" for size, count in counts.items() if count]
    if shared:
        yield f"of {documents} documents {' and '.join(shared)} of words with {section['training_data']}"


def _once(findings: list[Finding]) -> list[Finding]:
    """Equal sentences of several stages once, under the stages' names together."""
    merged: dict[tuple, Finding] = {}
    for finding in findings:
        first = merged.setdefault((finding.about, finding.text), finding)
        if first is not finding and finding.where not in first.where.split("; "):
            first.where += f"; {finding.where}"
    return list(merged.values())


def _of_artifact(artifact: Artifact) -> Iterator[tuple[str, str]]:
    """(topic, sentence) of every warning of a readable summary."""
    summary, metrics = artifact.summary, artifact.metrics
    if artifact.limit is not None:
        yield "trial", f"a trial on --limit {artifact.limit:g}: its figures are no result"
    steps, epoch = (artifact.part("plan").get(key) for key in ("steps", "steps_per_epoch"))
    if all(isinstance(count, int) for count in (steps, epoch)) and steps < epoch:
        yield "trial", f"training ended after {steps} of the {epoch} steps of one epoch (--max_steps)"
    warned = summary.get("warning")
    if warned:
        yield "displacement" if "displacement" in warned else "warning", str(warned)
    elif "logps_chosen_difference" in metrics and "logps_rejected_difference" in metrics:
        # Of evaluations, whose summaries have no warning of it.
        displaced = displacement(metrics)
        if displaced:
            yield "displacement", displaced
    trained_on = not_held_out(artifact)
    if trained_on:
        yield "contamination", trained_on
    sections = summary.get("contamination", [])
    for section in sections if isinstance(sections, list) else [sections]:
        yield from (("contamination", text) for text in _overlap(section))
    for split, dropped in _dropped(summary.get("data")):
        kept = dropped.get("prompt_in_test_split_kept")
        if kept:
            yield "contamination", f"{kept} prompts of the {split} data are also in the test split and were trained on"
    for split, bias in part(summary, "length_bias").items():
        longer, p = bias["words"]["share_chosen_longer"], bias["words"]["p_chosen_longer_is_half"]["value"]
        if p is not None and p < 0.05:
            yield "length", f"{length_bias_sentence(split, bias)} (sign test {p_equals(p)}, n={longer['n']})"
    correlation = metrics.get("margin_length_correlation")
    if correlation and correlation["ci95"] and not correlation["ci95"][0] <= 0 <= correlation["ci95"][1]:
        shown = estimate(correlation, 1, 2)
        yield "length", f"reward margins follow answer lengths: rank correlation {shown} (95% interval)"
    yield from _truncated_texts(summary)
    yield from _verdicts(artifact)


def not_held_out(artifact: Artifact) -> str | None:
    """The sentence of an evaluation whose prompts the run was trained on, None for held-out ones."""
    sentence = NOT_HELD_OUT.match(str(artifact.summary.get("claim") or ""))
    return sentence[0] if sentence else None


def doubt_about_judge(artifact: Artifact) -> str | None:
    """Why the verdicts of a judge support no claim, None where they do or where nobody judged."""
    if artifact.stage == "alpacaeval":
        audit = artifact.summary.get("audit")
        if not audit:
            return "the judge was not audited"
        return None if audit.get("passed") else "the judge failed its audit"
    if artifact.stage == "battle" and "unreliable" in judge_caveats(artifact.summary):
        return "the judge is unreliable"
    return None


def _dropped(data) -> Iterator[tuple[str, dict]]:
    """(split, counts of what was left out) of a summary's section `data`."""
    for split, content in (data or {}).items():
        if isinstance(content, dict) and isinstance(content.get("dropped"), dict):
            yield split, content["dropped"]


def _truncated_sequences(where: str, section: dict) -> Iterator[Finding]:
    counts = part(section, "truncation")
    pairs = part(section, "train").get("pairs") or section.get("pairs")
    for text_part in ("prompt", "chosen", "rejected"):
        count = counts.get(f"truncated_{text_part}")
        if isinstance(count, int) and isinstance(pairs, int) and count >= max(1, MANY_TRUNCATED * pairs):
            text = f"{count} of {pairs} pairs have a truncated {text_part} ({count / pairs:.0%}): raise --max_length"
            yield Finding("truncation", where, text)


def _truncated_texts(summary: dict) -> Iterator[tuple[str, str]]:
    """Truncated sequences of an evaluation, and answers that reached the token limit."""
    data = part(summary, "data")
    for section in (data, data.get("pairs")):
        if isinstance(section, dict) and isinstance(section.get("truncation"), dict):
            yield from ((f.about, f.text) for f in _truncated_sequences("", section))
    by_model = summary.get("answers") if summary["stage"] == "battle" else None
    if summary["stage"] == "human_eval_dump":
        by_model = summary["metrics"]
    for model, m in (by_model or {}).items():
        if isinstance(m, dict) and part(m, "truncated_share").get("value", 0) > MANY_TRUNCATED:
            yield "truncation", f"{cell(m['truncated_share'], 100)}% of the answers of {model} reached the token limit"
    if summary["stage"] == "alpacaeval":
        for side in ("base", "tuned"):
            cut = summary["metrics"].get(f"{side}_truncated_share")
            if cut and (cut["value"] or 0) > MANY_TRUNCATED:
                yield "truncation", f"{cell(cut, 100)}% of the answers of {side} reached the token limit"


def _verdicts(artifact: Artifact) -> Iterator[tuple[str, str]]:
    """What makes the verdicts of a judge doubtful."""
    summary, metrics = artifact.summary, artifact.metrics
    if artifact.stage == "battle":
        caveats = judge_caveats(summary).strip()
        if caveats:
            yield "judge", caveats
        rate, longer = metrics.get("win_rate"), metrics.get("longer_win_rate")
        preferred = direction(rate, metrics["p_win_rate_is_half"]["value"] or 1, 0.5) if rate else 0
        if preferred and longer and preferred * (longer["value"] - rate["value"]) >= 0:
            yield "length", f"the length-only control gives {cell(longer, 100)}%, the judge {cell(rate, 100)}%"
        unparsed = metrics.get("unparsed_verdicts")
        if unparsed and unparsed["value"]:
            yield "judge", f"{unparsed['value']} of {unparsed['n']} replies of the judge had no verdict"
    if artifact.stage == "alpacaeval" and metrics.get("base_unparsed"):
        for side in ("base", "tuned"):
            unparsed = metrics[f"{side}_unparsed"]
            if unparsed["value"]:
                yield "judge", f"{unparsed['value']} of {unparsed['n']} verdicts on {side} are missing"


def _code(run: RunArtifacts) -> Iterator[Finding]:
    """Results that several versions of the code or of a package made."""
    made = {title_of(a): a.run for a in run.artifacts if not a.problem and a.run}
    dirty = [name for name, record in made.items() if str(record.get("git_commit")).endswith("-dirty")]
    if dirty:
        yield Finding(
            "code", "; ".join(dirty), "made with changes that were not committed: the commit alone cannot repeat it"
        )
    for package in ("torch", "transformers", "trl", "peft"):
        versions = {str(part(record, "versions").get(package)) for record in made.values()} - {"None"}
        if len(versions) > 1:
            yield Finding("code", "all stages", f"several versions of {package}: {', '.join(sorted(versions))}")


def audits_of(run: RunArtifacts) -> list[Audit]:
    """The audit of every judge of a run."""
    audits = []
    for artifact in run.artifacts:
        if artifact.problem or artifact.stage not in ("alpacaeval", "battle"):
            continue
        audit, where = artifact.summary.get("audit"), title_of(artifact)
        if isinstance(audit, dict) and isinstance(audit.get("passed"), bool):
            audits.append(Audit(where, str(audit.get("judge")), audit["passed"], str(audit.get("verdict", ""))))
        elif artifact.stage == "battle":
            audits.append(Audit(where, _judge(artifact), None, BATTLE_AUDIT))
        else:
            audits.append(Audit(where, _judge(artifact), None, "not audited (--audit_limit 0), so there is no claim"))
    return audits


BATTLE_AUDIT = "not audited (--audit_dataset); the controls and the flip rate are in the table"


def _judge(artifact: Artifact) -> str:
    judges = artifact.args.get("judge") or "?"
    return ", ".join(judges) if isinstance(judges, list) else str(judges)
