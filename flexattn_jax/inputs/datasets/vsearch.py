"""vsearch: visual search in photographs, a data set that is drawn on first use.

`load_vsearch` is the door: it draws a split into the user's data folder, if it is not there yet, and opens it.
docs/vsearch.md tells what is in it. Needs tensorflow-datasets and array_record, but not TensorFlow.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from tqdm import auto as tqdm

from flexattn_jax.files import lock_file
from flexattn_jax.inputs.datasets import vsearch_examples
from flexattn_jax.inputs.datasets.vsearch_examples import (
    FORMS,
    NUM_OPTIONS,
    PRESETS,
    SPLITS,
    Example,
    VisualQuestion,
    VSearchConfig,
    VSearchError,
)
from flexattn_jax.inputs.datasets.vsearch_scenes import ARTISTS, CLASSES, COLOURS, PlacedObject


@dataclasses.dataclass(eq=False)
class VSearchBuilderConfig(tfds.core.BuilderConfig):
    """A `VSearchConfig` as tfds wants it."""

    settings: VSearchConfig = PRESETS["standard"]


def builder_config(settings: VSearchConfig) -> VSearchBuilderConfig:
    """Named after everything that decides the content, so that other settings never meet old files."""
    return VSearchBuilderConfig(
        name=settings.name,
        description=f"{settings.num_objects[0]} to {settings.num_objects[1]} objects a picture, seed {settings.seed}",
        settings=settings,
    )


class VSearch(tfds.core.GeneratorBasedBuilder):
    """Small objects in photographs, with questions in V* Bench's two forms."""

    name = "vsearch"
    VERSION = tfds.core.Version("1.0.0")
    # Nothing is downloaded. tfds would look for a list of checksums through importlib_resources, which it needs but
    # does not install.
    url_infos: ClassVar[dict[str, Any]] = {}
    BUILDER_CONFIGS: ClassVar[list[VSearchBuilderConfig]] = [
        VSearchBuilderConfig(name=name, settings=settings) for name, settings in PRESETS.items()
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            disable_shuffling=True,  # examples are independent; a reader shuffles as it likes
            features=tfds.features.FeaturesDict(
                {
                    "id": tfds.features.Text(),
                    "photograph": tfds.features.Text(),
                    "image": tfds.features.Image(encoding_format="jpeg"),
                    "objects": tfds.features.Sequence(
                        {
                            "name": tfds.features.ClassLabel(names=CLASSES),
                            "colour": tfds.features.ClassLabel(names=list(COLOURS)),
                            "artist": tfds.features.ClassLabel(names=ARTISTS),
                            "box": tfds.features.Tensor(shape=(4,), dtype=np.int32),  # left, top, width, height
                        }
                    ),
                    "questions": tfds.features.Sequence(
                        {
                            "form": tfds.features.ClassLabel(names=FORMS),
                            "question": tfds.features.Text(),
                            # Unused places hold "" and -1.
                            "words": tfds.features.Tensor(shape=(NUM_OPTIONS,), dtype=np.str_),
                            "options": tfds.features.Tensor(shape=(NUM_OPTIONS,), dtype=np.str_),
                            "targets": tfds.features.Tensor(shape=(2,), dtype=np.int32),
                            "answer": tfds.features.Tensor(shape=(), dtype=np.int32),
                        }
                    ),
                }
            ),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        settings = self.builder_config.settings
        return {split: self._generate_examples(split) for split in SPLITS if settings.num_pictures(split)}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        settings = self.builder_config.settings
        examples = vsearch_examples.generate(settings, split)
        title = f"drawing {self.name} {settings.preset} {split}"
        for index, example in enumerate(tqdm.tqdm(examples, title, settings.num_pictures(split), unit=" pictures")):
            yield index, encode_example(example)


def load_vsearch(
    data_dir: str | os.PathLike | None = None,
    preset: str | VSearchConfig = "standard",
    split: str = "test",
    seed: int = 0,
    pictures: int | None = None,
) -> Sequence[dict[str, Any]]:
    """A split as a random-access source of rows for `decode_example`, drawn first if it is not there.

    A build that was stopped leaves nothing that would be taken for a finished one, and of two processes that need the
    same split one draws it.

    Args:
        data_dir: folder of data sets; None: `default_data_dir`.
        preset: "standard", "crowded" or other settings.
        split: of `SPLITS`.
        seed: any; the same seed gives the same bytes.
        pictures: of the split; None: as many as the preset has.

    Raises:
        VSearchError: unknown preset or split, impossible settings, or a folder that cannot be written.
        vsearch_scenes.AssetError: missing photographs or icons.
    """
    if isinstance(preset, str) and preset not in PRESETS:
        raise VSearchError(f"there is no vsearch preset {preset!r}; known: {', '.join(PRESETS)}")
    settings = PRESETS[preset] if isinstance(preset, str) else preset
    count = settings.num_pictures(split) if pictures is None else pictures
    if pictures is None and count < 1:
        raise VSearchError(
            f"preset {settings.preset!r} has no pictures in split {split!r}; ask for some, or for another split"
        )
    if count < 1:
        raise VSearchError(f"{count} pictures of split {split!r} are asked for; ask for at least 1")
    # One split a data set, so that whoever only evaluates does not wait for the training pictures.
    only = tuple(count if name == split else 0 for name in SPLITS)
    settings = dataclasses.replace(settings, seed=seed, pictures=only)
    folder = default_data_dir() if data_dir is None else Path(data_dir).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with lock_file(folder / f".{VSearch.name}-{settings.name}.lock", wait=True), _without_tfds_output():
            builder = VSearch(config=builder_config(settings), data_dir=folder, file_format="array_record")
            for stopped in builder.data_path.parent.glob("incomplete.*"):
                shutil.rmtree(stopped)
            builder.download_and_prepare(file_format="array_record")
    except OSError as error:
        raise VSearchError(
            f"vsearch cannot be drawn into {folder} ({error.strerror or error}); give a data folder that can be "
            "written and has room (about 50 KB a picture)"
        ) from error
    return builder.as_data_source(split=split, decoders={"image": tfds.decode.SkipDecoding()})


def default_data_dir() -> Path:
    """The user's data folder: $XDG_DATA_HOME/flexattn_jax, or ~/.local/share/flexattn_jax."""
    return Path(os.environ.get("XDG_DATA_HOME") or "~/.local/share").expanduser() / "flexattn_jax"


def encode_example(example: Example) -> dict[str, Any]:
    """An example as the row that tfds stores."""
    return {
        "id": example.id,
        "photograph": example.photograph,
        "image": example.image,
        "objects": [
            {"name": placed.name, "colour": placed.colour, "artist": placed.artist, "box": placed.box}
            for placed in example.objects
        ],
        "questions": [
            {
                "form": asked.form,
                "question": asked.question,
                "words": _padded(asked.words, NUM_OPTIONS, ""),
                "options": _padded(asked.options, NUM_OPTIONS, ""),
                "targets": _padded(asked.targets, 2, -1),
                "answer": asked.answer,
            }
            for asked in example.questions
        ],
    }


def content_name(preset: str, split: str, seed: int, count: int) -> str:
    """A name for the pictures of `load_vsearch` and their order, which what is kept of them goes by."""
    return f"{PRESETS[preset].name} {split} {seed} {count}"


def decode_example(row: Mapping[str, Any]) -> Example:
    """The example of a row of `load_vsearch`."""
    objects, questions = row["objects"], row["questions"]
    names, colours = list(CLASSES), list(COLOURS)
    return Example(
        id=row["id"].decode(),
        photograph=row["photograph"].decode(),
        image=bytes(row["image"]),
        objects=tuple(
            PlacedObject(names[name], colours[colour], tuple(int(v) for v in box), ARTISTS[artist])
            for name, colour, box, artist in zip(
                objects["name"], objects["colour"], objects["box"], objects["artist"], strict=True
            )
        ),
        questions=tuple(
            VisualQuestion(
                form=FORMS[questions["form"][k]],
                targets=tuple(int(target) for target in questions["targets"][k] if target >= 0),
                question=questions["question"][k].decode(),
                words=tuple(word.decode() for word in questions["words"][k] if word),
                options=tuple(option.decode() for option in questions["options"][k] if option),
                answer=int(questions["answer"][k]),
            )
            for k in range(len(questions["form"]))
        ),
    )


def _padded(values: Sequence[Any], length: int, fill: Any) -> list[Any]:
    return [*values, *[fill] * (length - len(values))]


@contextlib.contextmanager
def _without_tfds_output() -> Iterator[None]:
    """One progress bar of ours, which knows the total, in place of tfds' bars, banners and warnings."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    tfds.display_progress_bar(False)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tfds.display_progress_bar(True)
        logging.set_verbosity(verbosity)
