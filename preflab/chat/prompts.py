"""The prompts of --prompt and --file."""

from pathlib import Path

from preflab.data.messages import well_formed
from preflab.data.prompts import load_prompts
from preflab.data.sources import reading
from utils.errors import UserError


def prompts_of(args, c) -> list[list[dict]] | None:
    """Conversations that end with a user turn; None without --prompt and --file.

    Args:
        args: prompt, file, prompts_split. c: columns, on_bad_row, limit.

    Raises:
        UserError: a file that cannot be read, a row without a prompt, or no prompt at all.
    """
    if args.prompt is not None:
        return [[{"role": "user", "content": well_formed(args.prompt)}]]
    if args.file is None:
        return None
    if args.file.endswith(".txt"):
        return _lines(Path(args.file).expanduser())[: c.limit]
    source = {"name": args.file, "split": args.prompts_split, "config": None, **reading(c.columns, c.on_bad_row)}
    prompts, _ = load_prompts([source], limit=c.limit)
    return [prompt.messages for prompt in prompts]


def _lines(path: Path) -> list[list[dict]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise UserError(f"--file {path}: cannot be read ({reason})") from None
    prompts = [[{"role": "user", "content": line.strip()}] for line in text.splitlines() if line.strip()]
    if not prompts:
        raise UserError(f"--file {path}: has no prompt; write one per line")
    return prompts
