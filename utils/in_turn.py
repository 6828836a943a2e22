"""Run scripts one after another in one process, each as `python script.py arguments` does.

    python -m utils.in_turn first.py --flag --then second.py --flag

A script that ends with an error ends the row, with its exit code. One process, because a shell that waits for its child
passes no stop signal on to it.
"""

import runpy
import sys

BETWEEN = "--then"


def commands(words: list[str]) -> list[list[str]]:
    """The command lines between the words `--then`."""
    lines: list[list[str]] = [[]]
    for word in words:
        if word == BETWEEN:
            lines.append([])
        else:
            lines[-1].append(word)
    return lines


def main() -> None:
    for number, argv in enumerate(commands(sys.argv[1:])):
        if number:
            print(flush=True)
        sys.argv = argv
        try:
            runpy.run_path(argv[0], run_name="__main__")
        except SystemExit as stop:
            if stop.code:
                raise


if __name__ == "__main__":
    main()
