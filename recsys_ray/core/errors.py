"""Errors that a user can act on. The command line prints their message without a traceback and exits with code 2."""


class UserError(Exception):
    """Something in the input, the configuration or the environment that the user can change."""


class ConfigError(UserError):
    """A configuration that does not fit; the message names the field."""


class DataError(UserError):
    """Tables that cannot be used; the message names file, row or column, and what to do."""


class LeakError(UserError):
    """A feature that looks past its time; the message names the example, the feature and the times."""


class ArtifactError(UserError):
    """A stage's output is missing, damaged or of another version."""
