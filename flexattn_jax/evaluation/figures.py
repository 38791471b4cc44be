"""Figures that benchmarks report beside the accuracy: F1, all orders right, points, overlap of boxes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from flexattn_jax.evaluation import metrics, parsers
from flexattn_jax.evaluation.benchmark import Figure
from flexattn_jax.evaluation.predictions import Prediction

MME_PARTS = {
    "perception": (
        *("existence", "count", "position", "color", "posters"),
        *("celebrity", "scene", "landmark", "artwork", "OCR"),
    ),
    "cognition": ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"),
}

_RESAMPLES, _SEED = 2000, 20240728


def accuracy_figure(name: str, scores: Sequence[float]) -> list[Figure]:
    """An accuracy with its Wilson interval; nothing without a question."""
    counts = metrics.accuracy(scores)
    return [Figure(name, counts["accuracy"], counts["n"], tuple(counts["ci95"]))] if scores else []


def binary_and_open(predictions: Sequence[Prediction]) -> list[Figure]:
    """GQA's two kinds of questions (its eval.py): those of structural type "query" are open, all others binary."""
    return [
        *accuracy_figure("binary questions", [p.score for p in predictions if p.split != "query"]),
        *accuracy_figure("open questions", [p.score for p in predictions if p.split == "query"]),
    ]


def mean_of_splits(predictions: Sequence[Prediction]) -> list[Figure]:
    """The mean of the splits' accuracies, whatever their sizes, with a bootstrap interval."""
    scores = [np.array(scores) for scores in _by(predictions, lambda p: p.split, lambda p: p.score)]

    def draw(rng: np.random.Generator) -> float:
        return float(np.mean([rng.choice(s, len(s)).mean() for s in scores]))

    value = float(np.mean([s.mean() for s in scores]))
    return [Figure("mean of the types", value, len(predictions), bootstrap_interval(draw))]


def pope_figures(predictions: Sequence[Prediction]) -> list[Figure]:
    """POPE's F1, precision, recall and share of yes for each kind, and the mean F1 that LLaVA's tables report.

    Option 0 is yes. Intervals are bootstrapped over questions.
    """
    tables, figures = [], []
    for split in dict.fromkeys(p.split for p in predictions):
        chosen = [p for p in predictions if p.split == split]
        # The confusion table: yes and meant, yes and not meant, no and meant, no and not meant.
        cells = [(p.choice != 0) * 2 + (p.target != 0) for p in chosen]
        table = np.bincount(cells, minlength=4)
        n, (hit, false_alarm, miss, _) = len(chosen), table.tolist()
        tables.append(table)
        figures += [
            Figure(f"F1, {split}", _f1(table), n, bootstrap_interval(lambda rng, t=table: _f1(_redraw(rng, t)))),
            Figure(f"precision, {split}", _ratio(hit, hit + false_alarm), n),
            Figure(f"recall, {split}", _ratio(hit, hit + miss), n),
            Figure(f"answers yes, {split}", _ratio(hit + false_alarm, n), n),
        ]
    if not tables:
        return []

    def draw(rng: np.random.Generator) -> float:
        return float(np.mean([_f1(_redraw(rng, table)) for table in tables]))

    mean = float(np.mean([_f1(table) for table in tables]))
    return [Figure("F1, mean of the kinds", mean, len(predictions), bootstrap_interval(draw)), *figures]


def mme_figures(predictions: Sequence[Prediction]) -> list[Figure]:
    """MME's points (its eval_tool/calculation.py): 100 x accuracy + 100 x pictures with both questions right, summed.

    A picture counts once both of its questions were asked. Intervals are bootstrapped over pictures.
    """
    figures = []
    for part, categories in MME_PARTS.items():
        drawn: list[np.ndarray] = []  # of each category, the right answers of each picture: 0, 1 or 2
        for category in categories:
            of_pictures = _by([p for p in predictions if p.split == category], lambda p: p.unit, lambda p: p.score)
            pairs = [sum(scores) for scores in of_pictures if len(scores) == 2]
            if pairs:
                drawn.append(np.array(pairs))
        if not drawn:
            continue

        def draw(rng: np.random.Generator, drawn: Sequence[np.ndarray] = tuple(drawn)) -> float:
            return sum(_points(rng.choice(pairs, len(pairs))) for pairs in drawn)

        name = f"{part}, {len(drawn)} of {len(categories)} categories"
        total = sum(_points(pairs) for pairs in drawn)
        figures.append(Figure(name, total, 2 * sum(map(len, drawn)), bootstrap_interval(draw), points=True))
    return figures


def all_orders_right(predictions: Sequence[Prediction]) -> list[Figure]:
    """The share of questions that are right in every order of their options, each order being a question of the file.

    Counted are questions that were asked in as many orders as they have options.
    """
    units = _by(predictions, lambda p: p.unit, lambda p: p)
    whole = [unit for unit in units if len(unit) == len(unit[0].options)]
    return accuracy_figure("right in every order of the options", [min(p.score for p in unit) for unit in whole])


def mmbench_figures(predictions: Sequence[Prediction]) -> list[Figure]:
    """MMBench's circular accuracy, and the accuracy of one pass, the options in the file's first order."""
    one_pass = [p.score for p in predictions if p.id == p.unit]
    return [*all_orders_right(predictions), *accuracy_figure("one pass", one_pass)]


def refcoco_figures(predictions: Sequence[Prediction]) -> list[Figure]:
    """The mean overlap of the boxes; an answer that is no box overlaps with nothing."""
    overlaps = np.array([box_overlap(p) for p in predictions])

    def draw(rng: np.random.Generator) -> float:
        return float(rng.choice(overlaps, len(overlaps)).mean())

    return [Figure("mean overlap (IoU)", float(overlaps.mean()), len(overlaps), bootstrap_interval(draw))]


def box_overlap(prediction: Prediction) -> float:
    """Intersection over union of the box that was written and the true one."""
    written = parsers.box(prediction.output or "")
    return parsers.overlap(written, parsers.box(prediction.answers[0])) if written else 0.0


def _by(predictions: Sequence[Prediction], key: Callable, value: Callable) -> list[list]:
    groups: dict[str, list] = {}
    for prediction in predictions:
        groups.setdefault(key(prediction), []).append(value(prediction))
    return list(groups.values())


def _points(pairs: np.ndarray) -> float:
    return float(100 * pairs.mean() / 2 + 100 * (pairs == 2).mean())


def _f1(table: np.ndarray) -> float:
    hit, false_alarm, miss, _ = table.tolist()
    return _ratio(2 * hit, 2 * hit + false_alarm + miss)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _redraw(rng: np.random.Generator, table: np.ndarray) -> np.ndarray:
    return rng.multinomial(table.sum(), table / table.sum())


def bootstrap_interval(draw: Callable[[np.random.Generator], float]) -> tuple[float, float]:
    """The 95 % percentile bootstrap interval of a figure, the same in every run."""
    rng = np.random.default_rng(_SEED)
    low, high = np.percentile([draw(rng) for _ in range(_RESAMPLES)], [2.5, 97.5])
    return float(low), float(high)
