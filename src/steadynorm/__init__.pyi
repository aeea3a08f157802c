from . import activations as activations
from . import errors as errors
from . import experiment as experiment
from . import functional as functional
from . import init as init
from . import nn as nn
from . import population as population
from . import report as report
from . import shift as shift
from . import surgery as surgery
from .experiment import compare as compare
from .moments import Moments as Moments
from .nn import BatchNorm1d as BatchNorm1d
from .nn import BatchNorm2d as BatchNorm2d
from .nn import BatchNorm3d as BatchNorm3d
from .nn import Renorm as Renorm
from .nn import accumulate as accumulate
from .nn import average_ as average_
from .nn import domain as domain
from .nn import freeze_ as freeze_
from .nn import functional_call as functional_call
from .nn import no_commit as no_commit
from .nn import sync_ as sync_
from .nn import unfreeze_ as unfreeze_
from .population import diagnose as diagnose
from .population import recalibrate_ as recalibrate_
from .surgery import check as check
from .surgery import convert_ as convert_
from .surgery import fold as fold
from .surgery import fuse as fuse
from .surgery import insert as insert
from .surgery import revert_ as revert_
from .walkthrough import explain as explain

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "Moments",
    "Renorm",
    "accumulate",
    "activations",
    "average_",
    "check",
    "compare",
    "convert_",
    "diagnose",
    "domain",
    "errors",
    "experiment",
    "explain",
    "fold",
    "freeze_",
    "functional",
    "functional_call",
    "fuse",
    "init",
    "insert",
    "nn",
    "no_commit",
    "population",
    "recalibrate_",
    "report",
    "revert_",
    "shift",
    "surgery",
    "sync_",
    "unfreeze_",
]
__version__: str
