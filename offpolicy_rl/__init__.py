"Off-policy reinforcement learning for language models: every estimator derived, proved on an exactly solvable toy, played with, and run on a real model."
__version__ = "0.1.0"

from .core import VOCABULARY, Range, call, catalogue, knobs, method
from .recipes import Recipe, recipe, systems

__all__ = ["VOCABULARY", "Range", "Recipe", "call", "catalogue", "knobs", "method", "recipe", "systems"]
