"""The package's exceptions."""


class InputError(ValueError):
    """Invalid input: one sentence that names the file or option and says what to do.

    The command line prints the sentence and exits with code 2. Any other exception is a bug in nucseg.
    """


class TrainingError(RuntimeError):
    """Training stopped because its loss is not finite; the last complete epoch is kept."""


class Busy(InputError):
    """Another process is working in the same folder."""


class Notice(UserWarning):
    """A warning for the user, in one sentence and shown once; the work continues."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error reports that main memory or GPU memory is full."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # PyTorch's, without importing it
        return True
    return isinstance(error, RuntimeError) and "out of memory" in str(error).lower()
