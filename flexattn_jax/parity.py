"""Compares this model with recorded outputs of the reference implementation: `python -m flexattn_jax.parity DIR`.

A case is NAME.json (configuration, list of arrays) and NAME.npz (arrays) with its weights in a safetensors file beside
them. Inference cases run through the cached path (prefill, then one token at a time), through one uncached forward
over the answer, through the compiled generation loop, and in a batch of three with prompts of other lengths; training
cases through the loss that training uses. Exit status 0 only if every comparison of every case holds.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import sys
import zipfile
from typing import Any

import jax
import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from flexattn_jax.checkpoints import layouts
from flexattn_jax.checkpoints.errors import CheckpointError
from flexattn_jax.checkpoints.source import open_weights
from flexattn_jax.checkpoints.source_config import config_from_parts
from flexattn_jax.config import IMAGE_PLACEHOLDER, ConfigError, VLMConfig, override
from flexattn_jax.inference.generation import generate, greedy
from flexattn_jax.inference.reading import Prompts
from flexattn_jax.inputs.batching import Batch, BatchError, Buckets, Sample, make_batch
from flexattn_jax.inputs.images import preprocess
from flexattn_jax.models.vlm import VLM
from flexattn_jax.ops.selection import cell_tokens, normalise_map
from flexattn_jax.training.loss import answer_rows, expand_labels, next_token_loss

VALUES = 1e-4  # features, logits, residual stream: absolute
MAP = 0.02  # on the 0..255 scale
LOSS = 1e-5
GRADIENT = 1e-4  # relative to the largest entry of the array
SUMMED_ATTENTION = 1e-4

COMMON = ("input_ids", "ori_sizes", "image_range")
INFERENCE = (
    *COMMON,
    *("raw_u8", "lr_feat", "hd_feat", "prefill_logits", "hidden_row_idx", "hidden_rows", "attn_out_last"),
    *("gen_ids", "step_logits", "attn_img_sum", "map255", "sel9", "selhd", "n_sel", "sel_layers"),
    *("base_prefill_logits", "base_gen_ids", "base_step_logits"),
)
TRAINING = (
    *COMMON,
    *("attention_mask", "labels", "pixel_values", "alpha", "expanded_labels", "spans", "loss", "logits"),
    *("base_loss", "base_logits"),
)


class CaseError(ValueError):
    """A case that is corrupt or incomplete: an error, never a skip."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One recorded case, checked against its own list of arrays."""

    name: str
    kind: str
    config: VLMConfig
    params: dict
    layout: layouts.Layout
    arrays: dict[str, np.ndarray]

    @property
    def low_resolution(self) -> VLMConfig:
        """The same weights with FlexAttention off: the baseline."""
        return override(self.config, {"flexattention.enabled": False})


@dataclasses.dataclass(frozen=True)
class Check:
    """One comparison: `group` is its column in the table."""

    group: str
    name: str
    value: float
    limit: float

    @property
    def holds(self) -> bool:
        return self.value <= self.limit  # False for NaN


def read_case(path: pathlib.Path) -> Case:
    """Reads and checks NAME.json, NAME.npz and the weights. Raises CaseError naming what is missing or wrong."""
    try:
        record = json.loads(path.read_text())
        kind, listed, weights = record["kind"], record["arrays"], path.parent / record["weights"]
        parts = [record[key] for key in ("llama_config", "clip_config", "mm_config", "extra")]
        expected = {name: (tuple(entry["shape"]), entry["dtype"]) for name, entry in listed.items()}
    except (OSError, UnicodeDecodeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CaseError(f"{path.name} is no description of a case ({type(error).__name__}: {error})") from error
    needed = {"inference": INFERENCE, "training": TRAINING}.get(kind)
    if needed is None:
        raise CaseError(f"{path.name} is of kind {kind!r}; known are inference and training")
    try:
        with np.load(path.with_suffix(".npz"), allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise CaseError(f"{path.with_suffix('.npz').name} cannot be read: {error}") from error
    found = {name: (array.shape, str(array.dtype)) for name, array in arrays.items()}
    wrong = sorted(name for name in {*expected, *found, *needed} if expected.get(name) != found.get(name))
    wrong += sorted(set(needed) - set(found) - set(wrong))
    if wrong:
        raise CaseError(
            f"{path.with_suffix('.npz').name}: {', '.join(wrong[:6])} missing, or not of the shape and type listed"
        )
    try:
        config = config_from_parts(*parts, where=path.name, tower_where=path.name)
        source = open_weights(weights, config)
    except (CheckpointError, ConfigError) as error:
        raise CaseError(str(error)) from error
    return Case(path.stem, kind, config, source.params(), source.layout, arrays)


def largest(mine: Any, reference: np.ndarray) -> float:
    """Largest absolute difference; NaN if the shapes differ, so that no comparison holds by broadcasting."""
    mine = np.asarray(mine)
    return float(np.abs(mine - reference).max(initial=0.0)) if mine.shape == reference.shape else float("nan")


def differing(mine: Any, reference: np.ndarray) -> float:
    """Number of differing entries; NaN if the shapes differ."""
    mine = np.asarray(mine)
    return float((mine != reference).sum()) if mine.shape == reference.shape else float("nan")


# --- inference -------------------------------------------------------------------------------------------------------


def picture_of(case: Case, raw: np.ndarray) -> tuple[np.ndarray, tuple[int, int]]:
    """Pixels (3, S, S) and (width, height) of a recorded picture."""
    return preprocess(Image.fromarray(raw), case.config)


@dataclasses.dataclass(frozen=True)
class Trace:
    """A greedy run, step by step. Lists have an entry a pass; pass 0 is the prefill."""

    logits: list[np.ndarray]  # (B, V)
    ids: np.ndarray  # (passes, B)
    named: list[dict[str, np.ndarray]]
    prefill: np.ndarray  # (B, T, V)


def run_greedy(model: VLM, params: dict, batch: Batch, passes: int) -> Trace:
    """Prefill and passes - 1 cached decoding steps, everything captured."""
    room = batch.token_ids.shape[1] + passes
    prefill = jax.jit(lambda p, b: model.apply({"params": p}, b, room, capture=True, method=VLM.prefill))
    decode = jax.jit(lambda p, m, t: model.apply({"params": p}, m, t, capture=True, method=VLM.decode))
    every, memory, first = prefill(params, batch)
    logits = [np.asarray(every)[np.arange(len(batch.lengths)), batch.lengths - 1]]
    named = [jax.tree.map(np.asarray, first)]
    ids = [logits[-1].argmax(axis=-1)]
    for _ in range(passes - 1):
        step, memory, found = decode(params, memory, ids[-1].astype(np.int32))
        logits.append(np.asarray(step))
        named.append(jax.tree.map(np.asarray, found))
        ids.append(logits[-1].argmax(axis=-1))
    return Trace(logits, np.stack(ids), named, np.asarray(every))


def check_inference(case: Case, others: list[np.ndarray]) -> list[Check]:
    """All comparisons of an inference case.

    Args:
      others: prompt ids of the folder's other cases, for the batch of three.
    """
    want, config = case.arrays, case.config
    checks: list[Check] = []

    def close(group: str, name: str, mine: Any, limit: float = VALUES) -> None:
        checks.append(Check(group, name, largest(mine, want[name]), limit))

    def equal(group: str, name: str, mine: Any) -> None:
        checks.append(Check(group, name, differing(mine, want[name]), 0))

    pixels, size = picture_of(case, want["raw_u8"])
    equal("features", "ori_sizes", [size])
    batch = make_batch([Sample(want["input_ids"][0], pixels, size)], config, Buckets(), pad_batch_to=1)
    length, start, passes = int(batch.lengths[0]), int(batch.image_start[0]), len(want["gen_ids"])
    equal("features", "image_range", [[start, start + config.num_lowres_tokens]])

    model = VLM(config)
    trace = run_greedy(model, case.params, batch, passes)
    first = trace.named[0]
    close("features", "lr_feat", first["lowres"][0])
    close("features", "hd_feat", first["highres"][0])
    full = {"pixel_values": pixels, "lr_pixels": first["lowres_pixels"][0], "lr_clip": first["lowres_features"][0]}
    full |= {"hd_cos_half": first["highres_cos"][0], "hd_sin_half": first["highres_sin"][0]}
    for name in full.keys() & want.keys():
        close("features", name, full[name])

    close("logits", "prefill_logits", trace.prefill[0, :length])
    close("logits", "step_logits", np.stack([step[0] for step in trace.logits]))
    rows = want["hidden_row_idx"]
    stream = np.concatenate([first["hidden"], first["final_hidden"][None]])[:, 0]  # (L + 1, T, D)
    close("logits", "hidden_rows", stream[:, rows])
    close("logits", "attn_out_last", first["attention"][:, 0, length - 1])
    equal("ids", "gen_ids", trace.ids[:, 0])
    checks += check_selection(case, trace, batch, row=0)

    endless = VLM(override(config, {"eos_token_id": -1}))  # the record does not stop at the end of sequence
    loop = jax.jit(
        lambda p, b: generate(endless, p, Prompts(b), np.ones(1, bool), np.int32(passes), greedy(1), passes).tokens
    )
    equal("ids", "gen_ids", np.asarray(loop(case.params, batch))[0])

    # One uncached forward over prompt and answer, in which the rows that predicted the answer read high resolution.
    answer = np.concatenate([want["input_ids"][0], want["gen_ids"][:-1]])
    whole = make_batch([Sample(answer, pixels, size)], config, Buckets(), pad_batch_to=1)
    readers = (length - 1 + np.arange(passes))[None].astype(np.int32)
    forward = jax.jit(lambda p, b, r: model.apply({"params": p}, b, readers=r)[0])
    uncached = np.asarray(forward(case.params, whole, readers))[0, readers[0]]
    checks.append(Check("uncached", "step_logits", largest(uncached, want["step_logits"]), VALUES))

    prompts = (others + [np.concatenate([want["input_ids"][0]] + [want["input_ids"][0][-3:]] * n) for n in (1, 3)])[:2]
    three = [Sample(ids, pixels, size) for ids in (prompts[0], want["input_ids"][0], prompts[1])]
    batched = run_greedy(model, case.params, make_batch(three, config, Buckets(), pad_batch_to=3), passes)
    checks.append(Check("batch of 3", "gen_ids", differing(batched.ids[:, 1], want["gen_ids"]), 0))
    together = np.stack([step[1] for step in batched.logits])
    checks.append(Check("batch of 3", "step_logits", largest(together, want["step_logits"]), VALUES))
    cells = np.stack([named["cells"][:, 1, 0] for named in batched.named])
    checks.append(Check("batch of 3", "sel9", differing(cells, want["sel9"]), 0))

    low = run_greedy(VLM(case.low_resolution), case.params, batch, passes)
    close("baseline", "base_prefill_logits", low.prefill[0, :length])
    close("baseline", "base_step_logits", np.stack([step[0] for step in low.logits]))
    equal("baseline", "base_gen_ids", low.ids[:, 0])
    return checks


def check_selection(case: Case, trace: Trace, batch: Batch, row: int) -> list[Check]:
    """Maps and cells of every pass and layer against the record."""
    want, flex, grid = case.arrays, case.config.flexattention, case.config.lowres_grid
    maps = np.stack([named["map"][:, row, 0] for named in trace.named])  # (passes, layers, N)
    cells = np.stack([named["cells"][:, row, 0] for named in trace.named])
    scaled = np.asarray(normalise_map(maps * batch.content[row])).reshape(*maps.shape[:2], grid, grid)
    flat = np.where(np.isnan(want["map255"]), -1.0, want["map255"])  # a flat map is NaN there and -1 here
    index, valid = cell_tokens(case.config.highres_grid, flex.cell_grid)
    tokens = np.zeros((*cells.shape[:2], case.config.highres_grid**2), bool)
    for cell in range(flex.num_cells):
        tokens[..., index[cell][valid[cell]]] = cells[..., cell, None]
    layers = flex.first_layer + np.arange(cells.shape[1])
    return [
        Check("map255", "attn_img_sum", largest(maps.reshape(scaled.shape), want["attn_img_sum"]), SUMMED_ATTENTION),
        Check("map255", "map255", largest(scaled, flat), MAP),
        Check("mask bits", "sel9", differing(cells, want["sel9"]), 0),
        Check("mask bits", "selhd", differing(tokens, want["selhd"]), 0),
        Check("mask bits", "n_sel", differing(tokens.sum(axis=-1), want["n_sel"]), 0),
        Check("mask bits", "sel_layers", differing(layers, want["sel_layers"]), 0),
    ]


# --- training --------------------------------------------------------------------------------------------------------


def check_training(case: Case) -> list[Check]:
    """All comparisons of a training case."""
    want, config = case.arrays, case.config
    slots = config.num_lowres_tokens
    samples, kept = [], []
    for b, ids in enumerate(want["input_ids"]):
        mask = want["attention_mask"][b].astype(bool)
        has_picture = (ids[mask] == IMAGE_PLACEHOLDER).any()
        picture = (want["pixel_values"][b], tuple(want["ori_sizes"][b])) if has_picture else ()
        samples.append(Sample(ids[mask], *picture))
        kept.append(want["labels"][b][mask])
    batch = make_batch(samples, config, Buckets(), pad_batch_to=len(samples))
    labels = expand_labels(kept, batch.image_start, slots, batch.token_ids.shape[1])
    length = want["expanded_labels"].shape[1]
    checks = [Check("loss", "expanded_labels", differing(labels[:, :length], want["expanded_labels"]), 0)]
    starts = np.where(batch.image_start[:, None] < 0, -1, batch.image_start[:, None] + [0, slots])
    checks.append(Check("loss", "image_range", differing(starts, want["image_range"]), 0))

    readers = answer_rows(labels, batch.image_start)
    model = VLM(config)
    loss_and_gradient = jax.jit(
        jax.value_and_grad(
            lambda p, b: next_token_loss(model, p, b, labels, readers, np.float32(want["alpha"]), capture=True),
            has_aux=True,
        )
    )
    (loss, named), gradients = loss_and_gradient(case.params, batch)
    checks.append(Check("loss", "loss", largest(loss, want["loss"]), LOSS))
    for b, count in enumerate(batch.lengths):
        found, expected = np.asarray(named["logits"])[b, :count], want["logits"][b, :count]
        checks.append(Check("logits", f"logits of sample {b}", largest(found, expected), VALUES))

    for name in (name for name in want if name.startswith("grad::")):
        mine, expected = gradient_of(case, gradients, name.removeprefix("grad::")), want[name]
        scale = float(np.abs(expected).max()) or 1.0
        checks.append(Check("gradients", name, largest(mine, expected) / scale, GRADIENT))

    for b, span, first, end in want["spans"]:
        place = np.searchsorted(readers[b], np.arange(first, end))
        for layer, cells in enumerate(np.asarray(named["cells"]), start=config.flexattention.first_layer):
            key = f"L{layer:02d}_b{b}_s{span}"
            checks.append(Check("mask bits", f"sel9_{key}", differing(cells[b, place], want[f"sel9_{key}"]), 0))
            attention = np.asarray(named["map"])[layer - config.flexattention.first_layer, b, place]
            expected = want[f"attn_img_sum_{key}"].reshape(attention.shape)
            checks.append(Check("map255", f"attn_img_sum_{key}", largest(attention, expected), SUMMED_ATTENTION))

    low = VLM(case.low_resolution)
    base = jax.jit(lambda p, b: next_token_loss(low, p, b, labels, readers, capture=True))
    base_loss, base_named = base(case.params, batch)
    checks.append(Check("baseline", "base_loss", largest(base_loss, want["base_loss"]), LOSS))
    for b, count in enumerate(batch.lengths):
        found, expected = np.asarray(base_named["logits"])[b, :count], want["base_logits"][b, :count]
        checks.append(Check("baseline", f"base_logits of sample {b}", largest(found, expected), VALUES))
    return checks


def gradient_of(case: Case, gradients: dict, published: str) -> np.ndarray:
    """The gradient of a tensor by its published name; zero for one that the model does not hold (never read)."""
    match = case.layout.find(published)
    if match is None:
        raise CaseError(f"{case.name}: no parameter is called {published}")
    leaf, row = layouts.leaf_of(match[0], case.config)
    node = gradients
    for part in leaf.split("/"):
        if part not in node:
            return np.zeros_like(case.arrays[f"grad::{published}"])
        node = node[part]
    return np.asarray(node if row is None else node[row]).reshape(case.arrays[f"grad::{published}"].shape)


# --- report ----------------------------------------------------------------------------------------------------------

COLUMNS = (
    "features",
    "logits",
    "map255",
    "mask bits",
    "ids",
    "loss",
    "gradients",
    "uncached",
    "batch of 3",
    "baseline",
)


def run(folder: pathlib.Path, console: Console) -> bool:
    """Runs every case of a folder and prints a row for each. Returns whether all comparisons of all cases held."""
    paths = sorted(path for path in folder.glob("*.json"))
    if not paths:
        console.print(f"{folder} holds no case: NAME.json, NAME.npz and weights_*.safetensors are expected there.")
        return False
    orphans = sorted(p.name for p in folder.glob("*.npz") if not p.with_suffix(".json").is_file())
    table = Table("case", *COLUMNS, "verdict", title="largest differences from the reference")
    problems = [f"{name} has no description beside it" for name in orphans]
    cases: dict[pathlib.Path, Case] = {}
    for path in paths:
        try:
            cases[path] = read_case(path)
        except CaseError as error:
            problems.append(str(error))
            table.add_row(path.stem, *[""] * len(COLUMNS), "[red]error")
    prompts = {path: case.arrays["input_ids"][0] for path, case in cases.items() if case.kind == "inference"}
    for path, case in cases.items():
        console.print(f"running {case.name} ...", highlight=False)
        others = [ids for other, ids in prompts.items() if other != path and ids.max() < case.config.decoder.vocab_size]
        others.sort(key=lambda ids: ids.size == case.arrays["input_ids"].shape[1])  # other lengths first
        try:
            checks = check_inference(case, others[:2]) if case.kind == "inference" else check_training(case)
        except (CaseError, BatchError, KeyError, IndexError) as error:
            problems.append(f"{case.name}: {error}")
            table.add_row(case.name, *[""] * len(COLUMNS), "[red]error")
            continue
        failed = [check for check in checks if not check.holds]
        problems += [f"{case.name}: {c.name} ({c.group}) differs by {c.value:.3g}, limit {c.limit:g}" for c in failed]
        table.add_row(case.name, *(summary(checks, group) for group in COLUMNS), "[red]differs" if failed else "ok")
    console.print(table)
    for problem in problems:
        console.print(problem, highlight=False, markup=False)
    return not problems


def summary(checks: list[Check], group: str) -> str:
    """The cell of a column: the largest difference among its checks, or the number of differing entries."""
    own = [check for check in checks if check.group == group]
    if not own:
        return "-"
    if all(check.limit == 0 for check in own):
        return "equal" if all(check.holds for check in own) else f"{sum(check.value for check in own):.0f} differ"
    return f"{max(own, key=lambda check: check.value / check.limit if check.limit else 0).value:.1e}"


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m flexattn_jax.parity", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path, help="folder of recorded cases")
    folder = parser.parse_args().folder
    console = Console(width=None if sys.stdout.isatty() else 180)
    if not folder.is_dir():
        console.print(f"{folder} is not a folder.")
        return 1
    with jax.default_matmul_precision("highest"):
        return 0 if run(folder, console) else 1


if __name__ == "__main__":
    sys.exit(main())
