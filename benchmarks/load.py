"""Time and memory of the statistics on large inputs: votes of human_eval.py --score, and battles of eval_win_rate.py.

    python benchmarks/load.py --votes 100000 --battles 50000

Synthetic answers, votes and verdicts; no model is loaded. Votes go through the script itself, from votes files to the
report. Battles start with the judges (the controls `longer` and `random`) and end with battle_rows.jsonl: everything
that eval_win_rate.py --battle does after the answers.
"""

import argparse
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from preflab.data.prompts import Prompt  # noqa: E402
from preflab.human.page import FORMAT, checksum  # noqa: E402
from preflab.human.study import write_study  # noqa: E402
from preflab.judging import battle_metrics, battle_report  # noqa: E402
from preflab.judging.battles import both_orders, judge_rows, rows_with_controls  # noqa: E402
from preflab.judging.judges import LongerJudge, RandomJudge  # noqa: E402
from utils.artifacts import write_json, write_rows  # noqa: E402

# Votes of one annotator.
VOTES_EACH = 2500
WORDS = "river stone cloud paper lamp garden winter music bread train letter window".split()


def synthetic(count: int, seed: int = 0) -> tuple[list[Prompt], dict[str, list[dict]]]:
    """(prompts, answers of base and tuned): answers of 20 to 120 words."""
    rng = random.Random(seed)
    prompts, answers = [], {"base": [], "tuned": []}
    for number in range(count):
        question = {"role": "user", "content": f"Question {number}: what about {rng.choice(WORDS)}?"}
        prompts.append(Prompt([question], f"prompts.jsonl line {number + 1}", None, rng.choice(WORDS[:4])))
        for name, given in answers.items():
            words = rng.choices(WORDS, k=rng.randint(20, 120))
            given.append({"text": f"{name} {' '.join(words)}.", "tokens": len(words), "finish_reason": "stop"})
    return prompts, answers


def measure_votes(count: int, folder: Path) -> None:
    """Score `count` votes of several annotators on one study."""
    prompts, answers = synthetic(VOTES_EACH)
    paths = {
        "candidates": folder / "manual_eval_candidates.json",
        "page": folder / "human_eval.html",
        "key": folder / "human_eval_key.json",
    }
    about = {
        "stage": "human_eval_dump",
        "model": {},
        "sampling": {},
        "metrics": {},
        "args": {},
        "run": {"run_name": "load", "limit": None},
        "data": {},
        "prompts": [{"where": p.source, "uid": None, "category": p.category} for p in prompts],
        "answers": {n: [{k: a[k] for k in ("tokens", "finish_reason")} for a in given] for n, given in answers.items()},
    }
    settings = {"pairs_per_prompt": 1, "repeat_share": 0.0, "sides_seed": 1, "limit": None}
    key = write_study(paths, prompts, answers, "load", about, settings, overwrite=False)
    rng, files = random.Random(1), []
    for number in range(-(-count // VOTES_EACH)):
        name = f"annotator {number}"
        votes = [
            {
                "id": item["id"],
                "choice": rng.choice(["left", "right", "tie", "left_much"]),
                "left_acceptable": rng.random() < 0.8,
                "right_acceptable": rng.random() < 0.7,
                "skip": None,
                "comment": "",
                "ms": rng.randint(3000, 60000),
            }
            for item in key["items"][: min(VOTES_EACH, count - number * VOTES_EACH)]
        ]
        export = {
            "format": FORMAT,
            "study": key["study"],
            "annotator": name,
            "items": len(key["items"]),
            "exported_utc": "2026-01-01T00:00:00Z",
            "votes": votes,
            "checksum": checksum(key["study"], name, votes),
        }
        files.append(folder / f"votes-{number}.json")
        write_json(files[-1], export)
    started = time.monotonic()
    command = [sys.executable, ROOT / "human_eval.py", "--key", paths["key"], "--score", *files]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print(f"{count:,} votes of {len(files)} annotators: {time.monotonic() - started:.0f} s, peak {peak:.2f} GiB")


def measure_battles(count: int, folder: Path) -> None:
    """Judge `count` battles under two instant judges and compute every figure of the report."""
    prompts, answers = synthetic(count)
    started, pairs = time.monotonic(), [("tuned", "base")]
    items, rows = both_orders(prompts, answers, pairs)
    judged = {j.name: judge_rows(j, items, rows, str(folder), False) for j in (RandomJudge(42), LongerJudge())}
    judged_at = time.monotonic()
    sections = battle_metrics.battle_sections(judged, answers, pairs, ["base", "tuned"], 42)
    computed_at = time.monotonic()
    battle_report.render(sections, None, "load", {"left_out": {}, "judge_notes": []})
    battle_report.battle_figure(folder / "battle.png", sections, "load")
    write_rows(folder / "battle_rows.jsonl", rows_with_controls(judged))
    ended, peak = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"{count:,} battles: judges {judged_at - started:.0f} s, figures {computed_at - judged_at:.0f} s, report and"
        f" rows {ended - computed_at:.0f} s, peak {peak:.2f} GiB"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--votes", type=int, default=0)
    parser.add_argument("--battles", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.battles:
            measure_battles(args.battles, Path(folder))
        if args.votes:
            measure_votes(args.votes, Path(folder))


if __name__ == "__main__":
    main()
