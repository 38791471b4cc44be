"""vsearch asked in one pass: the same losses as one option at a time, and what its rows read."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_params
from mini_search import compute, draw, mini_config

from flexattn_jax.api import VisionLanguageModel
from flexattn_jax.config import override
from flexattn_jax.evaluation import search
from flexattn_jax.evaluation.search import SWAPS, ask_all, pack_options
from flexattn_jax.inputs.batching import Buckets, Sample
from flexattn_jax.inputs.conversations import Turn, tokenize_conversation
from flexattn_jax.inputs.images import preprocess
from flexattn_jax.inputs.tokenizer import load_tokenizer
from flexattn_jax.inputs.word_tokenizer import write_word_tokenizer
from flexattn_jax.models.vlm import VLM
from flexattn_jax.training.data import TrainSample, collate

QUESTIONS = 5  # of a picture: three of colour, two of side
BUCKETS = Buckets(text_lengths=(32,), batch_sizes=(QUESTIONS,), option_lengths=(16,), option_counts=(4,))


def test_views_that_were_kept_give_the_same_answers(vlm, examples):
    def losses(views):
        batches = ask_all(vlm, examples, batch_size=2, views=views)
        return np.concatenate([answer.losses for batch in batches for answer in batch])

    seen = []
    for example in examples:
        pixels = preprocess(example.picture(), vlm.config)[0][None]
        views = VLM(vlm.config).apply({"params": vlm.params}, pixels, method="see")
        seen.append(jax.tree.map(lambda x: np.asarray(x[0], np.float16), views))
    np.testing.assert_allclose(losses(seen), losses(None), atol=5e-3)
    assert np.abs(np.subtract(losses(seen[::-1]), losses(None))).max() > 0.02


@pytest.fixture(scope="module")
def examples():
    return draw(3, "test")


def make_vlm(folder, changes=None):
    write_word_tokenizer(folder)
    config = mini_config(changes)
    return VisionLanguageModel(config, random_params(config, seed=3), load_tokenizer(folder), BUCKETS)


@pytest.fixture(scope="module")
def shallow(tmp_path_factory):
    """For quick compiles; its first layer selects and its second reads."""
    changes = {"flexattention.first_layer": 0, "decoder.num_layers": 2}
    return make_vlm(tmp_path_factory.mktemp("words"), changes)


@pytest.fixture(scope="module")
def vlm(tmp_path_factory):
    """Its selection depends on the question: a layer reads the text before one selects."""
    return make_vlm(tmp_path_factory.mktemp("words"))


def ask(vlm, examples, swap=None):
    """Answers by picture; three pictures in batches of two, so that the last batch is not full."""
    batches = list(ask_all(vlm, examples, swap, batch_size=2))
    assert [len(batch) for batch in batches] == [2 * QUESTIONS, QUESTIONS]
    flat = [answer for batch in batches for answer in batch]
    return [flat[first : first + QUESTIONS] for first in range(0, len(flat), QUESTIONS)]


@pytest.fixture(scope="module")
def answers(vlm, examples):
    return ask(vlm, examples)


def test_losses_are_those_of_scoring_each_question_alone(shallow, examples):
    answers = ask(shallow, examples)
    for example, found in zip(examples, answers, strict=True):
        expected = shallow.score(
            [example.image] * QUESTIONS,
            [q.question for q in example.questions],
            [q.options for q in example.questions],
            scorer="official",
        )
        for number, (answer, asked, losses) in enumerate(zip(found, example.questions, expected, strict=True)):
            np.testing.assert_allclose(answer.losses, losses, atol=1e-4)
            assert (answer.id, answer.form, answer.answer) == (f"{example.id}/{number}", asked.form, asked.answer)
            assert answer.correct == (int(np.argmin(losses)) == asked.answer)
            assert answer.size == min(max(example.objects[t].box[2:]) for t in asked.targets)
    spread = [max(a.losses) - min(a.losses) for found in answers for a in found]
    assert min(spread) > 1e-3


def cell_of(placed):
    """Of the middle; 3 x 3 cells of 32 pixels."""
    left, top, width, height = placed.box
    return int((top + height / 2) // 32) * 3 + int((left + width / 2) // 32)


def alone(vlm, example):
    """Batch of each question with its right answer."""
    pixels, size = preprocess(example.picture(), vlm.config)
    samples = []
    for asked in example.questions:
        turn = Turn(f"<image>\n{asked.question}", asked.options[asked.answer])
        ids, learned = tokenize_conversation(vlm.tokenizer, (turn,))
        samples.append(TrainSample(Sample(ids, pixels, size), learned))
    return collate(samples, vlm.config, vlm.config.num_lowres_tokens + 48, 16)


@pytest.mark.slow
def test_cells_and_hits_are_those_of_the_questions_alone(vlm, examples, answers):
    def cells_read(params, batch):
        return VLM(vlm.config).apply({"params": params}, batch.batch, None, batch.readers)[1]["cells"][:-1]

    program = jax.jit(cells_read)
    for example, found in zip(examples, answers, strict=True):
        batch = alone(vlm, example)
        cells = np.asarray(program(vlm.params, batch))
        for number, (answer, asked) in enumerate(zip(found, example.questions, strict=True)):
            rows = batch.readers[number][batch.readers[number] < batch.labels.shape[1]]
            read = cells[:, number, : len(rows)]  # (layers, rows, C)
            # The token that decides stands at the same place in all options.
            options = [vlm.tokenizer.encode(option) for option in asked.options]
            decisive = next(k for k, tokens in enumerate(zip(*options, strict=True)) if len(set(tokens)) > 1)
            np.testing.assert_array_equal(answer.kept, read[:, decisive])
            assert answer.reads == read.sum() and answer.distinct == read.any(axis=1).sum()
            owners = [cell_of(placed) for placed in example.objects]
            others = [cell for k, cell in enumerate(owners) if k not in asked.targets]
            for layer, kept in enumerate(read[:, decisive]):
                assert answer.hit_asked[layer] == any(kept[owners[t]] for t in asked.targets)
                assert answer.hit_others[layer] == pytest.approx(np.mean([kept[cell] for cell in others]))
            anywhere = read[:, decisive].any(axis=0)
            assert answer.hit_others_any == pytest.approx(np.mean([anywhere[cell] for cell in others]))
    hits = [hit for found in answers for a in found for hit in a.hit_asked]
    assert 0 < np.mean(hits) < 1


@pytest.mark.parametrize("shown", [96, 192])
def test_an_object_lies_in_the_same_cell_however_large_the_picture_is_shown(examples, shown):
    config = mini_config({"lowres_size": shown // 3, "image_size": shown})
    for example in examples:
        assert search._object_cells(example, config).tolist() == [cell_of(placed) for placed in example.objects]


@pytest.fixture(scope="module")
def swapped(vlm, examples):
    return {swap: [answer for found in ask(vlm, examples, swap) for answer in found] for swap in SWAPS}


@pytest.mark.slow
def test_a_swap_reads_as_many_other_cells(swapped, answers, examples):
    plain = [answer for found in answers for answer in found]
    by_id = {answer.id: answer for answer in plain}
    for swap, found in swapped.items():
        assert [a.id for a in found] == [a.id for a in plain]
        for one, other in zip(found, plain, strict=True):
            np.testing.assert_array_equal(one.kept.sum(axis=-1), other.kept.sum(axis=-1))
            assert one.reads == other.reads
        differing = [not np.array_equal(one.kept, other.kept) for one, other in zip(found, plain, strict=True)]
        losses = [np.abs(np.subtract(a.losses, b.losses)).max() > 1e-5 for a, b in zip(found, plain, strict=True)]
        assert np.mean(differing) > 0.2 and np.mean(losses) > 0.2, swap
    # Another question of the same form about the same picture, the next one.
    partners = {0: 1, 1: 2, 2: 0, 3: 4, 4: 3}
    for answer in swapped["other_question"]:
        picture, number = answer.id.split("/")
        np.testing.assert_array_equal(answer.kept, by_id[f"{picture}/{partners[int(number)]}"].kept)
    for answer in swapped["objects"]:
        example = next(e for e in examples if answer.id.startswith(e.id))
        cells = {cell_of(placed) for placed in example.objects}
        for kept in answer.kept:
            assert len(cells & set(np.flatnonzero(kept).tolist())) == min(len(cells), kept.sum())


@pytest.mark.parametrize("revisit", [False, True])
@pytest.mark.parametrize("swap", ["random", "objects"])
def test_a_swap_keeps_each_rows_number_of_cells_where_rows_differ(vlm, examples, swap, revisit):
    """Under a threshold a row may keep any number."""
    config = override(vlm.config, {"flexattention.revisit": revisit})
    group = [pack_options(vlm.tokenizer, example, vlm.config) for example in examples[:2]]
    rows = np.full((2, 200), 1000, np.int32)
    for line, packed in zip(rows, group, strict=True):
        reading = np.flatnonzero(packed.learned) - 1
        line[: len(reading)] = reading
    rng = np.random.default_rng(0)
    cells = rng.random((2, 2, 200, 9)) < 0.4
    given = search._swapped(swap, cells, rows, group, examples[:2], config, rng)
    assert given.shape == (3, 2, 200, 9) and not given[0].any()
    for b, line in enumerate(rows):
        used = int((line < 1000).sum())
        np.testing.assert_array_equal(given[1:, b, :used].sum(axis=-1), cells[:, b, :used].sum(axis=-1))
        assert not given[:, b, used:].any()
    room = given.sum(axis=(0, -1)) <= 9
    assert (given[1] & given[2])[room].any() == revisit


@pytest.mark.slow
def test_given_cells_are_what_is_read(vlm, examples):
    off = VLM(override(vlm.config, {"flexattention.enabled": False}))

    def runs(params, batch):
        read = lambda given: VLM(vlm.config).apply({"params": params}, batch.batch, None, batch.readers, given=given)  # noqa: E731
        plain, named = read(None)
        own = jnp.concatenate([jnp.zeros_like(named["cells"][:1]), named["cells"][:-1]])
        given = jnp.stack([own, jnp.zeros_like(own), jnp.roll(own, 1, axis=-1)])
        return plain, off.apply({"params": params}, batch.batch)[0], jax.lax.map(lambda cells: read(cells)[0], given)

    batch = alone(vlm, examples[0])
    plain, without, (own, none, others) = (np.asarray(x) for x in compute(runs, vlm.params, batch))
    np.testing.assert_allclose(own, plain, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(none, without, rtol=1e-5, atol=1e-6)
    for b in range(QUESTIONS):
        reads = batch.readers[b][batch.readers[b] < batch.labels.shape[1]]
        np.testing.assert_allclose(others[b, : reads[0]], plain[b, : reads[0]], atol=1e-5)
        assert np.abs(others - plain)[b, reads].max(axis=-1).min() > 1e-4
        assert np.abs(none - plain)[b, reads].max(axis=-1).min() > 1e-4


def test_an_example_is_packed_option_by_option(vlm, examples):
    for example in examples:
        packed = pack_options(vlm.tokenizer, example, vlm.config)
        sample, slots = packed.sample, vlm.config.num_lowres_tokens
        segment = 0
        for option in packed.options:
            asked = example.questions[option.question]
            turn = Turn(f"<image>\n{asked.question}", asked.options[option.option])
            ids, learned = tokenize_conversation(vlm.tokenizer, (turn,))
            segment += 1
            mine = np.isin(sample.segments, (0, segment))
            np.testing.assert_array_equal(sample.ids[mine], ids)
            own = packed.learned[option.first : option.first + option.length]
            np.testing.assert_array_equal(own, learned[-option.length :])
            assert option.prompt == (~own).sum()
            if option.option == asked.answer:
                expected = (len(ids) + slots - 1, int(learned.sum()))
                assert packed.answer_lengths[option.question] == expected
        assert segment == sum(len(q.options) for q in example.questions) == sample.segments.max()
        assert packed.length == len(packed.learned) == packed.options[-1].first + packed.block
        assert {b.first - a.first for a, b in itertools.pairwise(packed.options)} == {packed.block}


@pytest.mark.parametrize("changes", [{}, {"flexattention.enabled": False}])
def test_an_unknown_swap_is_refused_and_so_is_any_without_high_resolution(vlm, examples, changes):
    other = VisionLanguageModel(override(vlm.config, changes), vlm.params, vlm.tokenizer)
    with pytest.raises(ValueError, match="it must be one of other_question, random, objects, of a model that reads"):
        next(ask_all(other, examples, "random" if changes else "shuffled"))


@pytest.mark.slow
def test_without_high_resolution_answers_tell_nothing_of_cells(vlm, examples):
    low = VisionLanguageModel(
        override(vlm.config, {"flexattention.enabled": False}), vlm.params, vlm.tokenizer, BUCKETS
    )
    found = next(ask_all(low, examples[:1], batch_size=1))
    expected = low.score(
        [examples[0].image] * QUESTIONS,
        [q.question for q in examples[0].questions],
        [q.options for q in examples[0].questions],
        scorer="official",
    )
    for answer, losses in zip(found, expected, strict=True):
        np.testing.assert_allclose(answer.losses, losses, atol=1e-4)
        assert answer.kept is None and answer.hit_asked == () and answer.reads == 0
