"""What the demo prints: progress, headings, and each answer beside its adapter."""

import sys
import textwrap

from prompts import CUSTOMERS, Customer

UNSTYLED = 3
"""Exit status of a run in which an answer does not show its adapter's style."""

_WIDTH = 92


def say(text: str) -> None:
    """Prints a line at once; two processes take turns in printing."""
    print(text, flush=True)


def heading(text: str) -> None:
    """Prints a heading."""
    say(f"\n\033[1m{text}\033[0m" if sys.stdout.isatty() else f"\n{text}")


def show_all(answers: list[str]) -> bool:
    """Prints all answers, in the order of `CUSTOMERS`.

    Returns:
        Whether every answer shows its adapter's style.
    """
    shown = [_show(c, answer) for c, answer in zip(CUSTOMERS, answers, strict=True)]
    return all(shown)


def _show(customer: Customer, answer: str) -> bool:
    say(f"\n  {customer.title}  |  adapter: {customer.adapter or '(none: base model)'}")
    for text in (f"Q: {customer.prompt}", f"A: {answer}"):
        say(textwrap.fill(text, _WIDTH, initial_indent="    ", subsequent_indent="    "))
    return customer.marker is None or customer.marker in answer
