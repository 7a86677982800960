"""From finished crystals to real DFT numbers: the gate, the bridge, the store and the engines.

Importing the package is light: everything is loaded when first used.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "accounting": ["Budget", "Stats"],
        "bridge": ["Bridge"],
        "evaluators": ["open_bridge"],
        "keys": ["Request"],
        "limits": ["Limits"],
        "store": ["Store"],
    },
)
