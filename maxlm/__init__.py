"""maxlm trains large language models in JAX, on any mesh of TPUs, GPUs or (for tests) fake CPU devices.

import maxlm

config = maxlm.load_config("configs/quickstart.yaml", ["train.steps=100"])
result = maxlm.train(config)
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from maxlm.config import Config
    from maxlm.config_file import ConfigError, load_config, parse_config
    from maxlm.loss import cross_entropy
    from maxlm.trainer import Result, train

__version__ = "0.1.0"
__all__ = ["Config", "ConfigError", "Result", "cross_entropy", "load_config", "parse_config", "train"]


_HOMES = {
    "maxlm.config": ("Config",),
    "maxlm.config_file": ("ConfigError", "load_config", "parse_config"),
    "maxlm.loss": ("cross_entropy",),
    "maxlm.trainer": ("Result", "train"),
}


def __getattr__(name: str) -> Any:
    """Loads things on first use, so that commands and workers of a data build start at once."""
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(home), name)
    raise AttributeError(f"module 'maxlm' has no attribute '{name}'")
