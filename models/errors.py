"""The one error type for a model, checkpoint or tokenizer that cannot be used as given."""


class ModelError(ValueError):
    """A user's mistake about a model: one line that says what, where and what to do."""
