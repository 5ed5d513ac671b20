"""The errors that users meet, one class per way to react to them.

Each message has three parts: *what* happened (with the qualified name of the module, parameter or hyperparameter),
*why*, and the *remedy*. Misses of one kind are collected and told together. The command line prints a `StnError` as one
red message and exits with 1; anything else is a bug of stn_fx and keeps its traceback.
"""


class StnError(Exception):
    """Base class of every error that stn_fx raises on purpose. Its message says what, why, and the remedy."""


class CaptureError(StnError):
    """The model cannot be captured as a graph. React: change the forward that the message names, or the inputs.

    ``module`` is the qualified name of the submodule that is at fault; "" where that is unknown or the model itself.
    """

    def __init__(self, message: str, module: str = "") -> None:
        super().__init__(message)
        self.module = module


class BatchLayoutError(StnError):
    """An axis that holds the batch is not decided. React: name it with `batch_axis`, or leave the place out."""


class UnknownHyperparameterError(StnError):
    """A hyperparameter is not in the catalogue, or matches nothing in this model. React: use one of those listed."""


class OutOfBoundsError(StnError, ValueError):
    """A value lies at or outside the bounds of its hyperparameter. React: change the value or the bounds."""


class DivergedError(StnError, ArithmeticError):
    """A loss or a gradient is not finite. React: lower the learning rate that the message names, or resume earlier."""


class CheckpointError(StnError):
    """A checkpoint does not fit. React: build the wrapper with the hyperparameters that the message names."""


class InputError(StnError, ValueError):
    """An argument or a datum is not usable as given. React: correct it as the message says."""
