"""The date that chat templates print (`strftime_now`: Llama 3.1 and 3.2, gpt-oss): one per run, not one per day.

A training run stores its date in run.json; resume and every evaluation of the run use it for all models that they
render prompts for. Other commands use the day of the call, or --template_date.
"""

import re
from datetime import date

from utils.errors import UserError

CALL = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")
# {"date": date} once it is chosen. One for the process, so that base, tuned and judges are prompted on the same day.
_chosen: dict[str, date] = {}


def choose_template_date(day: str | None) -> None:
    """Choose the date of all templates of this process, as YYYY-MM-DD. None: today, at the first use.

    Raises:
        UserError: not a date.
    """
    _chosen.clear()
    if day is not None:
        try:
            _chosen["date"] = date.fromisoformat(day)
        except ValueError:
            raise UserError(f"--template_date {day}: not a date; write YYYY-MM-DD, e.g. 2026-01-31") from None


def template_date(template: str | None) -> str | None:
    """The date that `template` prints in this process, as YYYY-MM-DD; None for a template without a date."""
    return _date().isoformat() if isinstance(template, str) and CALL.search(template) else None


def with_fixed_date(template: str) -> str:
    """`template` with the date in place of its calls of `strftime_now`, whose result would change every day."""
    # In the text, because transformers passes no functions to templates: a variable cannot replace strftime_now.
    return CALL.sub(lambda call: repr(_date().strftime(call[2])), template)


def _date() -> date:
    return _chosen.setdefault("date", date.today())
