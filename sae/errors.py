"""The error type for a dictionary, its file or its input that cannot be used as given."""

from models.errors import ModelError


class SAEError(ModelError):
    """A user's mistake about an SAE: one line that says what, where and what to do."""
