"""The package's exceptions."""


class InputError(ValueError):
    """Invalid input: one sentence that names the file or option and says what to do.

    The command line prints the sentence and exits with code 2. Any other exception is a bug in nucseg.
    """


class TrainingError(RuntimeError):
    """Training stopped because its loss is not finite; the last complete epoch is kept."""


class Busy(InputError):
    """Another process is working in the same folder."""
