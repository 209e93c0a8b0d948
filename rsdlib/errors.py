"""The errors a user may meet. Each message says which item, why, and what to do; the command line prints it in one line."""


class RsdError(Exception):
    """Base of every error that `rsdlib` raises on purpose.

    Parameters
    ----------
    message : str
        What happened, to which item.
    fix : str, optional
        What the user can do about it; appended to the message.
    """

    def __init__(self, message, fix=None):
        super().__init__(f"{message}. {fix}" if fix else message)
        self.fix = fix


class ConfigError(RsdError):
    """A parameter is unknown, of the wrong type or outside its range."""


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

    def __init__(self, id, part, reason):
        super().__init__(f"image {id!r} in {part}: {reason}", "Remove it, or read with on_bad='skip' to leave it out and count it.")
        self.id, self.part, self.reason = str(id), str(part), reason

    def __reduce__(self):  # a process pool sends errors home by their arguments
        return type(self), (self.id, self.part, self.reason)


class BadArchiveError(RsdError):
    """A zip part is damaged, hostile, or disagrees with its table."""


class BadTableError(RsdError):
    """A metadata table is damaged, lacks a column, or holds contradicting rows."""


class BadValueError(RsdError, ValueError):
    """Numbers handed in are not usable: wrong shape, not finite, or a zero row where a direction is needed."""


class CacheError(RsdError):
    """A stored artefact is damaged or was made from something else."""


class CheckpointError(RsdError):
    """Weights do not fit the model, or a run folder holds another run."""


class ModelNotFoundError(RsdError):
    """Pretrained weights are neither given, nor stored, nor to be had."""


class RunBusyError(RsdError):
    """Another process is writing to the same run folder."""


class NotebookError(RsdError):
    """A notebook did not run to its end.

    Attributes
    ----------
    exit_code : int
        What the command line exits with.
    """

    def __init__(self, message, fix=None, exit_code=1):
        super().__init__(message, fix)
        self.exit_code = exit_code
