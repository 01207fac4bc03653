"""Suggests corrections of misspelt words and shortens lists, for messages."""

import difflib
from collections.abc import Iterable


def did_you_mean(word: str, allowed: Iterable[str]) -> str:
    """Returns ' Did you mean "x"?' for the closest allowed word, or ''."""
    by_lower = {known.lower(): known for known in allowed}
    close = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=0.6)
    return f' Did you mean "{by_lower[close[0]]}"?' if close else ""


def some(names: Iterable[str], most: int = 8) -> str:
    """Joins the first `most` names and counts the rest; "none" if there are none."""
    names = list(names)
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) or "none") + rest
