"""What vsearch draws and asks: reproducible, answerable by looking, and not answerable without."""

import collections
import dataclasses
import hashlib
import itertools

import numpy as np
import pytest
from PIL import Image

from flexattn_jax.inputs.datasets import vsearch_examples, vsearch_scenes
from flexattn_jax.inputs.datasets.vsearch_examples import (
    ATTRIBUTES,
    OTHER_ARTIST,
    PRESETS,
    RELATIONS,
    SPLITS,
    VSearchConfig,
    VSearchError,
    draw_example,
    generate,
)
from flexattn_jax.inputs.datasets.vsearch_scenes import ARTISTS, CLASSES, COLOURS

# Many questions in little time: what is asked does not depend on how large the pictures are.
SMALL = VSearchConfig(picture_side=96, object_sides=(6, 9))


def take(config, split, count):
    pictures = tuple(count if name == split else 0 for name in SPLITS)
    return list(generate(dataclasses.replace(config, pictures=pictures), split))


@pytest.fixture(scope="module", params=PRESETS)
def examples(request):
    return request.param, take(PRESETS[request.param], "train", 24)


def test_an_example_depends_on_its_settings_split_and_number_alone():
    config = PRESETS["standard"]
    assets = vsearch_scenes.load_assets(config.asset_folder)
    drawn = take(config, "test", 6)
    assert drawn == list(generate(dataclasses.replace(config, pictures=(0, 0, 6, 0)), "test", threads=3))
    assert drawn[5] == draw_example(config, "test", 5, assets)
    others = [
        draw_example(dataclasses.replace(config, seed=1), "test", 5, assets),
        draw_example(config, "train", 5, assets),
        draw_example(config, "test", 4, assets),
    ]
    assert all(other.image != drawn[5].image and other.objects != drawn[5].objects for other in others)


def test_objects_are_as_the_settings_say_and_apart(examples):
    preset, drawn = examples
    config = PRESETS[preset]
    for example in drawn:
        assert example.picture().size == (config.picture_side, config.picture_side)
        assert config.num_objects[0] <= len(example.objects) <= config.num_objects[1]
        names = [placed.name for placed in example.objects]
        assert len(set(names)) == len(names)
        assert set(names) <= set(CLASSES[: config.num_classes])
        most = max(collections.Counter(placed.colour for placed in example.objects).values())
        assert most <= -(-len(names) // len(COLOURS))
        for placed in example.objects:
            x, y, width, height = placed.box
            assert config.object_sides[0] <= max(width, height) <= config.object_sides[1]
            assert min(x, y) >= 0
            assert max(x + width, y + height) <= config.picture_side
        for a, b in itertools.combinations([placed.box for placed in example.objects], 2):
            assert a[0] + a[2] <= b[0] or b[0] + b[2] <= a[0] or a[1] + a[3] <= b[1] or b[1] + b[3] <= a[1]
    sizes = {max(placed.box[2:]) for example in drawn for placed in example.objects}
    assert len(sizes) > (config.object_sides[1] - config.object_sides[0]) // 2


def hue(rgb):
    return np.asarray(Image.fromarray(rgb.astype(np.uint8)[None]).convert("HSV"), int)[0, :, 0]


def test_an_object_fills_its_box_in_its_colour_and_leaves_the_photograph_alone(monkeypatch):
    config = PRESETS["standard"]
    assets = vsearch_scenes.load_assets(config.asset_folder)
    drawn = [draw_example(config, "test", k, assets) for k in range(12)]
    monkeypatch.setattr(vsearch_scenes, "_paint", lambda *_: None)
    empty = [draw_example(config, "test", k, assets) for k in range(12)]
    names = list(COLOURS)
    hues = hue(np.array(list(COLOURS.values())))
    told = []
    for with_objects, without in zip(drawn, empty, strict=True):
        assert with_objects.objects == without.objects
        picture = np.asarray(with_objects.picture(), int)
        change = np.abs(picture - np.asarray(without.picture(), int)).max(axis=-1)
        near = np.zeros_like(change, bool)
        for placed in with_objects.objects:
            x, y, width, height = placed.box
            near[max(0, y - 12) : y + height + 12, max(0, x - 12) : x + width + 12] = True
            inside = change[y : y + height, x : x + width]
            edges = inside[[0, 1, -2, -1]].max(axis=1), inside[:, [0, 1, -2, -1]].max(axis=0)
            assert inside.max() > 60
            assert min(max(edge[:2].max(), edge[2:].max()) for edge in edges) > 10  # the box is no larger than needed
            body = picture[y : y + height, x : x + width][inside > 40]
            vivid = body[body.max(axis=1) - body.min(axis=1) > 60]
            distance = np.abs((hue(vivid)[:, None] - hues + 128) % 256 - 128)
            told.append(names[np.bincount(distance.argmin(axis=1), minlength=len(names)).argmax()] == placed.colour)
        assert change[~near].max() <= 12  # JPEG
    assert np.mean(told) > 0.97


def test_questions_ask_about_what_is_there(examples):
    preset, drawn = examples
    config = PRESETS[preset]
    for example in drawn:
        by_form = collections.Counter(asked.form for asked in example.questions)
        assert by_form == {ATTRIBUTES: config.attribute_questions, RELATIONS: config.relation_questions}
        assert len({frozenset(asked.targets) for asked in example.questions}) == len(example.questions)
        for asked in example.questions:
            placed = [example.objects[target] for target in asked.targets]
            correct = asked.words[asked.answer]
            assert len(set(asked.words)) == len(asked.words) == len(asked.options)
            assert all(word in option for word, option in zip(asked.words, asked.options, strict=True))
            if asked.form == ATTRIBUTES:
                assert correct == placed[0].colour
                assert set(asked.words) <= {other.colour for other in example.objects}
                assert asked.question == f"What is the color of the {placed[0].name}?"
                assert asked.options[asked.answer] == f"The color of the {placed[0].name} is {correct}."
            else:
                middles = [other.box[0] + other.box[2] / 2 for other in placed]
                assert abs(middles[0] - middles[1]) >= 0.1 * config.picture_side
                assert correct == ("left" if middles[0] < middles[1] else "right")
                first, second = placed[0].name, placed[1].name
                assert asked.question == f"Is the {first} on the left or right side of the {second}?"
                assert asked.options[asked.answer] == f"Relative to the {second}, the {first} is on the {correct}."


def test_splits_share_no_photograph_and_other_art_no_artist():
    folder = vsearch_scenes.packaged_assets() / "photographs"
    digests = [hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.glob("*/*.webp"))]
    assert len(set(digests)) == len(digests) == 32
    names = {split: {example.photograph for example in take(SMALL, split, 40)} for split in SPLITS}
    assert names["test"] == names["test_art"] == {file.stem for file in (folder / "test").iterdir()}
    assert not names["train"] & names["test"]
    assert not names["validation"] & (names["train"] | names["test"])
    for split in SPLITS:
        artists = {placed.artist for example in take(SMALL, split, 8) for placed in example.objects}
        assert artists == ({OTHER_ARTIST} if split == "test_art" else set(SMALL.artists))


def test_no_rule_that_does_not_look_beats_chance():
    drawn = {split: take(SMALL, split, 500) for split in ("train", "test")}

    def questions(split, form):
        return [asked for example in drawn[split] for asked in example.questions if asked.form == form]

    def accuracy(choices, asked):
        return np.mean([choice == question.answer for choice, question in zip(choices, asked, strict=True)])

    for form, chance in ((ATTRIBUTES, 1 / 4), (RELATIONS, 1 / 2)):
        train, test = questions("train", form), questions("test", form)
        bound = 4 * np.sqrt(chance * (1 - chance) / len(test))
        views = {  # what a rule may know about an option beside what the picture shows
            "position": lambda asked, k: k,
            "word": lambda asked, k: asked.words[k],
            "word and first name": lambda asked, k: (asked.words[k], asked.question.split()[-1]),
            "option": lambda asked, k: asked.options[k],
            "word and order": lambda asked, k: (asked.words[k], asked.words),
        }
        for name, view in views.items():
            seen = collections.Counter(view(asked, asked.answer) for asked in train)
            offered = collections.Counter(view(asked, k) for asked in train for k in range(len(asked.words)))
            choices = [
                max(
                    range(len(asked.words)),
                    key=lambda k: (seen[view(asked, k)] + 1) / (offered[view(asked, k)] + 1 / chance),
                )
                for asked in test
            ]
            assert abs(accuracy(choices, test) - chance) < bound, (form, name)
        answers = collections.Counter(asked.words[asked.answer] for asked in test)
        assert max(answers.values()) < 1.25 * min(answers.values())


def test_blind_questions_do_not_tell_where_an_object_is():
    drawn = take(SMALL, "train", 300)
    places = collections.defaultdict(list)
    for example in drawn:
        for placed in example.objects:
            places[placed.colour].append(placed.box[0] + placed.box[2] / 2)
            places[placed.name].append(placed.box[0] + placed.box[2] / 2)
    spread = SMALL.picture_side / np.sqrt(12)
    for found in places.values():
        assert abs(np.mean(found) - SMALL.picture_side / 2) < 4.5 * spread / np.sqrt(len(found))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": -1}, "seed -1"),
        ({"num_objects": (3, 5)}, "num_objects"),
        ({"num_objects": (6, 5)}, "num_objects"),
        ({"num_classes": 41}, "num_classes 41"),
        ({"object_sides": (40, 24)}, "object_sides"),
        ({"object_sides": (100, 200)}, "do not fit"),
        ({"attribute_questions": 6}, "attribute_questions 6"),
        ({"relation_questions": 6}, "relation_questions 6"),
        ({"pictures": (1, 2, 3)}, "pictures"),
        ({"pictures": (1, 2, 3, -1)}, "pictures"),
    ],
)
def test_impossible_settings_are_named(change, named):
    with pytest.raises(VSearchError, match=named):
        dataclasses.replace(PRESETS["standard"], **change)


def test_an_unknown_split_is_named():
    with pytest.raises(VSearchError, match="'dev'"):
        next(generate(PRESETS["standard"], "dev"))


def test_missing_and_broken_assets_are_named(tmp_path):
    config = dataclasses.replace(PRESETS["standard"], assets=str(tmp_path))
    with pytest.raises(vsearch_scenes.AssetError, match="holds no photographs"):
        next(generate(config, "test"))
    for split in ("train", "validation", "test"):
        (tmp_path / "photographs" / split).mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(tmp_path / "photographs" / split / "grey.webp")
    with pytest.raises(vsearch_scenes.AssetError, match=r"emojione\.png is missing"):
        next(generate(config, "test"))
    (tmp_path / "icons").mkdir()
    (tmp_path / "icons" / "emojione.png").write_bytes(b"no picture")
    with pytest.raises(vsearch_scenes.AssetError, match=r"emojione\.png cannot be read"):
        next(generate(config, "test"))


def test_a_name_stands_for_the_content():
    config = PRESETS["standard"]
    changed = [
        config,
        dataclasses.replace(config, seed=1),
        dataclasses.replace(config, object_sides=(24, 41)),
        dataclasses.replace(config, pictures=(1, 1, 1, 1)),
        PRESETS["crowded"],
    ]
    assert len({settings.name for settings in changed}) == len(changed)
    assert config.name == dataclasses.replace(config, assets=str(vsearch_scenes.packaged_assets())).name


def test_every_packaged_work_is_attributed_and_the_whole_is_small():
    folder = vsearch_scenes.packaged_assets()
    text = (folder / "ATTRIBUTION.md").read_text()
    files = [*folder.glob("photographs/*/*"), *folder.glob("icons/*")]
    assert len(files) == 32 + len(ARTISTS) == 39
    for file in files:
        name = f"icons/{file.name}" if file.parent.name == "icons" else f"{file.parent.name}/{file.stem}"
        assert f"| {name} " in text, name
    assert sum(file.stat().st_size for file in files) < 8 * 2**20


def test_pictures_are_drawn_ahead_but_not_all_at_once(monkeypatch):
    started = []
    real = vsearch_examples.draw_example
    monkeypatch.setattr(vsearch_examples, "draw_example", lambda *args: (started.append(args[2]), real(*args))[1])
    source = generate(dataclasses.replace(SMALL, pictures=(500, 0, 0, 0)), "train", threads=2)
    next(source)
    source.close()
    assert len(started) < 30
