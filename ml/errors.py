"""The one error that a user caused and can mend; scripts print it as a single line and exit with status 2."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something in the input is wrong. The message names the place (flag, field, file:line) and says the mend."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """Returns a hint like ``did you mean 'steps'?`` or, if nothing is close, the list of valid names."""
    valid = sorted(valid)
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    if close:
        return f"did you mean '{close[0]}'?"
    return "valid: " + ", ".join(valid)
