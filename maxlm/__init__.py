"""maxlm trains large language models in JAX, on any mesh of TPUs, GPUs or (for tests) fake CPU devices.

import maxlm

config = maxlm.load_config("configs/quickstart.yaml", ["train.steps=100"])
result = maxlm.train(config)
"""

import importlib
from typing import TYPE_CHECKING, Any

from maxlm.config import Config
from maxlm.config_file import ConfigError, load_config, parse_config

if TYPE_CHECKING:
    from maxlm.loss import cross_entropy
    from maxlm.trainer import Result, train

__version__ = "0.1.0"
__all__ = ["Config", "ConfigError", "Result", "cross_entropy", "load_config", "parse_config", "train"]


def __getattr__(name: str) -> Any:
    """Loads what needs JAX on first use, so that `maxlm config` and workers of a data build start at once."""
    home = {"train": "maxlm.trainer", "Result": "maxlm.trainer", "cross_entropy": "maxlm.loss"}.get(name)
    if home:
        return getattr(importlib.import_module(home), name)
    raise AttributeError(f"module 'maxlm' has no attribute '{name}'")
