"""Every exception and warning that steadynorm raises on purpose, on one screen.

    SteadynormError
    ├── ArgumentError (ValueError)          a value that cannot be used
    │   ├── ShapeError                      the sizes of the tensors do not fit together
    │   │   └── SingleValueError            a training batch with one value per channel
    │   ├── WeightError                     a negative or non-finite sample weight
    │   └── UnknownActivationError          an activation that cannot be fused
    ├── DtypeError (TypeError)              a dtype that has no batch statistics, or a mixture of them
    ├── DeviceError (ValueError)            tensors on different devices
    ├── DataError (ValueError)              a file or data set that cannot be read as asked
    ├── ModelError (ValueError)             a model, factory or saved model that cannot be used as asked
    ├── BackendError (RuntimeError)         a backend asked for by name that computes wrongly here, or not at all
    ├── DistributedError (RuntimeError)     a collective failed: a rank has gone, or the groups do not match
    ├── RecomputationError (RuntimeError)   a forward run again that can no longer be what it was
    ├── TransformError (RuntimeError)       a torch.func transform that leaves nowhere to write statistics
    └── MissingDependencyError (ImportError)  an optional extra that is not installed

    SteadynormWarning (UserWarning)
    ├── BackendWarning                      kernels that were tried on a device, and are not used
    ├── ConversionWarning                   a layer is turned into one that computes something else
    ├── RejectedBatchWarning                a batch whose statistics were kept out of the running ones
    └── StaleStatisticsWarning              averaged weights beside running statistics that were left behind

A message says what was required, what arrived, and what to do about it. Each error also is the built-in (or torch's)
kind that a caller would have caught before, so `except ValueError` around a layer goes on working.
"""

__all__ = [
    "ArgumentError",
    "BackendError",
    "BackendWarning",
    "ConversionWarning",
    "DataError",
    "DeviceError",
    "DistributedError",
    "DtypeError",
    "MissingDependencyError",
    "ModelError",
    "RecomputationError",
    "RejectedBatchWarning",
    "ShapeError",
    "SingleValueError",
    "StaleStatisticsWarning",
    "SteadynormError",
    "SteadynormWarning",
    "TransformError",
    "UnknownActivationError",
    "WeightError",
]


class SteadynormError(Exception):
    """The root: catches whatever this package raises on purpose."""


class ArgumentError(SteadynormError, ValueError):
    """An argument has a value that cannot be used."""


class ShapeError(ArgumentError):
    """The sizes of the tensors do not fit together."""


class SingleValueError(ShapeError):
    """A training batch holds one value per channel, so it has no variance to normalise by."""


class WeightError(ArgumentError):
    """A sample weight is negative or not finite."""


class UnknownActivationError(ArgumentError):
    """The activation is none of those that can be fused into the layer."""


class DtypeError(SteadynormError, TypeError):
    """A dtype that has no batch statistics, or tensors of dtypes that do not go together."""


class DeviceError(SteadynormError, ValueError):
    """Tensors that must be on one device are on several."""


class DataError(SteadynormError, ValueError):
    """A file or data set cannot be read as asked."""


class ModelError(SteadynormError, ValueError):
    """A model, a model factory or a saved model cannot be used as asked."""


class BackendError(SteadynormError, RuntimeError):
    """A backend that was asked for by name computes wrongly on this device, or not at all."""


class DistributedError(SteadynormError, RuntimeError):
    """A collective failed: a rank has gone, or the groups do not match."""


class RecomputationError(SteadynormError, RuntimeError):
    """Activation checkpointing runs a forward again, and what it was made from is no longer known."""


class TransformError(SteadynormError, RuntimeError):
    """Under this torch.func transform there is nowhere to write running statistics; the message says what to call."""


class MissingDependencyError(SteadynormError, ImportError):
    """An optional dependency is needed and not installed; the message names the extra that brings it."""


class SteadynormWarning(UserWarning):
    """The root of this package's warnings."""


class BackendWarning(SteadynormWarning):
    """Kernels failed their trial on a device: torch's own operations compute there, more slowly."""


class ConversionWarning(SteadynormWarning):
    """A layer is being converted into one that lacks an option it has, and so computes something else."""


class RejectedBatchWarning(SteadynormWarning):
    """A batch was not finite (or too wide for the buffer), so the running statistics stayed as they were."""


class StaleStatisticsWarning(SteadynormWarning):
    """An averaged model evaluates by running statistics that its average of the weights has left behind."""
