"""4-bit layers under bitsandbytes' names."""

from pyquant.nn.linear import Linear4bit, LinearFP4, LinearNF4
from pyquant.nn.parameter import Params4bit

__all__ = ["Linear4bit", "LinearFP4", "LinearNF4", "Params4bit"]
