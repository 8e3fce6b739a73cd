"""The errors that a user can meet. Each message says what was given, what is accepted and the way out."""


class DeployError(Exception):
    """Base of every error that this package raises on purpose."""


class ConfigError(DeployError):
    """A setting is unknown, out of range or at odds with another."""


class CheckpointError(DeployError):
    """A checkpoint cannot be fetched, or is not one that this project can deploy."""


class DataError(DeployError):
    """Images or captions are missing, unreadable or too few."""


class DiskError(DeployError):
    """A file cannot be written, or is not what was written: no other stage would fare better."""


class UnavailableError(DeployError):
    """This target cannot be built or run here. Its row stays in the table with this reason."""
