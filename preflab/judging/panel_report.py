"""Names and sentences about the judges of a panel. Reports import it, so it imports neither torch nor transformers."""

from utils.tables import estimate

# The start of a panel's name.
PANEL = "panel of "


def panel_name(members: list[str]) -> str:
    """The name of a panel in tables and artifacts."""
    return f"{PANEL}{len(members)} judge{'s' if len(members) > 1 else ''}"


def members_verdict(members: dict[str, dict], panel: str) -> str:
    """The audit of a panel's judges in two sentences: who has a vote, and who is left out of the claim.

    Args:
        members: per judge `audit`, `against_longer` and `passed`. panel: the name of the panel of those that pass.
    """

    def described(passed: bool) -> str:
        return "; ".join(
            f"{name} ({estimate(member['audit']['agreement'], 100)}% of the labels,"
            f" {estimate(member['against_longer']['difference'], 100)} points more than `longer`)"
            for name, member in members.items()
            if member["passed"] == passed
        )

    passed, failed = described(True), described(False)
    if not passed:
        return f"JUDGE AUDIT FAILED by every judge of the panel: {failed}; ignore their win rates."
    left_out = f" LEFT OUT OF THE PANEL, audit failed: {failed}." if failed else ""
    return f"Judge audit passed by the {panel}: {passed}.{left_out}"


def heading_of(judge: str) -> str:
    """The heading of a judge's column, whose name can be long: it is in the title."""
    return "panel" if judge.startswith(PANEL) else "judge"


def audit_result(passed: bool | None, votes: bool) -> str:
    """A panel's judge's audit in a table: passed, FAILED (with what follows), or "-" without an audit."""
    if passed is None:
        return "-"
    return "passed" if passed else "FAILED" if votes else "FAILED, no vote"


def left_out_judges(audit: dict | None) -> str:
    """A sentence that names the judges of a panel without a vote; "" where all have one, or none passed."""
    members = (audit or {}).get("members", {})
    failed = [name for name, member in members.items() if not member["passed"]]
    if not failed or len(failed) == len(members):
        return ""
    return f" Left out of the panel, because their audit failed: {', '.join(failed)}."
