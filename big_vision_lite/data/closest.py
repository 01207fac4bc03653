"""What a user may have meant by a name that does not exist."""

import difflib
from collections.abc import Iterable


def did_you_mean(word: str, words: Iterable[str]) -> str:
    """Returns ` (did you mean 'x'?)` when something is close, else nothing."""
    by_lower = {known.lower(): known for known in words}
    close = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=0.6)
    return f" (did you mean {by_lower[close[0]]!r}?)" if close else ""


def some(names: Iterable[str], most: int = 8) -> str:
    """Joins the first `most` names and counts the rest; "none" when there are none."""
    names = list(names)
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) or "none") + rest
