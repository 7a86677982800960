"""From finished crystals to real DFT numbers: the gate, the bridge, the store and the engines.

Importing the package is light: everything is loaded when first used.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
