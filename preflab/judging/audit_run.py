"""Running a judge audit: labelled pairs are read, the judges and their controls give verdicts, and these are scored."""

import time

from preflab.data.pair_rows import Pair
from preflab.data.preferences import load_pairs
from preflab.data.prompt_format import AS_CHAT
from preflab.data.sources import reading
from preflab.evaluation.comparison import held_out_sources
from preflab.judging.audit import (
    against_longer,
    audit,
    audit_items,
    audit_table,
    passes,
    sample_pairs,
    verdict_of,
    whose_labels,
)
from preflab.judging.judge_prompt import Judge, Verdict
from preflab.judging.judges import judge_all
from preflab.judging.panel import close, vote
from preflab.judging.panel_report import members_verdict, panel_name
from utils.errors import UserError

Labelled = tuple[list[Pair], str, dict]


def labelled_pairs(comparison, args) -> Labelled:
    """A seeded sample of labelled pairs: (pairs, whose labels, what was read).

    Args:
        args: audit_dataset (default: the held-out pairs of the tuned model's run), audit_split, audit_limit.

    Raises:
        UserError: no pair is left.
    """
    c = comparison.args
    sources = [{"name": args.audit_dataset, "split": args.audit_split, **reading(c.columns, c.on_bad_row)}]
    if args.audit_dataset is None:
        sources, _ = held_out_sources(c, comparison.trained)
    # Several pairs of a prompt are several labels; plain prompts become messages, as the judge prompts require.
    data = load_pairs(sources, keep_duplicate_prompts=True, prompt_format=AS_CHAT)
    if not data.pairs:
        raise UserError(
            f"{sources[0]['name']}: no labelled pair is left for the audit (dropped: {dict(data.dropped)}); name other"
            " pairs with --audit_dataset, or skip the audit with --audit_limit 0"
        )
    pairs = sample_pairs(data.pairs, args.audit_limit, c.seed)
    return pairs, whose_labels(sources), {**data.summary(), "sampled": len(pairs)}


def audit_judges(labelled: Labelled, judges: list[Judge], controls: list[Judge], c) -> dict:
    """Audit a judge, or every judge of a panel and their majority, beside the controls.

    Args:
        labelled: from `labelled_pairs`. c: eval_out, overwrite, seed.

    Returns:
        The artifact's section. For a panel, `judge` is the panel of the judges that pass (of all, where none does),
        `members` has the audit of each, `passed` is whether any does.
    """
    started = time.monotonic()
    pairs, labels, data = labelled
    items, prompts = audit_items(pairs), [pair.prompt_key for pair in pairs]
    verdicts = {}
    for judge in [*judges, *controls]:
        verdicts[judge.name] = judge_all(judge, items, c.eval_out, c.overwrite)
        if len(judges) > 1:
            close([judge])

    def section(name: str, ordered: bool = True) -> dict:
        against = against_longer(verdicts[name], verdicts["longer"], c.seed, prompts)
        figures = audit(pairs, verdicts[name], c.seed, ordered)
        return {"audit": figures, "against_longer": against, "passed": passes(against),
                "verdict": verdict_of(name, figures, against)}  # fmt: skip

    # Whether the audit's two orders are meaningful: an evaluator that chooses the order itself has no position to test.
    of = {judge.name: section(judge.name, not getattr(judge, "orders_itself", False)) for judge in [*judges, *controls]}
    main, identity, panel = judges[0].name, judges[0].identity(), {}
    if len(judges) > 1:
        members = {judge.name: of[judge.name] for judge in judges}
        voting = [judge for judge in judges if of[judge.name]["passed"]] or judges
        main = panel_name([judge.name for judge in voting])
        verdicts[main] = _votes([verdicts[judge.name] for judge in voting])
        of = {main: section(main), **of}
        identity = {"judge": main, "members": [judge.identity() for judge in voting]}
        panel = {"members": members}
        of[main] |= {
            "passed": any(member["passed"] for member in members.values()),
            "verdict": members_verdict(members, main),
        }
    shown = {name: of[name]["audit"] for name in (main, *(control.name for control in controls))}
    return {
        "labels": labels,
        "judge": main,
        "identity": identity,
        "data": data,
        "audits": shown,
        "against_longer": of[main]["against_longer"],
        "passed": of[main]["passed"],
        "verdict": of[main]["verdict"],
        "table": audit_table(shown, labels),
        "seconds": round(time.monotonic() - started, 1),
        **panel,
    }


def _votes(verdicts: list[list[Verdict]]) -> list[Verdict]:
    """The majority of several judges on the same items."""
    return [vote(list(of_item)) for of_item in zip(*verdicts, strict=True)]
