"""What a frozen tower sees, kept on disk: the same as looking again, and never half of it."""

import dataclasses

import jax
import numpy as np
import pytest
from conftest import random_params
from mini_search import compute, mini_config

from flexattn_jax.checkpoints.trees import unstack_layers
from flexattn_jax.inputs.batching import BatchError, Buckets, Sample, make_batch
from flexattn_jax.inputs.datasets.llava import read_llava
from flexattn_jax.inputs.images import ImageError
from flexattn_jax.models.vision import build_tower
from flexattn_jax.models.vlm import VLM
from flexattn_jax.training import views as views_module
from flexattn_jax.training.data import BatchPlan, BatchSource, ConversationSource, TrainSample
from flexattn_jax.training.loop import TrainingFault
from flexattn_jax.training.views import joined, keep_views


@pytest.fixture(scope="module")
def mini(tokenizer):
    config = mini_config({"decoder.vocab_size": tokenizer.vocab_size})
    return config, unstack_layers(random_params(config))


@pytest.fixture(scope="module")
def source(mini, tokenizer, llava_data):
    """Pictures that fill the square and that do not, texts alone, and a torn picture."""
    conversations, _ = read_llava(llava_data / "conversations.json", llava_data / "pictures")
    return ConversationSource(conversations, llava_data / "pictures", tokenizer, mini[0], 160)


@pytest.fixture(scope="module")
def kept(mini, source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("views")
    return keep_views(source, "llava", mini[0], mini[1]["vision"], folder), folder


def test_a_model_that_is_fed_with_views_gives_the_same_logits_and_cells(mini):
    config, params = mini
    rng = np.random.default_rng(0)
    pixels = rng.standard_normal((2, 3, 96, 96)).astype(np.float32)
    samples = [Sample([1, 5, -200, 7, 9], pixels[0], (96, 96)), Sample([1, -200, 8], pixels[1], (96, 50)), Sample([3])]
    batch = make_batch(samples, config, Buckets(text_lengths=(8,)), pad_batch_to=3)

    def logits(params, batch):
        views = VLM(config).apply({"params": params}, batch.pixels, method="see")
        seen = [VLM(config).apply({"params": params}, b) for b in (batch, batch.replace(pixels=None, views=views))]
        return [(out, named["cells"]) for out, named in seen]

    (plain, cells), (viewed, viewed_cells) = compute(logits, params, batch)
    np.testing.assert_allclose(plain, viewed, atol=1e-6)
    np.testing.assert_array_equal(cells, viewed_cells)
    assert cells[:, :2].any() and not cells[:, 2].any()


def test_views_of_samples_are_collated_as_the_model_reads_them(mini):
    config, _ = mini
    rng = np.random.default_rng(1)
    lowres, highres = (rng.standard_normal((n, config.vision.width)).astype(np.float16) for n in (16, 144))
    seen = views_module.Views(lowres, highres)
    samples = [Sample([3, 4]), Sample([1, -200], views=seen)]
    batch = make_batch(samples, config, Buckets(text_lengths=(8,)), pad_batch_to=4)
    assert batch.pixels is None and batch.image_start.tolist() == [-1, 1, -1, -1]
    np.testing.assert_array_equal(batch.views.lowres[1], lowres)
    np.testing.assert_array_equal(batch.views.highres[1], highres)
    assert batch.views.highres.shape == (4, 144, config.vision.width) and not batch.views.highres[[0, 2, 3]].any()
    with pytest.raises(BatchError, match="pixels of some samples and views of others"):
        make_batch([*samples, Sample([1, -200], np.zeros((3, 96, 96)))], config, Buckets())


def test_samples_come_with_what_the_tower_sees_of_them(mini, source, kept):
    config, params = mini
    viewed, _ = kept
    tower = jax.jit(build_tower(config.vision, np.float32, False).apply)
    assert len(viewed) == len(source) and viewed.lengths is source.lengths
    kinds = {"picture": 0, "text": 0, "torn": 0}
    for index in range(len(source)):
        if source.name(index) == "10:id10":
            kinds["torn"] += 1
            with pytest.raises(ImageError, match=r"10\.jpg is damaged"):
                viewed[index]
            continue
        (sample, learned, _), (own, own_learned, _) = source[index], viewed[index]
        np.testing.assert_array_equal(sample.ids, own.ids)
        np.testing.assert_array_equal(learned, own_learned)
        assert own.pixels is None and own.size == sample.size
        kinds["picture" if sample.has_picture else "text"] += 1
        if not sample.has_picture:
            assert own.views is None
            continue
        expected = tower({"params": params["vision"]}, sample.pixels[None])[0]
        np.testing.assert_allclose(own.views.highres, expected, atol=4e-3)  # float16
    assert kinds == {"picture": 23, "text": 6, "torn": 1}


def test_a_batch_counts_the_torn_picture_and_leaves_its_row_empty(mini, kept):
    viewed, _ = kept
    plan = BatchPlan(6, Buckets(text_lengths=(128,)), (16,))
    batches = BatchSource(viewed, np.arange(len(viewed)), mini[0], plan)
    made = [batches[k] for k in range(len(batches))]
    assert [skip.name for batch in made for skip in batch.skipped] == ["10:id10"]
    found = sum(int((batch.data.batch.image_start >= 0).sum()) for batch in made)
    assert found == 23 and all(batch.data.batch.pixels is None for batch in made if batch.data.batch.views is not None)


def test_pictures_are_seen_once(mini, source, kept, monkeypatch):
    config, params = mini
    viewed, folder = kept
    before = sorted(path.name for path in folder.iterdir())
    monkeypatch.setattr(views_module, "_see", None)
    again = keep_views(source, "llava", config, params["vision"], folder)
    np.testing.assert_array_equal(again[0].sample.views.highres, viewed[0].sample.views.highres)
    with pytest.raises(TypeError):  # another tower sees otherwise
        keep_views(source, "llava", config, jax.tree.map(lambda leaf: leaf + 1, params["vision"]), folder)
    with pytest.raises(TypeError):  # and so does one that is shown other pictures
        keep_views(source, "others", config, params["vision"], folder)
    assert [name for name in before if not name.startswith(".")] == [
        name for name in sorted(path.name for path in folder.iterdir()) if name.endswith(".npy")
    ]


class Wrapped:
    """A source as it is."""

    def __init__(self, source):
        self.source = source

    def __getattr__(self, name):
        return getattr(self.source, name)

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        return self.source[index]


class Stopping(Wrapped):
    """A source that ends the process, as it were, at picture 20."""

    def __getitem__(self, index):
        if index == 20:
            raise KeyboardInterrupt
        return self.source[index]


def test_what_was_kept_in_part_is_not_taken_for_the_whole(mini, source, kept, tmp_path):
    config, params = mini
    viewed, folder = kept
    with pytest.raises(KeyboardInterrupt):
        keep_views(Stopping(source), "llava", config, params["vision"], tmp_path)
    assert list(tmp_path.glob("*.partial")) and not list(tmp_path.glob("*.npy"))
    again = keep_views(source, "llava", config, params["vision"], tmp_path)
    assert not list(tmp_path.glob("*.partial"))
    for file in folder.glob("*.npy"):
        assert (tmp_path / file.name).read_bytes() == file.read_bytes()

    # Killed between two of the renames, or cut short by whoever copied the folder.
    names = sorted(file.name for file in tmp_path.glob("*.npy"))
    (tmp_path / names[0]).unlink()
    (tmp_path / names[1]).write_bytes((tmp_path / names[1]).read_bytes()[:-40])
    again = keep_views(source, "llava", config, params["vision"], tmp_path)
    np.testing.assert_array_equal(again[28].sample.views.highres, viewed[28].sample.views.highres)


def test_a_low_resolution_model_keeps_no_high_resolution(mini, source, tmp_path):
    config, params = mini
    low = dataclasses.replace(config, flexattention=dataclasses.replace(config.flexattention, enabled=False))
    viewed = keep_views(source, "llava", low, params["vision"], tmp_path)
    assert viewed[0].sample.views.highres is None and viewed[0].sample.views.lowres.shape == (16, config.vision.width)
    assert len(list(tmp_path.glob("*.npy"))) == 2


def test_a_picture_that_was_torn_when_all_were_seen_stays_out(mini, source, kept):
    viewed, _ = kept
    torn = next(index for index in range(len(source)) if source.name(index) == "10:id10")
    mended = views_module.ViewedSource(Mended(source), viewed._sizes, viewed._views)
    with pytest.raises(ImageError, match="10:id10 could not be read when all pictures were seen"):
        mended[torn]


class Mended(Wrapped):
    """A source whose torn picture has been replaced."""

    def __getitem__(self, index):
        return TrainSample(Sample([1, -200], np.zeros((3, 96, 96), np.float32)), np.zeros(2, bool))


def test_a_folder_that_cannot_be_written_is_one_sentence(mini, source, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingFault, match=r"cannot be kept in .*views .*; it takes 0\.00 GB: give another data"):
        keep_views(source, "llava", mini[0], mini[1]["vision"], tmp_path / "file" / "views")


def test_sources_are_joined_in_order(source, kept):
    both = joined([source, kept[0]])
    assert len(both) == 2 * len(source) and both.name(len(source) + 3) == source.name(3)
    np.testing.assert_array_equal(both.lengths.positions, np.tile(source.lengths.positions, 2))
    np.testing.assert_array_equal(both.lengths.readers, np.tile(source.lengths.readers, 2))
    assert both[0].sample.pixels is not None and both[len(source)].sample.views is not None
    assert both.digest != source.digest and joined([source]) is source
