"""vsearch as training samples: every question of a picture as if it were asked alone."""

import itertools

import numpy as np
import pytest
from mini_search import mini_config, search_config

from flexattn_jax.config import IMAGE_PLACEHOLDER
from flexattn_jax.inputs.batching import Buckets, make_batch
from flexattn_jax.inputs.conversations import Turn, pack_turns, tokenize_conversation
from flexattn_jax.inputs.datasets.vsearch import decode_example, load_vsearch
from flexattn_jax.inputs.datasets.vsearch_examples import ATTRIBUTES, COLUMNS
from flexattn_jax.inputs.images import preprocess
from flexattn_jax.inputs.prompts import IMAGE_TAG
from flexattn_jax.inputs.tokenizer import load_tokenizer
from flexattn_jax.inputs.word_tokenizer import write_word_tokenizer
from flexattn_jax.training.data import BatchPlan, BatchSource
from flexattn_jax.training.loss import IGNORED
from flexattn_jax.training.search import SearchSource


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    folder = tmp_path_factory.mktemp("words")
    write_word_tokenizer(folder)
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return load_vsearch(tmp_path_factory.mktemp("data"), search_config(), "train", 0, 6)


@pytest.fixture(scope="module")
def source(rows, words):
    return SearchSource(rows, words, mini_config(), "six pictures")


def test_cut_after_the_beginning_every_segment_is_a_conversation(rows, words):
    for k in range(len(rows)):
        questions = decode_example(rows[k]).questions
        turns = [Turn(f"{IMAGE_TAG}\n{asked.question}", asked.options[asked.answer]) for asked in questions]
        ids, segments, learned = pack_turns(words, turns)
        assert ids[segments == 0][-1] == IMAGE_PLACEHOLDER and not learned[segments == 0].any()
        assert segments.max() == len(questions) == 5 and (np.diff(segments) >= 0).all()
        for number, turn in enumerate(turns, start=1):
            mine = np.isin(segments, (0, number))
            expected, expected_learned = tokenize_conversation(words, (turn,))
            np.testing.assert_array_equal(ids[mine], expected)
            np.testing.assert_array_equal(learned[mine], expected_learned)


def test_samples_are_pictures_with_all_their_questions(source, rows, words):
    config = mini_config()
    assert len(source) == 6 and source.name(4) == "picture 4"
    for k in range(len(source)):
        sample, learned, _ = source[k]
        assert sample.pixels is not None and source.text(k).sample.pixels is None
        np.testing.assert_array_equal(sample.pixels, preprocess(decode_example(rows[k]).picture(), config)[0])
        batch = make_batch([sample], config, Buckets(text_lengths=(192,)))
        assert batch.lengths[0] <= source.lengths.positions[k] <= batch.token_ids.shape[1]
        assert source.lengths.readers[k] == learned.sum()
        seen = set()
        for number, asked in enumerate(decode_example(rows[k]).questions, start=1):
            mine = words.decode(sample.ids[learned & (sample.segments == number)]).removesuffix("</s>")
            option, word = asked.options[asked.answer], asked.words[asked.answer]
            said = f"is {word}" if asked.form == ATTRIBUTES else f", the is on the {word}"
            assert mine == (said if asked.form in seen else option) and said.split(" is ")[-1] in option
            seen.add(asked.form)
    assert source.digest == SearchSource(rows, words, config, "six pictures").digest
    assert source.digest != SearchSource(rows, words, config, "six others").digest
    assert source.digest != SearchSource([rows[k] for k in range(3)], words, config, "six pictures").digest


def test_captions_name_what_is_there_and_only_what_follows_the_names_is_learned(rows, words):
    config = mini_config()
    both, alone = (SearchSource(rows, words, config, "six", 2, 1, questions=kept) for kept in (True, False))
    plain = SearchSource(rows, words, config, "six")
    assert len({both.digest, alone.digest, plain.digest}) == 3
    told = set()
    for k in range(len(rows)):
        example = decode_example(rows[k])
        side = example.picture().width
        colours = {placed.name: f"is {placed.colour}" for placed in example.objects}
        eighths = {o.name: COLUMNS[int((o.box[0] + o.box[2] / 2) // (side / 8))] for o in example.objects}
        (sample, learned, _), (before, before_learned, _) = both.text(k), plain.text(k)
        count = len(example.questions)
        asked = sample.segments <= count
        np.testing.assert_array_equal(sample.ids[asked], before.ids)
        np.testing.assert_array_equal(learned[asked], before_learned)
        assert sample.segments.max() == count + 3 and alone.text(k).sample.segments.max() == 3
        np.testing.assert_array_equal(alone.text(k).sample.ids[-len(sample.ids[~asked]) :], sample.ids[~asked])
        for number, objects in zip(range(count + 1, count + 4), (colours, colours, eighths), strict=True):
            mine = sample.segments == number
            answer = words.decode(sample.ids[mine][:-1]).split("ASSISTANT: ")[1]
            named = dict(part.split(" ", 1) for part in answer.removesuffix(".").split(", "))
            assert len(named) == 3 and named.items() <= objects.items()
            assert [words.decode([index]) for index in sample.ids[mine & learned]] == list(named.values())
            told.add(answer)
    assert len(told) > len(rows)  # a picture has captions of its own, and they differ


def test_captions_of_sides_tell_of_each_object_where_it_is_from_the_last(rows, words):
    source = SearchSource(rows, words, mini_config(), "six", sides=2, questions=False)
    seen = set()
    for k in range(len(rows)):
        middle = {o.name: o.box[0] + o.box[2] / 2 for o in decode_example(rows[k]).objects}
        sample, learned, asked = source.text(k)
        for number in (1, 2):
            mine = sample.segments == number
            answer = words.decode(sample.ids[mine][:-1]).split("ASSISTANT: ")[1].removesuffix(".")
            first, *others = answer.split(", the ")
            named = [(first, ""), *(tuple(other.split(" is on the ")) for other in others)]
            assert len(named) == 3 and len({name for name, _ in named}) == 3
            for (before, _), (name, side) in itertools.pairwise(named):
                assert side == ("left" if middle[name] < middle[before] else "right")
                seen.add(side)
            said = [words.decode([index]) for index in sample.ids[mine & learned]]
            assert said == [", the", *(f"is on the {side}" for _, side in named[1:])]
        assert (learned == (asked >= 0)).all()
    assert seen == {"left", "right"}


def test_a_batch_reads_high_resolution_before_every_answer_token(source):
    plan = BatchPlan(4, Buckets(text_lengths=(192,)), (64,), window=1)
    batches = BatchSource(source, np.arange(6), mini_config(), plan, count=2)
    made = next(batches[k] for k in range(2) if (batches[k].rows < 0).any())
    data, (beginning, block) = made.data, made.data.batch.blocks
    length = data.batch.token_ids.shape[1]
    assert (made.rows >= 0).sum() == 2 and beginning + 5 * block <= length <= made.shape[0] == 16 + 192
    for b, index in enumerate(made.rows):
        read = data.readers[b][data.readers[b] < length]
        if index < 0:
            assert not len(read) and (data.labels[b] == IGNORED).all()
            continue
        assert len(read) == source.lengths.readers[index]
        np.testing.assert_array_equal(read, np.flatnonzero(data.labels[b] != IGNORED) - 1)
        np.testing.assert_array_equal(data.labels[b][read + 1], data.batch.token_ids[b][read + 1])
        # None predicts another text's token.
        np.testing.assert_array_equal((read - beginning) // block, (read + 1 - beginning) // block)


def test_rows_that_tell_of_objects_are_asked_where_those_are(rows, words):
    """By the name before them."""
    config = mini_config()
    source, grid = SearchSource(rows, words, config, "six", 2, 1), config.lowres_grid
    made = source.collate([source[0], None, source[1]], 256, 64)
    count = 0
    for b, k in ((0, 0), (2, 1)):
        example, ids = decode_example(rows[k]), made.batch.token_ids[b]
        scale = grid / example.picture().width
        token = {o.name: int((o.box[1] + o.box[3] / 2) * scale) * grid + int((o.box[0] + o.box[2] / 2) * scale)
                 for o in example.objects}  # fmt: skip
        for row, asked in zip(made.readers[b], made.asked[b], strict=True):
            name = "" if row >= len(ids) else words.decode([ids[row]])
            said = "" if row >= len(ids) - 1 else words.decode([ids[row + 1]])
            assert asked == token.get(name, -1)
            assert (asked >= 0) == (said.startswith("is ") or said in (", the", *COLUMNS))
            count += asked >= 0
    asked = [q for k in (0, 1) for q in decode_example(rows[k]).questions]
    sides = sum(q.form != ATTRIBUTES for q in asked)
    assert count == len(asked) + sides + 2 * 3 * 3
    assert made.asked.shape == (3, 64) and (made.asked[1] == -1).all()
