"""How answers appear while they are generated: in columns on a wide terminal, else one below the other."""

import sys

from utils.markdown import plain

# Narrower columns break too many words.
NARROWEST_COLUMN = 36


def screen(models: int):
    """The screen for this number of models and this output."""
    # Not at the top: it takes time, and most calls of the tests and of pipes have no use for it.
    from rich.console import Console

    console = Console()
    wide = console.width >= models * NARROWEST_COLUMN
    return Columns(console) if console.is_terminal and not console.is_dumb_terminal and wide else Stacked()


class Stacked:
    """One answer below the other, each printed as it is generated.

    Answers come from models: control characters, which a terminal would obey, are shown as escapes.
    """

    def start(self, titles: list[str]) -> None:
        """Begin a turn with one answer under each of `titles`."""
        self.titles, self.current, self.shown = titles, None, ""

    def update(self, k: int, text: str) -> None:
        """Show answer `k`, which is `text` so far."""
        if k != self.current:
            self.current, self.shown = k, ""
            self._print(f"\n[{plain(self.titles[k])}]\n")
        # What is printed cannot be changed; a tokenizer may still change the end of a text.
        if text.startswith(self.shown):
            self._print(plain(text[len(self.shown) :]))
            self.shown = text

    def finish(self, k: int, text: str, note: str) -> None:
        """Show the complete answer `k` and what is to be said about it."""
        self.update(k, text)
        if self.shown != text:
            self._print(f"\n{plain(text)}")
        self._print(f"\n({note})\n")

    def close(self) -> None:
        """End the turn."""

    @staticmethod
    def _print(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()


class Columns:
    """Answers side by side; while they are generated, as many of their last lines as the terminal holds."""

    def __init__(self, console):
        self.console, self.live = console, None

    def start(self, titles: list[str]) -> None:
        """Begin a turn with one answer under each of `titles`."""
        from rich.live import Live

        self.titles, self.texts, self.notes = titles, [""] * len(titles), [""] * len(titles)
        # Removed at the end of the turn, when the complete answers are printed.
        self.live = Live(console=self.console, auto_refresh=False, transient=True)
        self.live.start()

    def update(self, k: int, text: str) -> None:
        """Show answer `k`, which is `text` so far."""
        self.texts[k] = text
        self.live.update(self._table(max(1, self.console.height - 6)), refresh=True)

    def finish(self, k: int, text: str, note: str) -> None:
        """Show the complete answer `k` and what is to be said about it."""
        self.notes[k] = f"({note})"
        self.update(k, text)

    def close(self) -> None:
        """End the turn, also where an answer failed."""
        if self.live is not None:
            self.live.stop()
            self.live = None
            if any(self.texts):
                self.console.print(self._table(None))

    def _table(self, lines: int | None):
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(box=box.SIMPLE_HEAD, expand=True, padding=(0, 1))
        for title in self.titles:
            table.add_column(Text(plain(title)), ratio=1, overflow="fold")
        width = max(1, self.console.width // len(self.titles) - 4)
        cells = []
        for text in self.texts:
            wrapped = Text(plain(text)).wrap(self.console, width, overflow="fold")
            cells.append(Text("\n").join(wrapped[-lines:] if lines else wrapped))
        table.add_row(*cells)
        table.add_row(*(Text(note, style="dim") for note in self.notes))
        return table
