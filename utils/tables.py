"""The one table that a script prints: base beside tuned, figures with errors, differences with intervals."""


def render(title: str, lines: list[tuple]) -> str:
    """Aligned columns under `title`; the first line is the head."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([title, "-" * len(text[0]), text[0], "-" * len(text[0]), *text[1:]])


def cell(m: dict, scale: float = 1, digits: int = 1) -> str:
    """A metric with its standard error, `71.7 ± 4.2`; a dash where it could not be computed."""
    if m["value"] is None or m["value"] != m["value"]:
        return "-"
    error = "" if m["stderr"] is None else f" ± {scale * m['stderr']:.{digits}f}"
    return f"{scale * m['value']:.{digits}f}{error}"


def interval(m: dict, scale: float = 1, digits: int = 1, sign: str = "") -> str:
    """A metric's 95% interval, ` [63.3, 80.0]`, or nothing where it has none. `sign` "+" shows signs."""
    if m["ci95"] is None:
        return ""
    low, high = (f"{scale * x:{sign}.{digits}f}" for x in m["ci95"])
    return f" [{low}, {high}]"


def estimate(m: dict, scale: float = 1, digits: int = 1) -> str:
    """A metric with its 95% interval, `71.7 [63.3, 80.0]`; a dash where it could not be computed."""
    if m["value"] is None or m["value"] != m["value"]:
        return "-"
    return f"{scale * m['value']:.{digits}f}{interval(m, scale, digits)}"


def difference(m: dict, p: dict | None = None, scale: float = 1, digits: int = 1) -> str:
    """A signed metric with its 95% interval and the p-value of its test, `+21.7 [+13.3, +30.0] p=2e-06`."""
    shown = f"{scale * m['value']:+.{digits}f}{interval(m, scale, digits, '+')}"
    return shown + (f" p={p['value']:.2g}" if p else "")


def markdown_table(lines: list[list[str]]) -> str:
    """A Markdown table, its columns aligned to be read as text too; the first line is the head."""
    lines = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    widths = [max(3, *(len(line[i]) for line in lines)) for i in range(len(lines[0]))]
    rows = ["| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines]
    return "\n".join([rows[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *rows[1:]])
