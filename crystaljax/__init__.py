"""CrystalJAX: reinforcement learning that designs crystals with direct DFT feedback.

``make("BandGap-C1-v0", evaluator=...)`` returns a gymnax environment and its parameters; ``registered_tasks()`` lists
the ids. Importing the package is light: everything is loaded when first used.
"""

import lazy_loader
from wrapt import register_post_import_hook

from crystaljax.registration import register_gymnasium, register_gymnax

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

register_post_import_hook(register_gymnax, "gymnax")
register_post_import_hook(register_gymnasium, "gymnasium")
