"""The errors a user may meet: each says which item, why, and what to do, in one line."""

import contextlib
import errno

_LONGEST = 900  # characters of what an error says, and of what to do


def _cut(text):
    """Return a text without its middle if it is long, as the names in a hostile file may be."""
    return text if len(text) <= _LONGEST else f"{text[:700]} ... {text[-190:]}"


class RsdError(Exception):
    """Base of every error that `rsdlib` raises on purpose.

    Parameters
    ----------
    message : str
        What happened, to which item.
    fix : str, optional
        What the user can do about it; appended to the message. Some kinds have one of their own.
    exit_code : int, optional
        What the command line exits with, if not with that of the kind.
    """

    exit_code, fix = 3, None  # input refused

    def __init__(self, message, fix=None, exit_code=None):
        self.fix, self.exit_code = fix or self.fix, exit_code or self.exit_code
        self.reason = message
        texts = [_cut(str(text)) for text in (message, self.fix) if text]
        super().__init__(". ".join(texts))


class ConfigError(RsdError):
    """A parameter is unknown, of the wrong type or outside its range."""

    exit_code = 2


class MissingPackageError(RsdError, ImportError):
    """An optional package is not installed."""


class DeviceError(RsdError):
    """The requested device is not there."""


class BadImageError(RsdError):
    """An image cannot be decoded safely.

    Attributes
    ----------
    id, part, reason : str
        Name of the image, the archive or folder that holds it, and what is wrong with it.
    """

    fix = "Remove it, or read with on_bad='skip' to leave it out and count it."

    def __init__(self, id, part, reason):
        super().__init__(f"image {id!r} in {part}: {reason}")
        self.id, self.part, self.reason = str(id), str(part), reason

    def __reduce__(self):  # a process pool sends errors home by their arguments
        return type(self), (self.id, self.part, self.reason)


class BadArchiveError(RsdError):
    """A zip part is damaged, hostile, or disagrees with its table."""

    fix = "Download it again."


class BadTableError(RsdError):
    """A metadata table is damaged, lacks a column, or holds contradicting rows."""

    fix = "Write or download it again."


class BadValueError(RsdError, ValueError):
    """Numbers are not usable: wrong shape, not finite, or zero where a direction is needed."""


class CacheError(RsdError):
    """A stored artefact is damaged or was made from something else."""

    fix = "Delete it and run again."


class CheckpointError(RsdError):
    """Weights do not fit the model, or a run folder holds another run."""


class ModelNotFoundError(RsdError):
    """Pretrained weights are neither given, nor stored, nor to be had."""


class FetchError(RsdError):
    """Data cannot be fetched, or what was fetched is damaged."""


class RunBusyError(RsdError):
    """Another process is writing to the same folder."""


class NotebookError(RsdError):
    """A notebook did not run to its end."""

    exit_code = 1


# What an error says of a file. Libraries raise an `OSError` without a number where it is broken.
_OF_FILES = {None, errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.EINVAL}


@contextlib.contextmanager
def refusing(causes, kind, *texts):
    """Answer what libraries raise on broken data by ``kind(*texts)``; "{}" is their reason.

    A fault of the machine, such as too many open files, says nothing of the data and passes.
    """
    try:
        yield
    except causes as error:
        if getattr(error, "errno", None) not in _OF_FILES:
            raise
        reason = str(error).partition("\n")[0]
        raise kind(*(text.replace("{}", reason) for text in texts)) from error
