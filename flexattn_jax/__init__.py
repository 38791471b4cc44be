"""Efficient high-resolution vision-language models in JAX: FlexAttention and what it is compared with."""

from flexattn_jax.api import Generation, OptionScores, SelectionReport, VisionLanguageModel, load

__all__ = ["Generation", "OptionScores", "SelectionReport", "VisionLanguageModel", "load"]
__version__ = "0.1.0"
