"""Training of a small vision tower and its connector from nothing: which object lies on a token, of which colour it is,
and where the token is.

The stage before those of LLaVA, which begin with a tower that can see. It reads vsearch's boxes; the linear maps that
read class, colour, column and row off a token of the connector are trained along and left out of the model. A connector
that is drawn at random instead mixes what the tower keeps apart, and high resolution, which does not train it, is then
hardly ever searched (docs/mini.md). Each step sees pictures whole at low resolution, and crops around random objects at
full resolution, so that both scales are learned.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from flexattn_jax.config import ConfigError, VisionConfig, VLMConfig
from flexattn_jax.inputs.datasets.vsearch import decode_example
from flexattn_jax.inputs.datasets.vsearch_examples import COLUMNS
from flexattn_jax.inputs.datasets.vsearch_scenes import CLASSES, COLOURS
from flexattn_jax.inputs.images import preprocess
from flexattn_jax.models.vlm import VLM
from flexattn_jax.ops.resize import downscale
from flexattn_jax.training.data import Lengths

BACKGROUND = len(CLASSES)  # index of the class of tokens on which no object lies
_CORE = 0.4  # an object lies on tokens whose middle is in this share of its box, to either side of its own middle
_BACKGROUND_WEIGHT = 0.05  # of a token; nearly all are background
_LIGHT = 0.2  # largest change of a channel's brightness or contrast
_NO_OBJECT = -1
PLACES = len(COLUMNS)  # of columns, and of rows, that a token of a picture is told to lie in


@dataclasses.dataclass(frozen=True)
class TowerConfig:
    """What a step of the tower's training looks at."""

    crops: int = 3  # at full resolution, of each picture
    crop_side: int = 96  # pixels

    def __post_init__(self):
        if self.crops < 1 or self.crop_side < 1:
            raise ConfigError(f"tower.crops {self.crops} and tower.crop_side {self.crop_side} must be at least 1")


@flax.struct.dataclass
class TowerBatch:
    """Pictures and what is in them.

    pixels: (B, 3, S, S) float32, normalised.
    objects: (B, O, 6) int32: class, colour, left, top, width, height in pixels; class -1 where there is none.
    """

    pixels: Any
    objects: Any

    @property
    def learned(self) -> Any:
        """() int, objects."""
        return (self.objects[..., 0] != _NO_OBJECT).sum()


class TowerSource:
    """The pictures and objects of a vsearch split."""

    def __init__(self, rows: Sequence[Any], config: VLMConfig, most_objects: int, digest: str):
        """
        Args:
          rows: of `load_vsearch`.
          most_objects: O.
          digest: a name for their content.
        """
        self._rows, self._config, self._most, self.digest = rows, config, most_objects, digest
        ones = np.ones(len(rows), np.int32)
        self.lengths = Lengths(ones * config.num_lowres_tokens, ones)

    def __len__(self) -> int:
        return len(self._rows)

    def name(self, index: int) -> str:
        """Number of the picture."""
        return f"picture {index}"

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(3, S, S) float32 and (O, 6) int32, see TowerBatch."""
        example = decode_example(self._rows[index])
        pixels, (side, _) = preprocess(example.picture(), self._config)
        objects = np.full((self._most, 6), _NO_OBJECT, np.int32)
        for line, placed in zip(objects, example.objects, strict=False):
            box = np.round(np.array(placed.box) * (self._config.image_size / side))
            line[:] = CLASSES.index(placed.name), list(COLOURS).index(placed.colour), *box
        return pixels, objects

    def collate(self, samples: Sequence[Any], length: int, readers: int) -> TowerBatch:
        """A batch; a row without a sample has no objects."""
        side = self._config.image_size
        nothing = np.zeros((3, side, side), np.float32), np.full((self._most, 6), _NO_OBJECT, np.int32)
        pixels, objects = zip(*(nothing if sample is None else sample for sample in samples), strict=True)
        return TowerBatch(np.stack(pixels), np.stack(objects))


def probe_params(config: VLMConfig, seed: int) -> dict[str, Any]:
    """Linear maps from a token of the connector to its class, colour, column and row, float32."""
    rng = np.random.default_rng([seed, BACKGROUND])

    def linear(outputs: int) -> dict[str, np.ndarray]:
        kernel = 0.02 * rng.standard_normal((outputs, config.decoder.width), np.float32)
        return {"kernel": kernel.astype(np.float32), "bias": np.zeros(outputs, np.float32)}

    outputs = {"class": BACKGROUND + 1, "colour": len(COLOURS), "column": PLACES, "row": PLACES}
    return {"probe": {name: linear(count) for name, count in outputs.items()}}


def tower_loss(model: VLM, config: TowerConfig) -> Callable:
    """A LossFn over TowerBatch: cross-entropy of class, colour, column and row at both resolutions.

    Its scalars are the shares of objects whose class and colour are right on the token of their middle. Columns and
    rows are PLACES equal parts of the view.

    Raises:
      ConfigError: crops that the tower cannot read.
    """
    side = model.config.lowres_size
    _check_crops(config, model.config)

    def loss_fn(params: dict, batch: TowerBatch, alpha: jax.Array, key: jax.Array | None) -> tuple[jax.Array, dict]:
        del alpha
        keys = jax.random.split(jax.random.key(0) if key is None else key)
        pixels, objects = batch.pixels, batch.objects
        if key is not None:
            pixels, objects = vary(keys[0], pixels, objects)
        # Two views: pixels, and the objects with their boxes in the view's own pixels.
        small = downscale(pixels, side)
        shrunk = objects.astype(jnp.float32).at[..., 2:].multiply(side / pixels.shape[-1])
        lowres = view_loss(params, small, shrunk)
        highres = view_loss(params, *crop_around_objects(keys[1], pixels, objects, config.crop_side, config.crops))
        named = {f"lowres_{name}": share for name, share in lowres[1].items()}
        return lowres[0] + highres[0], named | {f"highres_{name}": share for name, share in highres[1].items()}

    def view_loss(params: dict, pixels: jax.Array, objects: jax.Array) -> tuple[jax.Array, dict]:
        seeing = {name: params[name] for name in ("vision", "connector")}
        tokens = model.apply({"params": seeing}, pixels, method="tokens")
        read = {name: tokens @ probe["kernel"].T + probe["bias"] for name, probe in params["probe"].items()}
        grid = pixels.shape[-1] // model.config.vision.patch_size
        classes, colours, middle = label_tokens(objects, grid, pixels.shape[-1])
        losses = optax.softmax_cross_entropy_with_integer_labels(read["class"], classes)
        weights = jnp.where(classes == BACKGROUND, _BACKGROUND_WEIGHT, 1.0)
        loss = (losses * weights).sum() / weights.sum()
        losses = optax.softmax_cross_entropy_with_integer_labels(read["colour"], jnp.maximum(colours, 0))
        loss += jnp.where(colours >= 0, losses, 0).sum() / jnp.maximum((colours >= 0).sum(), 1)
        row, column = (jnp.arange(grid**2) // part % grid * PLACES // grid for part in (grid, 1))
        for name, places in (("row", row), ("column", column)):
            labels = jnp.broadcast_to(places, classes.shape)
            loss += optax.softmax_cross_entropy_with_integer_labels(read[name], labels).mean()
        right = {"class": read["class"][..., :BACKGROUND].argmax(-1) == classes}
        right["colour"] = read["colour"].argmax(-1) == colours
        return loss, {name: (hit & middle).sum() / jnp.maximum(middle.sum(), 1) for name, hit in right.items()}

    return loss_fn


def _check_crops(tower: TowerConfig, config: VLMConfig) -> None:
    side, patch = tower.crop_side, config.vision.patch_size
    if side % patch:
        raise ConfigError(f"tower.crop_side {side} is no multiple of the patch size {patch}")
    if side > config.image_size:
        raise ConfigError(f"tower.crop_side {side} is larger than the pictures, {config.image_size}; lower it")
    if isinstance(config.vision, VisionConfig) and side > config.vision.image_size:
        native = config.vision.image_size
        raise ConfigError(f"tower.crop_side {side} is larger than what the tower reads, {native}; lower it")


def vary(key: jax.Array, pixels: jax.Array, objects: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Pictures mirrored or not, in other light; a colour's name stays right."""
    keys = jax.random.split(key, 3)
    batch, _, _, side = pixels.shape
    mirrored = jax.random.bernoulli(keys[0], shape=(batch,))
    pixels = jnp.where(mirrored[:, None, None, None], pixels[..., ::-1], pixels)
    left = jnp.where(mirrored[:, None], side - objects[..., 2] - objects[..., 4], objects[..., 2])
    gain = 1 + jax.random.uniform(keys[1], (batch, 1, 1, 1), minval=-_LIGHT, maxval=_LIGHT)
    shift = jax.random.uniform(keys[2], (batch, 1, 1, 1), minval=-_LIGHT, maxval=_LIGHT)
    return pixels * gain + shift, objects.at[..., 2].set(left)


def crop_around_objects(
    key: jax.Array, pixels: jax.Array, objects: jax.Array, side: int, count: int
) -> tuple[jax.Array, jax.Array]:
    """Crops that hold the middle of a random object each.

    Args:
      pixels: (B, 3, S, S); objects: (B, O, 6), see TowerBatch.
      side: of a crop; count: crops a picture.

    Returns:
      (count * B, 3, side, side), and the objects (count * B, O, 6) float32 with their boxes in the crop's pixels.
    """

    def one(key: jax.Array, pixels: jax.Array, objects: jax.Array) -> tuple[jax.Array, jax.Array]:
        which, where = jax.random.split(key)
        there = objects[:, 0] != _NO_OBJECT
        chosen = objects[jax.random.categorical(which, jnp.where(there, 0.0, -1e9))]
        middle = chosen[2:4] + chosen[4:6] // 2
        offset = jax.random.randint(where, (2,), side // 6, side - side // 6)
        corner = jnp.clip(middle - offset, 0, pixels.shape[-1] - side)
        crop = jax.lax.dynamic_slice(pixels, (0, corner[1], corner[0]), (3, side, side))
        moved = objects.astype(jnp.float32) - jnp.concatenate([jnp.zeros(2), corner, jnp.zeros(2)])
        return crop, moved.at[:, 0].set(objects[:, 0])

    keys = jax.random.split(key, (count, pixels.shape[0]))
    crops, moved = jax.vmap(jax.vmap(one), in_axes=(0, None, None))(keys, pixels, objects)
    return crops.reshape(-1, *crops.shape[2:]), moved.reshape(-1, *moved.shape[2:])


def label_tokens(objects: jax.Array, grid: int, side: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What lies on each token.

    Args:
      objects: (B, O, 6), boxes in pixels of a view of `side` pixels, which has grid x grid tokens.

    Returns:
      Class (BACKGROUND where there is none) and colour (-1 there), both (B, grid**2) int32, and (B, grid**2) bool, True
      on the tokens on which an object's middle lies.
    """
    patch = side / grid
    token = jnp.arange(grid)
    at = (token + 0.5) * patch
    objects = objects.astype(jnp.float32)[:, :, None]  # (B, O, 1, 6)
    x, y = (objects[..., i] + objects[..., 2 + i] / 2 for i in (2, 3))  # (B, O, 1)
    inside = (jnp.abs(at - x) <= _CORE * objects[..., 4])[:, :, None] & (jnp.abs(at - y) <= _CORE * objects[..., 5])[
        ..., None
    ]
    middle = (jnp.floor(x / patch) == token)[:, :, None] & (jnp.floor(y / patch) == token)[..., None]
    there = (objects[..., 0, 0] != _NO_OBJECT)[..., None, None]
    middle = (middle & there).reshape(*middle.shape[:2], -1)  # (B, O, grid**2)
    covered = ((inside & there).reshape(middle.shape)) | middle
    owner = jnp.where(middle, 2, covered.astype(jnp.int32)).argmax(axis=1)  # a middle goes before a rim
    named = jnp.take_along_axis(objects[:, :, 0, :2], owner[..., None], axis=1)
    any_object = covered.any(axis=1)
    classes = jnp.where(any_object, named[..., 0], BACKGROUND).astype(jnp.int32)
    colours = jnp.where(any_object, named[..., 1], -1).astype(jnp.int32)
    return classes, colours, middle.any(axis=1)
