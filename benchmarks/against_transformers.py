"""LLaVA-1.5 here and in Hugging Face transformers (PyTorch, CPU): the same random weights, shape and inputs.

    pip install --editable ".[transformers]"
    python benchmarks/against_transformers.py [--passes 5] [--out runs/benchmarks/against_transformers.json]

Decoder 1024 x 16 layers (16 heads, MLP 2752, vocabulary 32,000), CLIP tower 512 x 8 layers, one picture of 336 px and
60 tokens of text a sample, float32, both on all cores that the process may use. transformers writes the checkpoint and
this library reads it; logits are compared before anything is timed. Prefill is picture and prompt to the logits of the
last token; decode is one token more, greedily. Batch 1 and 8, medians of passes taken in turn.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import statistics
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
from common import environment, judged, ratios, shown, spread, write
from rich.console import Console
from rich.table import Table

import flexattn_jax
from flexattn_jax.inputs.batching import Batch
from flexattn_jax.models.vlm import VLM

try:
    import torch
    import transformers
except ImportError:
    sys.exit('this needs torch and transformers; install them with pip install --editable ".[transformers]"')

IMAGE_TOKEN, TEXT, START, SLOTS, TOLERANCE = 31999, 60, 35, 576, 1e-3
GOALS = {1: (1.1, 1.0)}  # speed of prefill and decode over theirs


def their_model(small: bool) -> transformers.LlavaForConditionalGeneration:
    """LLaVA-1.5 with random weights."""
    vision = transformers.CLIPVisionConfig(
        hidden_size=512, intermediate_size=2048, num_hidden_layers=3 if small else 9, num_attention_heads=8,
        image_size=336, patch_size=14,
    )  # fmt: skip
    text = transformers.LlamaConfig(
        vocab_size=32000, hidden_size=1024, intermediate_size=2752, num_hidden_layers=2 if small else 16,
        num_attention_heads=16, num_key_value_heads=16, max_position_embeddings=4096,
    )  # fmt: skip
    torch.manual_seed(0)
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN, image_seq_length=SLOTS,
        vision_feature_layer=-2,
    )  # fmt: skip
    return transformers.LlavaForConditionalGeneration(config).eval()


class Theirs:
    """transformers: prefill into its cache, one forward a token."""

    def __init__(self, model, ids: np.ndarray, pixels: np.ndarray):
        self.model, self.ids, self.pixels = model, torch.tensor(ids), torch.tensor(pixels)

    def prefill(self):
        out = self.model(input_ids=self.ids, pixel_values=self.pixels, use_cache=True, logits_to_keep=1)
        self.cache = out.past_key_values
        return out.logits[:, -1].numpy()

    def decode(self, token: np.ndarray) -> np.ndarray:
        out = self.model(input_ids=torch.tensor(token)[:, None], past_key_values=self.cache, use_cache=True)
        return out.logits[:, -1].numpy()


class Ours:
    """This library: the programs that `generate` is made of, a token at a time."""

    def __init__(self, vlm: flexattn_jax.VisionLanguageModel, ids: np.ndarray, pixels: np.ndarray, room: int):
        samples, length = ids.shape
        self.params = vlm.params
        self.batch = Batch(
            token_ids=jnp.asarray(np.where(ids == IMAGE_TOKEN, 0, ids), jnp.int32),
            lengths=jnp.full(samples, length, jnp.int32),
            image_start=jnp.full(samples, START, jnp.int32),
            content=jnp.ones((samples, SLOTS), bool),
            pixels=jnp.asarray(pixels),
        )
        apply = lambda p, method, *args: vlm.model.apply({"params": p}, *args, method=method)[:2]  # noqa: E731
        self._prefill = jax.jit(lambda p, b: apply(p, VLM.prefill, b, length + room))
        self._decode = jax.jit(lambda p, m, t: apply(p, VLM.decode, m, t), donate_argnums=1)

    def prefill(self):
        logits, self.memory = self._prefill(self.params, self.batch)
        return np.asarray(logits)

    def decode(self, token: np.ndarray) -> np.ndarray:
        logits, self.memory = self._decode(self.params, self.memory, jnp.asarray(token, jnp.int32))
        return np.asarray(logits)


def timed(arm, steps: int) -> tuple[float, float, list[np.ndarray]]:
    """Seconds of prefill, median seconds of a decoding step, and all logits."""
    start = time.perf_counter()
    logits = [arm.prefill()]
    prefill, decode = time.perf_counter() - start, []
    for _ in range(steps):
        token = logits[-1].argmax(axis=-1)
        start = time.perf_counter()
        logits.append(arm.decode(token))
        decode.append(time.perf_counter() - start)
    return prefill, statistics.median(decode), logits


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--passes", type=int, default=5)
    parser.add_argument("--steps", type=int, default=16, help="decoding steps a pass")
    parser.add_argument("--small", action="store_true", help="fewer layers, to see whether this runs")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/benchmarks/against_transformers.json"))
    options = parser.parse_args()
    where = environment() | {"torch": torch.__version__, "transformers": transformers.__version__}
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.set_grad_enabled(False)
    model = their_model(options.small)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        vlm = flexattn_jax.load(folder, dtype="float32")
    rng, rows = np.random.default_rng(0), {}
    for samples in (1, 8):
        text = rng.integers(3, IMAGE_TOKEN - 1, (samples, TEXT))
        slots = np.full((samples, SLOTS), IMAGE_TOKEN)
        ids = np.concatenate([text[:, :START], slots, text[:, START:]], axis=1)
        pixels = rng.standard_normal((samples, 3, 336, 336)).astype(np.float32)
        arms = {"transformers": Theirs(model, ids, pixels), "here": Ours(vlm, ids, pixels, options.steps + 1)}
        found = {name: [] for name in arms}
        first = [timed(arm, options.steps)[2] for arm in arms.values()]  # compiles; not counted
        difference = max(np.abs(a - b).max() for a, b in zip(*first, strict=True))
        if not difference < TOLERANCE:
            sys.exit(f"logits differ by {difference:.2g}, which is above {TOLERANCE}: nothing was timed")
        for _ in range(options.passes):
            for name, arm in arms.items():
                found[name].append(timed(arm, options.steps)[:2])
        rows[f"batch {samples}"] = {"largest_difference_of_logits": float(difference)}
        for i, part in enumerate(("prefill", "decode")):
            theirs, ours = ([reading[i] for reading in found[name]] for name in ("transformers", "here"))
            rows[f"batch {samples}"][part] = {
                "transformers_s": spread(theirs),
                "here_s": spread(ours),
                "speed_over_transformers": ratios(theirs, ours),
            }
    table = Table("", "", "transformers s", "here s", "speed over transformers", "", title="measured, float32")
    for name, row in rows.items():
        for i, part in enumerate(("prefill", "decode")):
            over = row[part]["speed_over_transformers"]
            goal = GOALS.get(int(name.split()[1]))
            verdict = judged(over, goal[i], at_least=True) if goal else ""
            digits = 2 if part == "prefill" else 4
            spreads = shown(row[part]["transformers_s"], digits), shown(row[part]["here_s"], digits)
            table.add_row(name, part, *spreads, shown(over), verdict)
    Console(width=130).print(table)
    write(options.out, {"rows": rows, "environment": where, "passes": options.passes, "steps": options.steps})


if __name__ == "__main__":
    main()
