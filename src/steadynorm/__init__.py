"""Batch normalization for PyTorch: three verbs (measure, normalize, commit) over one noun (Moments).

The names are listed, with their types, in `__init__.pyi`; each is loaded on first use (SPEC 1), so that importing this
package costs nothing that is not used.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

__version__ = "0.1.0"
