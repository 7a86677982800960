"""Networks, algorithms and the training runner of CrystalJAX.

Importing the package is light: everything is loaded when first used.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "base": ["Agent", "Records"],
        "config": ["RunConfig"],
        "networks": ["ActorCritic", "QValues", "make_network"],
        "ppo": ["PPOConfig", "make_ppo", "make_train"],
        "random_search": ["RandomConfig", "make_random_search"],
        "runner": ["RunResult", "train"],
    },
)
