"""CrystalJAX: reinforcement learning that designs crystals with direct DFT feedback.

``make("BandGap-C1-v0", evaluator=...)`` returns a gymnax environment and its parameters; ``registered_tasks()`` lists
the ids. Importing the package is light: everything is loaded when first used.
"""

import lazy_loader

from crystaljax.registration import after_import, register_gymnasium, register_gymnax

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

after_import("gymnax", register_gymnax)
after_import("gymnasium", register_gymnasium)
