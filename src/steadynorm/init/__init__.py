"""He initialisation for any activation, and the theory that says how far it carries."""

from steadynorm.init.models import Initialization, LayerInit, initialize_
from steadynorm.init.tensors import he_normal_, he_uniform_
from steadynorm.init.theory import gain, mean_field, slope

__all__ = [
    "Initialization",
    "LayerInit",
    "gain",
    "he_normal_",
    "he_uniform_",
    "initialize_",
    "mean_field",
    "slope",
]
