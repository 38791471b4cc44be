"""Floating-point operations of a training step, counted from shapes (a multiply-add is two), and what chips can do.

Counted is what the algorithm needs: products with weights and attention, forward and backward, over all static
positions; not what rematerialisation computes again, nor norms and element-wise work. XLA's own count sees the body of
a scan once, whatever its length, which is why this is counted by hand.
"""

from __future__ import annotations

import jax

from flexattn_jax.config import VLMConfig
from flexattn_jax.ops.selection import cell_tokens

# Dense bfloat16 operations a second of one JAX device, from the vendors' data sheets, by the start of `device_kind`.
PEAKS = {
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v4": 275e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H100": 989e12,
    "NVIDIA A100": 312e12,
}


def peak_flops(device: jax.Device) -> float | None:
    """Operations a second of a device; None where it is not known, as for CPUs."""
    kind = device.device_kind
    return next((peak for start, peak in PEAKS.items() if kind.startswith(start)), None)


def step_flops(config: VLMConfig, batch: int, length: int, readers: int, trains_decoder: bool = True) -> float:
    """Operations of one step.

    Args:
      batch: B; length: T; readers: R.
      trains_decoder: False in the alignment stage: no gradient of the decoder's weights is formed.
    """
    decoder, flex = config.decoder, config.flexattention
    width, inner, kv = decoder.width, decoder.num_heads * decoder.head_dim, decoder.num_kv_heads * decoder.head_dim
    backward = 2 if trains_decoder else 1  # with respect to the inputs, and to the weights

    layer = 2 * length * width * (2 * inner + 2 * kv + 3 * decoder.mlp_dim)
    head = 2 * length * width * decoder.vocab_size
    attention = 4 * length * length * inner
    total = (decoder.num_layers * layer + head) * (1 + backward) + decoder.num_layers * attention * 3

    slots, tower = config.num_lowres_tokens, config.vision
    tiles = 1 + (flex.zoom_ratio**2 if config.reads_highres else 0)
    tokens = slots + 1
    block = 2 * tokens * tower.width * (4 * tower.width + 2 * tower.mlp_dim) + 4 * tokens * tokens * tower.width
    total += tiles * (tower.num_blocks * block + 2 * slots * 3 * tower.patch_size**2 * tower.width)
    connector = 2 * slots * (tower.width * width + width * width)
    total += tiles * connector + 2 * connector  # the tower gets no gradient; only low resolution trains the connector

    if config.reads_highres:
        index, _ = cell_tokens(config.highres_grid, flex.cell_grid)
        read = flex.sample_capacity * index.shape[1]
        rows = length if flex.variant == "paper" else readers
        # Features have no gradient: the projections' backward pass forms that of the weights alone.
        projections = 2 * 2 * read * width * kv * (2 if trains_decoder else 1)
        # The first layer reads nothing, but where layers are scanned it computes as the others do.
        layers = config.num_flex_layers if config.scan_layers else config.num_flex_layers - 1
        total += layers * (projections + 3 * 4 * rows * read * inner)
    return float(batch * total)
