"""The fine-tuning driver: a configuration in, Hugging Face objects out."""

from .config import Config, load_config, parse_config
from .errors import ConfigError, DataError, ModelError, UserError
from .train import train

__all__ = ["Config", "ConfigError", "DataError", "ModelError", "UserError", "load_config", "parse_config", "train"]
