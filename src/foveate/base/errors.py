"""The one error that users see."""


class FoveateError(ValueError):
    """A mistake of the caller, told in one sentence that says what is wrong and what to do."""
