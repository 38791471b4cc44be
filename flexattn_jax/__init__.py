"""Efficient high-resolution vision-language models in JAX: FlexAttention and what it is compared with."""

from flexattn_jax.api import VisionLanguageModel, load
from flexattn_jax.reports import EncodedPicture, Generation, OptionScores, SelectionReport

__all__ = ["EncodedPicture", "Generation", "OptionScores", "SelectionReport", "VisionLanguageModel", "load"]
__version__ = "0.1.0"
