"""The main job: the same network with and without batch norm, each at its best, and what that says."""

from steadynorm.experiment.arms import Arm
from steadynorm.experiment.comparison import Comparison, compare
from steadynorm.experiment.saved import load_model
from steadynorm.experiment.studies import STUDIES

__all__ = ["STUDIES", "Arm", "Comparison", "compare", "load_model"]
