"""The one error that bad input raises."""


class InputError(ValueError):
    """Something the user gave is wrong: one sentence that names it and says what to do.

    The command line prints the sentence and ends with exit code 2; any other exception is a bug of ours.
    """


class TrainingError(RuntimeError):
    """Training cannot go on (its loss is not finite); the last whole epoch is kept."""


class Busy(InputError):
    """Another process works on the same folder."""
