"""What is bad in a source: one policy for what is damaged, missing or contradicting."""

import contextlib

import pandas as pd

from rsdlib import runtime
from rsdlib.errors import BadArchiveError, BadImageError, BadTableError, ConfigError

NONE_BAD = pd.DataFrame(columns=["id", "part", "reason"])
_ALWAYS, _SHARE = 5, 0.01  # so many faults pass, or this share of the rows
_SKIP = "With on_bad='skip' it is left out and counted."


class Faults(list):
    """Tuples of id, part and reason: with ``on_bad="skip"`` left out, else the first is raised."""

    def __init__(self, on_bad="error"):
        super().__init__()
        if on_bad not in ("error", "skip"):
            raise ConfigError(f"on_bad = {on_bad!r} is unknown", "Use 'error' or 'skip'.")
        self.on_bad = on_bad

    def add(self, id, part, reason, kind=BadTableError):
        """Raise an error, or list the one fault of an image, a row or a part."""
        if self.on_bad == "error":
            raise kind(f"{id!r} in {part}: {reason}", f"Correct it, or drop it. {_SKIP}")
        self.append((str(id), part, reason))

    @contextlib.contextmanager
    def leaving_out(self, id, part):
        """Take what is refused within for one fault."""
        try:
            yield
        except (BadArchiveError, BadImageError, BadTableError) as error:
            if self.on_bad == "error":
                error.args = (str(error).replace(f" {_SKIP}", "") + f" {_SKIP}",)
                raise
            self.append((str(id), part, error.reason))

    def table(self, count, things, max_bad=_SHARE):
        """Return them as a table and log the first; too many of `count` are refused."""
        if self:
            some = "; ".join(map(", ".join, self[:3]))
            message = f"{len(self):,} of {count:,} {things} are bad: {some}"
            if len(self) > max(_ALWAYS, max_bad * count):
                fix = f"Get the data again: more than {_ALWAYS} and {max_bad:.0%} are not left out."
                raise BadTableError(message, fix)
            runtime.log(f"{message}. They are left out.")
        return pd.DataFrame(self, columns=NONE_BAD.columns)
