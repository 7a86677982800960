"""Networks, algorithms and the training runner of CrystalJAX.

Importing the package is light: everything is loaded when first used.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules={"dqn", "ppo", "rainbow", "sac"},
    submod_attrs={
        "base": ["Agent", "Records"],
        "config": ["RunConfig"],
        "networks": ["ActorCritic", "QValues", "make_network"],
        "dqn": ["make_dqn"],
        "annealing": ["make_annealing"],
        "bayesian": ["make_bayesian"],
        "exhaustive": ["make_exhaustive"],
        "gaussian_process": ["make_gaussian_process", "make_random_neutral"],
        "genetic": ["make_genetic"],
        "hybrid": ["make_hybrid"],
        "hyperparameters": [
            "AnnealingConfig",
            "BayesianConfig",
            "DQNConfig",
            "ExhaustiveConfig",
            "GaussianProcessConfig",
            "GeneticConfig",
            "HybridConfig",
            "NeutralConfig",
            "PPOConfig",
            "RainbowConfig",
            "RandomConfig",
            "SACConfig",
        ],
        "ppo": ["make_ppo"],
        "rainbow": ["make_rainbow"],
        "random_search": ["make_random_search"],
        "runner": ["RunResult", "sweep", "train"],
        "sac": ["make_sac"],
    },
)
