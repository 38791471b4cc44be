"""The public face: load a checkpoint, ask about pictures, score options, look at logits."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from absl import logging

from flexattn_jax.checkpoints.store import open_checkpoint
from flexattn_jax.checkpoints.trees import unstack_layers
from flexattn_jax.config import IMAGE_PLACEHOLDER, VLMConfig, override
from flexattn_jax.inference.generation import Generated, generate
from flexattn_jax.inference.scoring import Scored, score
from flexattn_jax.inputs import prompts as prompt_text
from flexattn_jax.inputs.batching import Batch, BatchError, Buckets, Sample, make_batch, make_options
from flexattn_jax.inputs.images import ImageSource, load_image, preprocess
from flexattn_jax.inputs.tokenizer import Tokenizer, load_tokenizer, tokenize_continuation, tokenize_prompt
from flexattn_jax.models.vlm import VLM

NEW_TOKENS = (16, 64, 256, 1024)  # static rooms for generated tokens
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
SCORERS = ("released", "official")
DEFAULT_BUCKETS = Buckets()


@dataclasses.dataclass(frozen=True)
class SelectionReport:
    """What high resolution a sample read.

    layers: decoder layers that read it.
    cells: (len(layers), C) bool, cells that the last prompt token read in each.
    overflow: (len(layers),) int, cells over the threshold that the capacity had no room for; where options were
      scored, of the last prompt token and all tokens of the options together.
    cells_read: cells projected at all, in all layers together, over the prompt and everything after it.
    """

    layers: tuple[int, ...]
    cells: np.ndarray
    overflow: np.ndarray
    cells_read: int


@dataclasses.dataclass(frozen=True)
class Generation:
    """An answer: its text, its ids (with the end-of-sequence token if it came), and what was read for it."""

    text: str
    token_ids: list[int]
    selection: SelectionReport | None


@dataclasses.dataclass(frozen=True)
class OptionScores:
    """Mean loss of each option of a question, lower is likelier, and what was read for them."""

    losses: list[float]
    selection: SelectionReport | None


def load(
    path: str | os.PathLike,
    dtype: str | None = None,
    config_overrides: dict[str, Any] | None = None,
    vision_tower: str | os.PathLike | None = None,
    buckets: Buckets = DEFAULT_BUCKETS,
) -> VisionLanguageModel:
    """Loads a model for inference.

    Args:
      path: folder of an imported or trained checkpoint, or of published safetensors (llava, flexattn or llava-hf).
      dtype: "float32" or "bfloat16", of parameters and activations; None: float32 on CPU, else bfloat16. bfloat16
        rounds the attention map's inputs: a cell whose score lies near the threshold may be decided otherwise.
      config_overrides: dotted settings, e.g. {"flexattention.threshold": 72, "flexattention.enabled": False}.
      vision_tower: folder of the tower where published safetensors do not hold it.
      buckets: static sizes that inputs are padded to; a program is compiled for each that is met.

    Raises:
      CheckpointError: the folder is missing, incomplete or damaged.
      ConfigError: an override names no setting, or settings that do not go together.
      TokenizerError: the folder's tokeniser cannot be read.
    """
    on_cpu = jax.default_backend() == "cpu"
    # XLA's CPU programs copy each layer's weights out of a scanned stack, which makes decoding about 3 x slower.
    settings = {"dtype": dtype or ("float32" if on_cpu else "bfloat16"), "scan_layers": not on_cpu}
    checkpoint = open_checkpoint(path, vision_tower=vision_tower)
    config = override(checkpoint.config, settings | (config_overrides or {}))
    if config.flexattention is not None and config.flexattention.enabled and not config.reads_highres:
        logging.warning(
            "no layer reads high resolution: layer %d (flexattention.first_layer) would select for later ones, "
            "but the decoder has only %d",
            *(config.flexattention.first_layer, config.decoder.num_layers),
        )
    has_tokenizer = any((pathlib.Path(path) / name).is_file() for name in TOKENIZER_FILES)
    tokenizer = load_tokenizer(path) if has_tokenizer else None  # logits of ids can be had without one
    return VisionLanguageModel(config, checkpoint.params(config=config), tokenizer, buckets)


class VisionLanguageModel:
    """A model with its tokeniser. Answers do not depend on the batch that a question comes in."""

    def __init__(
        self, config: VLMConfig, params: dict, tokenizer: Tokenizer | None = None, buckets: Buckets = DEFAULT_BUCKETS
    ):
        """
        Args:
          params: as `VLM(config)` reads them, or stacked over layers as checkpoints hold them.
          tokenizer: needed for everything but `logits`.
        """
        self.config, self.tokenizer, self.buckets = config, tokenizer, buckets
        self.params = params if config.scan_layers else unstack_layers(params)
        self.model = VLM(config)
        self._generate = jax.jit(partial(generate, self.model), static_argnames="capacity")
        self._score = jax.jit(partial(score, self.model))
        self._forward = jax.jit(partial(self._logits, self.model), static_argnames="capture")

    def answer(
        self, images: Sequence[ImageSource | None], questions: Sequence[str], max_new_tokens: int = 64
    ) -> list[str]:
        """Answers questions, one picture (or None) each, greedily; any number of them.

        Raises:
          ImageError: a picture cannot be read.
          BatchError: the lists differ in length, or a prompt is too long.
        """
        prompts = self._prompts(images, questions)
        return [generation.text for generation in self.generate_prompts(images, prompts, max_new_tokens)]

    def score(
        self,
        images: Sequence[ImageSource | None],
        questions: Sequence[str],
        options: Sequence[Sequence[str]],
        scorer: str = "released",
    ) -> list[list[float]]:
        """Mean loss of each option of each question; the lowest is the model's choice.

        Args:
          scorer: "released" (FlexAttention's script: asks for a single word or phrase, end of sequence not counted) or
            "official" (V* Bench's: the bare question, end of sequence counted).
        """
        _check_lists(images=images, questions=questions, options=options)
        _check_options(options)
        prompts = self._prompts(images, [scorer_question(scorer, question) for question in questions])
        continuations = [[scorer_continuation(scorer, option) for option in sample] for sample in options]
        return [scores.losses for scores in self.score_prompts(images, prompts, continuations)]

    def generate_prompts(
        self, images: Sequence[ImageSource | None], prompts: Sequence[str], max_new_tokens: int = 64
    ) -> list[Generation]:
        """Continues whole prompts, "<image>" where the picture goes; see `answer`."""
        _check_lists(images=images, prompts=prompts)
        if max_new_tokens < 1 or max_new_tokens > NEW_TOKENS[-1]:
            raise BatchError(f"max_new_tokens is {max_new_tokens}; it must lie in 1..{NEW_TOKENS[-1]}")
        capacity = next(size for size in NEW_TOKENS if size >= max_new_tokens)
        generations = []
        for first, batch, count in self._batches(images, prompts):
            active = np.arange(len(batch.lengths)) < count
            result: Generated = self._run(self._generate, batch, active, np.int32(max_new_tokens), capacity=capacity)
            tokens, lengths = np.asarray(result.tokens), np.asarray(result.counts)
            for row in range(count):
                ids = tokens[row, : lengths[row]].tolist()
                report = self._report(result, row, prompts[first + row])
                generations.append(Generation(self.tokenizer.decode(ids).strip(), ids, report))
        return generations

    def score_prompts(
        self, images: Sequence[ImageSource | None], prompts: Sequence[str], continuations: Sequence[Sequence[str]]
    ) -> list[OptionScores]:
        """Scores texts that are appended verbatim to whole prompts; see `score`."""
        _check_lists(images=images, prompts=prompts, continuations=continuations)
        _check_options(continuations)
        scores = []
        for first, batch, count in self._batches(images, prompts):
            texts = continuations[first : first + count]
            ids = [
                [tokenize_continuation(self.tokenizer, prompt, text) for text in sample]
                for prompt, sample in zip(prompts[first : first + count], texts, strict=True)
            ]
            options = make_options(ids, self.config, self.buckets, pad_batch_to=len(batch.lengths))
            result: Scored = self._run(self._score, batch, options)
            losses = np.asarray(result.losses)
            for row, sample in enumerate(texts):
                values = losses[row, : len(sample)].tolist()
                scores.append(OptionScores(values, self._report(result, row, prompts[first + row])))
        return scores

    def logits(
        self,
        images_or_pixels: Any,
        input_ids: Any,
        image_sizes: Sequence[tuple[int, int]] | None = None,
        capture: Sequence[str] = (),
    ) -> Any:
        """Logits of every position of the expanded sequence; the last one of each sample reads high resolution.

        Args:
          images_or_pixels: pictures (or None) as for `answer`, or pixels (B, 3, S, S), already normalised; None: no
            sample has a picture.
          input_ids: (B, n) or lists of different lengths, the picture as -200 or as the checkpoint's image tokens.
          image_sizes: (width, height) before padding, for pixels; None: the picture fills the square.
          capture: names of intermediates to return: "cells" (layers, B, 1, C) bool made by layers first_layer ..;
            "map" (layers, B, 1, N), "overflow", "strength"; "hidden" and "attention" (L, B, T, D); "lowres" (B, N, D),
            "highres" (B, M, D), "lowres_features", "lowres_pixels", "highres_cos", "highres_sin"; with grouping
            "groups" (B, N) int32, the group of each patch.

        Returns:
          (B, T, V) float32, T the longest expanded prompt (positions beyond a sample's own length are meaningless);
          with `capture`, that and a dict of the named arrays.
        """
        samples = self._samples_from_ids(images_or_pixels, input_ids, image_sizes)
        batch = make_batch(samples, self.config, self.buckets, pad_batch_to=len(samples))
        logits, named = self._run(self._forward, batch, capture=bool(capture))
        unknown = [name for name in capture if name not in named]
        if unknown:
            raise KeyError(f"no intermediate {', '.join(unknown)} here; there are {', '.join(sorted(named))}")
        logits = logits[:, : int(batch.lengths.max())]
        return (logits, {name: named[name] for name in capture}) if capture else logits

    @staticmethod
    def _logits(model: VLM, params: dict, batch: Batch, capture: bool):
        return model.apply({"params": params}, batch, capture=capture)

    def _run(self, program: Callable, *args: Any, **static: Any) -> Any:
        precision = "highest" if self.config.dtype == "float32" else None
        with jax.default_matmul_precision(precision):
            return program(self.params, *args, **static)

    def _prompts(self, images: Sequence[ImageSource | None], questions: Sequence[str]) -> list[str]:
        _check_lists(images=images, questions=questions)
        return [
            prompt_text.build_prompt(question, with_image=image is not None)
            for image, question in zip(images, questions, strict=True)
        ]

    def _batches(
        self, images: Sequence[ImageSource | None], prompts: Sequence[str]
    ) -> Iterator[tuple[int, Batch, int]]:
        """(index of the first sample, batch, number of real samples), pictures decoded batch by batch."""
        if self.tokenizer is None:
            raise BatchError(
                "this model came without a tokeniser, so it reads ids (`logits`) but no text; put the published "
                f"checkpoint's {' or '.join(TOKENIZER_FILES)} into its folder and load it again"
            )
        size = self.buckets.batch_sizes[-1]
        for first in range(0, len(prompts), size):
            samples = [
                self._sample(image, tokenize_prompt(self.tokenizer, prompt))
                for image, prompt in zip(images[first : first + size], prompts[first : first + size], strict=True)
            ]
            yield first, make_batch(samples, self.config, self.buckets), len(samples)

    def _sample(self, image: ImageSource | None, ids: Sequence[int]) -> Sample:
        return Sample(ids) if image is None else Sample(ids, *preprocess(load_image(image), self.config))

    def _samples_from_ids(self, pictures: Any, input_ids: Any, sizes: Any) -> list[Sample]:
        rows = [np.asarray(row) for row in input_ids]
        if pictures is None:
            return [Sample(row) for row in rows]
        _check_lists(images_or_pixels=pictures, input_ids=rows)
        if not hasattr(pictures, "ndim"):
            return [self._sample(image, row) for image, row in zip(pictures, rows, strict=True)]
        if sizes is None:
            sizes = [None] * len(rows)
        _check_lists(image_sizes=sizes, input_ids=rows)
        marks = (IMAGE_PLACEHOLDER, self.config.image_token_id)
        return [
            Sample(row, np.asarray(pixels, np.float32), size)
            if np.isin(row, [m for m in marks if m]).any()
            else Sample(row)
            for row, pixels, size in zip(rows, pictures, sizes, strict=True)
        ]

    def _report(self, result: Generated | Scored, row: int, prompt: str) -> SelectionReport | None:
        if result.cells is None or prompt_text.IMAGE_TAG not in prompt:
            return None
        flex, layers = self.config.flexattention, self.config.decoder.num_layers
        return SelectionReport(
            layers=tuple(range(flex.first_layer + 1, layers)),
            cells=np.asarray(result.cells[:, row]),
            overflow=np.asarray(result.overflow[:, row]),
            cells_read=int(result.cells_read[row]),
        )


def scorer_question(scorer: str, question: str) -> str:
    """The question as a scorer of V* Bench puts it."""
    if scorer not in SCORERS:
        raise ValueError(f"scorer is {scorer!r}; it must be one of {', '.join(SCORERS)}")
    return question + prompt_text.SHORT_ANSWER if scorer == "released" else question


def scorer_continuation(scorer: str, option: str) -> str:
    """What a scorer of V* Bench appends to the prompt for an option, and takes the loss on."""
    return f" {option}" if scorer == "released" else f" {option}{prompt_text.END_OF_ANSWER}"


def _check_options(options: Sequence[Sequence[str]]) -> None:
    if any(isinstance(sample, str) or not all(isinstance(text, str) for text in sample) for sample in options):
        raise BatchError('options must be a list of texts for each question, e.g. [["red", "blue"]] for one question')


def _check_lists(**lists: Sequence[Any]) -> None:
    for name, values in lists.items():
        if isinstance(values, (str, bytes)) or not hasattr(values, "__len__"):
            raise BatchError(f"{name} must be a list with an entry for each question, not {type(values).__name__}")
    lengths = {name: len(values) for name, values in lists.items()}
    if len(set(lengths.values())) > 1:
        raise BatchError("lists differ in length: " + ", ".join(f"{n} {name}" for name, n in lengths.items()))
