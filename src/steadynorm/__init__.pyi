from . import activations as activations
from . import errors as errors
from . import experiment as experiment
from . import functional as functional
from . import init as init
from . import nn as nn
from . import report as report
from .experiment import compare as compare
from .moments import Moments as Moments
from .nn import BatchNorm1d as BatchNorm1d
from .nn import BatchNorm2d as BatchNorm2d
from .nn import BatchNorm3d as BatchNorm3d
from .walkthrough import explain as explain

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "Moments",
    "activations",
    "compare",
    "errors",
    "experiment",
    "explain",
    "functional",
    "init",
    "nn",
    "report",
]
__version__: str
