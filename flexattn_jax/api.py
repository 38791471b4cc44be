"""The public face: load a checkpoint, ask about pictures, score options, look at logits."""

from __future__ import annotations

import os
import pathlib
import string
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from flexattn_jax.checkpoints.quantize import quantize
from flexattn_jax.checkpoints.store import open_checkpoint
from flexattn_jax.checkpoints.trees import param_shapes, unstack_layers
from flexattn_jax.config import IMAGE_PLACEHOLDER, VLMConfig, override
from flexattn_jax.config_parts import require
from flexattn_jax.inference.generation import Generated, Sampling, advance, generate, start
from flexattn_jax.inference.reading import Prompts, can_share, read_beginning
from flexattn_jax.inference.scoring import Scored, score
from flexattn_jax.inputs import prompts as prompt_text
from flexattn_jax.inputs.batching import Batch, BatchError, Buckets, Sample, make_batch, make_options
from flexattn_jax.inputs.images import ImageSource, load_image, preprocess
from flexattn_jax.inputs.tokenizer import Tokenizer, load_tokenizer, tokenize_continuation, tokenize_prompt
from flexattn_jax.models.vlm import VLM, Features, Memory
from flexattn_jax.partitioning import Partition
from flexattn_jax.reports import EncodedPicture, Generation, OptionScores, SelectionReport
from flexattn_jax.requests import (
    check_capture,
    check_ids,
    check_lists,
    check_new_tokens,
    check_options,
    check_pixels,
    check_sampling,
    check_texts,
    scorer_continuation,
    scorer_question,
)

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
DEFAULT_BUCKETS = Buckets()
Picture = ImageSource | EncodedPicture
UNSETTLED = "\N{REPLACEMENT CHARACTER}" + string.whitespace  # at the end of a stream: half a character, or the end


def load(
    path: str | os.PathLike,
    dtype: str | None = None,
    config_overrides: dict[str, Any] | None = None,
    vision_tower: str | os.PathLike | None = None,
    buckets: Buckets = DEFAULT_BUCKETS,
    partition: Partition | None = None,
    weights: str | None = None,
) -> VisionLanguageModel:
    """Loads a model for inference.

    Args:
      path: folder of an imported or trained checkpoint, or of published safetensors (llava, flexattn or llava-hf).
      dtype: "float32" or "bfloat16", of parameters and activations; None: float32 on CPU, else bfloat16. bfloat16
        rounds the attention map's inputs: a cell whose score lies near the threshold may be decided otherwise.
      config_overrides: dotted settings, e.g. {"flexattention.threshold": 72, "flexattention.enabled": False}.
      vision_tower: folder of the tower where published safetensors do not hold it.
      buckets: static sizes that inputs are padded to; a program is compiled for each that is met.
      partition: devices of this process that share the work (`partitioning.make_partition`); None: the first one.
      weights: "int8": the decoder's matrices in eight bits, a quarter of float32's memory; changes answers a little,
        see `checkpoints/quantize.py`. None: as `dtype` says.

    Raises:
      CheckpointError: the folder is missing, incomplete or damaged.
      ConfigError: an override names no setting, settings that do not go together, unknown `weights`, or `buckets` or a
        `partition` of another kind.
      TokenizerError: the folder's tokeniser cannot be read.
    """
    require(isinstance(buckets, Buckets), f"buckets is {buckets!r}; it must be inputs.batching.Buckets(...)")
    require(
        partition is None or isinstance(partition, Partition),
        f"partition is {partition!r}; it must be what partitioning.make_partition gives, or None",
    )
    on_cpu = jax.default_backend() == "cpu"
    # XLA's CPU programs copy each layer's weights out of a scanned stack, which makes decoding about 3 x slower.
    settings = {"dtype": dtype or ("float32" if on_cpu else "bfloat16"), "scan_layers": not on_cpu}
    checkpoint = open_checkpoint(path, vision_tower=vision_tower)
    config = override(override(checkpoint.config, settings), config_overrides)
    if config.flexattention is not None and config.flexattention.enabled and not config.reads_highres:
        logging.warning(
            "no layer reads high resolution: layer %d (flexattention.first_layer) would select for later ones, "
            "but the decoder has only %d",
            *(config.flexattention.first_layer, config.decoder.num_layers),
        )
    has_tokenizer = any((pathlib.Path(path) / name).is_file() for name in TOKENIZER_FILES)
    tokenizer = load_tokenizer(path) if has_tokenizer else None  # logits of ids can be had without one
    shardings = None if partition is None else partition.state_shardings(param_shapes(config))
    params = quantize(checkpoint.params(config=config, shardings=shardings), weights)
    return VisionLanguageModel(config, params, tokenizer, buckets, partition)


class VisionLanguageModel:
    """A model with its tokeniser. Answers do not depend on the batch that a question comes in.

    All methods raise ImageError for a picture that cannot be read, TokenizerError for a text that is too long to be
    tokenised, and BatchError for all else that is wrong with what they are given: lists of another kind or of different
    lengths, a prompt that is too long, an option or number out of its range, a picture that another model encoded, text
    where there is no tokeniser; and for weights whose logits are not finite, but in `logits` and `score_prompts`.
    """

    def __init__(
        self,
        config: VLMConfig,
        params: dict,
        tokenizer: Tokenizer | None = None,
        buckets: Buckets = DEFAULT_BUCKETS,
        partition: Partition | None = None,
    ):
        """
        Args:
          params: as `VLM(config)` reads them, or stacked over layers as checkpoints hold them.
          tokenizer: needed for everything but `logits`.
          partition: where `params` lie; None: on one device.
        """
        self._partition = partition
        self.config, self.tokenizer, self.buckets = config, tokenizer, buckets
        self.params = params if config.scan_layers else unstack_layers(params)
        self.model = VLM(config)
        traced = partition.traced if partition is not None else lambda function: function
        self._generate = jax.jit(traced(partial(generate, self.model)), static_argnames="capacity")
        self._start = jax.jit(traced(partial(start, self.model)), static_argnames="capacity")
        self._advance = jax.jit(traced(partial(advance, self.model)), donate_argnums=1)
        self._score = jax.jit(traced(partial(score, self.model)))
        self._forward = jax.jit(traced(partial(self._logits, self.model)), static_argnames="capture")
        self._encode = jax.jit(traced(lambda params, x: self.model.apply({"params": params}, x, method=VLM.encode)[0]))
        self._begin = jax.jit(traced(partial(read_beginning, self.model)))

    def encode(self, images: Sequence[ImageSource]) -> list[EncodedPicture]:
        """Sees pictures once, for any number of questions: an entry takes the place of its picture in every call.

        Questions about it then cost neither tower nor connector, and those whose prompts begin alike (all that `answer`
        and `score` ask do) share what the decoder makes of the beginning, the picture's tokens included. Answers are
        the same. It stays on the device while it is referred to: counted for 7B at 1008 px in bfloat16, 0.05 GB of
        features and 0.32 GB for each beginning.
        """
        check_lists(images=images)
        encoded, size = [], self.buckets.batch_sizes[-1]
        for first in range(0, len(images), size):
            seen = [preprocess(load_image(image), self.config) for image in images[first : first + size]]
            rows = self.buckets.batch_size(len(seen))
            pixels = np.zeros((rows, 3, self.config.image_size, self.config.image_size), np.float32)
            for row, (values, _) in enumerate(seen):
                pixels[row] = values
            features = self._run(self._encode, rows, pixels)
            for row, (_, original) in enumerate(seen):
                own = jax.tree.map(lambda x, row=row: x[row : row + 1], features)
                encoded.append(EncodedPicture(original, own, self))
        return encoded

    def answer(
        self,
        images: Sequence[Picture | None],
        questions: Sequence[str],
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | Sequence[int] = 0,
    ) -> list[str]:
        """Answers questions, one picture (or None) each; any number of them.

        Args:
          images: pictures, or what `encode` made of them.
          temperature: 0: greedy; else tokens are drawn from softmax(logits / temperature).
          top_p: draw among the likeliest tokens that hold this share of the probability together; 1: among all.
          seed: of the draws, in 0..2**32 - 1, one for all questions or one for each. An answer is a function of
            picture, question and seed, whatever batch they come in.
        """
        prompts = self._prompts(images, questions)
        generations = self.generate_prompts(images, prompts, max_new_tokens, temperature, top_p, seed)
        return [generation.text for generation in generations]

    def stream(
        self,
        image: Picture | None,
        question: str,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> Iterator[str]:
        """One answer, piece by piece as its tokens come; the pieces together are what `answer` gives.

        But for bytes that later turn out to be no text: `answer` has replacement characters in their places.
        """
        prompts = self._prompts([image], [question])
        capacity, sampling = check_new_tokens(max_new_tokens), check_sampling(temperature, top_p, seed, 1)
        return self._pieces(image, prompts[0], max_new_tokens, capacity, sampling)

    def _pieces(
        self, image: Picture | None, prompt: str, limit: int, capacity: int, sampling: Sampling
    ) -> Iterator[str]:
        ((_, prompts, _),) = self._batches([image], [prompt])
        rows = len(prompts.batch.lengths)
        active, sampling = np.arange(rows) < 1, _padded_seeds(sampling, rows)
        state, shown = self._run(self._start, rows, prompts, active, sampling, capacity=capacity), 0
        self._check_finite(state.finite[:1])
        for count in range(1, limit + 1):
            if count > 1:
                state = self._run(self._advance, rows, state, np.int32(count), sampling)
            last = count == limit or not state.running[0]
            text = self.tokenizer.decode(np.asarray(state.tokens[0, :count]).tolist())
            text = text.strip() if last else text.strip().rstrip(UNSETTLED)
            if len(text) > shown:
                yield text[shown:]
                shown = len(text)
            if last:
                return

    def score(
        self,
        images: Sequence[Picture | None],
        questions: Sequence[str],
        options: Sequence[Sequence[str]],
        scorer: str = "released",
    ) -> list[list[float]]:
        """Mean loss of each option of each question; the lowest is the model's choice.

        Args:
          scorer: "released" (FlexAttention's script: asks for a single word or phrase, end of sequence not counted) or
            "official" (V* Bench's: the bare question, end of sequence counted).
        """
        check_lists(images=images, questions=questions, options=options)
        check_options(options)
        prompts = self._prompts(images, [scorer_question(scorer, question) for question in questions])
        continuations = [[scorer_continuation(scorer, option) for option in sample] for sample in options]
        losses = [scores.losses for scores in self.score_prompts(images, prompts, continuations)]
        self._check_finite(np.isfinite([loss for sample in losses for loss in sample]))
        return losses

    def generate_prompts(
        self,
        images: Sequence[Picture | None],
        prompts: Sequence[str],
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | Sequence[int] = 0,
    ) -> list[Generation]:
        """Continues whole prompts, "<image>" where the picture goes; see `answer`."""
        check_lists(images=images, prompts=prompts)
        check_texts("prompts", prompts)
        capacity = check_new_tokens(max_new_tokens)
        sampling = check_sampling(temperature, top_p, seed, len(prompts))
        generations = []
        for first, read, count in self._batches(images, prompts):
            rows = len(read.batch.lengths)
            own = _padded_seeds(sampling.replace(seed=sampling.seed[first : first + count]), rows)
            active = np.arange(rows) < count
            result: Generated = self._run(
                self._generate, rows, read, active, np.int32(max_new_tokens), own, capacity=capacity
            )
            tokens, lengths = np.asarray(result.tokens), np.asarray(result.counts)
            self._check_finite(result.finite[:count])
            for row in range(count):
                ids = tokens[row, : lengths[row]].tolist()
                report = self._report(result, row, prompts[first + row])
                generations.append(Generation(self.tokenizer.decode(ids).strip(), ids, report))
        return generations

    def score_prompts(
        self, images: Sequence[Picture | None], prompts: Sequence[str], continuations: Sequence[Sequence[str]]
    ) -> list[OptionScores]:
        """Scores texts that are appended verbatim to whole prompts; see `score`. A loss may be NaN or infinite here."""
        check_lists(images=images, prompts=prompts, continuations=continuations)
        check_texts("prompts", prompts)
        check_options(continuations)
        scores = []
        for first, read, count in self._batches(images, prompts):
            texts = continuations[first : first + count]
            ids = [
                [tokenize_continuation(self.tokenizer, prompt, text) for text in sample]
                for prompt, sample in zip(prompts[first : first + count], texts, strict=True)
            ]
            options = make_options(ids, self.config, self.buckets, pad_batch_to=len(read.batch.lengths))
            result: Scored = self._run(self._score, len(read.batch.lengths), read, options)
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
          images_or_pixels: pictures, what `encode` made of them (or None) as for `answer`, or pixels (B, 3, S, S),
            already normalised; None: no sample has a picture.
          input_ids: (B, n) or lists of different lengths, the picture as -200 or as the checkpoint's image tokens.
          image_sizes: (width, height) before padding, for pixels; None: the picture fills the square.
          capture: names of intermediates to return. Of layers first_layer .., (layers, B, 1, ...): "cells" (C) bool,
            "map" (N) and "strength" (C) float32, "overflow" () int32. Of all L layers: "hidden" and "attention",
            (L, B, T', D), T' the padded length. Of pictures: "lowres" (B, N, D), "highres" (B, M, D),
            "lowres_features" (B, N, Dv), "lowres_pixels" (B, 3, s, s), "highres_cos" and "highres_sin" (B, M, d/2);
            with grouping "groups" (B, N) int32, the group of each patch.

        Returns:
          (B, T, V) float32 as they come, NaN and infinity included, T the longest expanded prompt (positions beyond a
          sample's own length are meaningless); with `capture`, that and a dict of the named arrays.
        """
        check_capture(capture)
        samples = self._samples_from_ids(images_or_pixels, input_ids, image_sizes)
        batch = make_batch(samples, self.config, self.buckets, pad_batch_to=len(samples))
        features = None
        if any(sample.encoded for sample in samples):
            features = self._features(self._all_encoded(images_or_pixels), len(samples))
            batch = batch.replace(pixels=None)
        args = len(samples), batch, features
        if capture:  # before compiling, which takes much longer than to find out what there is
            _, known = self._run(self._forward.eval_shape, *args, capture=True)
            unknown = [name for name in capture if name not in known]
            if unknown:
                raise BatchError(f"no intermediate {', '.join(unknown)} here; there are {', '.join(sorted(known))}")
        logits, named = self._run(self._forward, *args, capture=bool(capture))
        logits = logits[:, : int(batch.lengths.max())]
        return (logits, {name: named[name] for name in capture}) if capture else logits

    @staticmethod
    def _logits(model: VLM, params: dict, batch: Batch, features: Features | None, capture: bool):
        return model.apply({"params": params}, batch, features, capture=capture)

    def _run(self, program: Callable, samples: int, *args: Any, **static: Any) -> Any:
        if self._partition is not None:
            args = jax.device_put(args, self._partition.batch_shardings(args, samples))
        precision = "highest" if self.config.dtype == "float32" else None
        with jax.default_matmul_precision(precision):
            return program(self.params, *args, **static)

    def _prompts(self, images: Sequence[Picture | None], questions: Sequence[str]) -> list[str]:
        check_lists(images=images, questions=questions)
        check_texts("questions", questions)
        return [
            prompt_text.build_prompt(question, with_image=image is not None)
            for image, question in zip(images, questions, strict=True)
        ]

    def _batches(self, images: Sequence[Picture | None], prompts: Sequence[str]) -> Iterator[tuple[int, Prompts, int]]:
        """(index of the first sample, what is to be read, number of real samples), pictures decoded batch by batch."""
        if self.tokenizer is None:
            raise BatchError(
                "this model came without a tokeniser, so it reads ids (`logits`) but no text; put the published "
                f"checkpoint's {' or '.join(TOKENIZER_FILES)} into its folder and load it again"
            )
        size = self.buckets.batch_sizes[-1]
        for first in range(0, len(prompts), size):
            ids = [tokenize_prompt(self.tokenizer, prompt) for prompt in prompts[first : first + size]]
            yield first, self._read(images[first : first + size], ids), len(ids)

    def _read(self, pictures: Sequence[Picture | None], ids: Sequence[list[int]]) -> Prompts:
        """A batch of prompts as programs read them."""
        encoded = any(isinstance(picture, EncodedPicture) for picture in pictures)
        pictures = self._all_encoded(pictures) if encoded else pictures
        samples = [self._sample(picture, own) for picture, own in zip(pictures, ids, strict=True)]
        batch = make_batch(samples, self.config, self.buckets)
        if not encoded:
            return Prompts(batch)
        if self._partition is None and can_share(self.config) and all(picture is not None for picture in pictures):
            places = [own.index(IMAGE_PLACEHOLDER) + 1 for own in ids]
            if len(set(places)) == 1 and all(len(own) > places[0] for own in ids):
                return self._continued(pictures, ids, places[0])
        return Prompts(batch, self._features(pictures, len(batch.lengths)))

    def _continued(self, pictures: Sequence[EncodedPicture], ids: Sequence[list[int]], place: int) -> Prompts:
        """Prompts whose beginnings, `place` ids, have been read, or are read here, once for each picture."""
        batch = make_batch([Sample(own[place:]) for own in ids], self.config, self.buckets)
        beginnings = [self._beginning(p, tuple(own[:place])) for p, own in zip(pictures, ids, strict=True)]
        spare = len(batch.lengths) - len(ids)
        return Prompts(batch, beginnings=(*beginnings, *beginnings[:1] * spare))

    def _beginning(self, picture: EncodedPicture, ids: tuple[int, ...]) -> Memory:
        if ids not in picture.beginnings:
            exact = Buckets(text_lengths=(max(1, len(ids) - 1),), batch_sizes=(1,))
            batch = make_batch([self._sample(picture, ids)], self.config, exact)
            picture.beginnings[ids] = self._run(self._begin, 1, batch, picture.features)
        return picture.beginnings[ids]

    def _all_encoded(self, pictures: Sequence[Picture | None]) -> list[EncodedPicture | None]:
        plain = [i for i, p in enumerate(pictures) if p is not None and not isinstance(p, EncodedPicture)]
        pictures = list(pictures)
        for i, picture in zip(plain, self.encode([pictures[i] for i in plain]), strict=True):
            pictures[i] = picture
        return pictures

    def _features(self, pictures: Sequence[EncodedPicture | None], rows: int) -> Features:
        """Features of a batch, zeros where there is no picture."""
        nothing = jax.tree.map(jnp.zeros_like, next(p.features for p in pictures if p is not None))
        own = [nothing if picture is None else picture.features for picture in pictures]
        return jax.tree.map(lambda *parts: jnp.concatenate(parts), *own, *[nothing] * (rows - len(own)))

    def _check_finite(self, finite: jax.Array | np.ndarray) -> None:
        if not np.asarray(finite).all():
            raise BatchError(
                "the model's logits are NaN or infinite: its weights are damaged (import them again), or overflow "
                f"in {self.config.dtype} (load it with another dtype)"
            )

    def _sample(self, image: Picture | None, ids: Sequence[int]) -> Sample:
        if not isinstance(image, EncodedPicture):
            return Sample(ids) if image is None else Sample(ids, *preprocess(load_image(image), self.config))
        if image.owner is not self:
            raise BatchError("a picture was encoded by another model; encode it with the one that is asked")
        return Sample(ids, size=image.size, encoded=True)

    def _samples_from_ids(self, pictures: Any, input_ids: Any, sizes: Any) -> list[Sample]:
        rows = check_ids(input_ids)
        if pictures is None:
            return [Sample(row) for row in rows]
        check_lists(images_or_pixels=pictures, input_ids=rows)
        if not hasattr(pictures, "ndim"):
            return [self._sample(image, row) for image, row in zip(pictures, rows, strict=True)]
        if sizes is None:
            sizes = [None] * len(rows)
        check_lists(image_sizes=sizes, input_ids=rows)
        marks = (IMAGE_PLACEHOLDER, self.config.image_token_id)
        return [
            Sample(row, pixels, size) if np.isin(row, [m for m in marks if m]).any() else Sample(row)
            for row, pixels, size in zip(rows, check_pixels(pictures), sizes, strict=True)
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


def _padded_seeds(sampling: Sampling, rows: int) -> Sampling:
    return sampling.replace(seed=np.pad(sampling.seed, (0, rows - len(sampling.seed))))
