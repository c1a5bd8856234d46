"""The errors a user can cause. Each message says what is wrong, where, and what to do about it."""


class AlignkitError(ValueError):
    """Something the user can put right; the command line prints it as one line and exits with code 2."""


class ConfigError(AlignkitError):
    """An unknown key, a value of the wrong type, or a combination that cannot work."""


class DataError(AlignkitError):
    """Videos, captions or stored pairs that cannot be used."""


class MomentError(AlignkitError):
    """What the machine could not do for a moment. Nothing is left out for it, as for a DataError: the command ends."""


class ModelError(AlignkitError):
    """Model files that are missing, damaged, or of another family."""


class CheckpointError(AlignkitError):
    """A checkpoint that does not belong to this run, or none that is whole."""
