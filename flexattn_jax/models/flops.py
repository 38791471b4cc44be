"""Floating-point operations, counted from shapes (a multiply-add is two), and what chips can do.

Counted is what the algorithm needs: products with weights and attention, not halved for causality, and in training
forward and backward over all static positions; not what rematerialisation computes again, nor norms and element-wise
work. XLA's own count sees the body of a scan once, whatever its length, which is why this is counted by hand.
"""

from __future__ import annotations

import jax

from flexattn_jax.config import ConvVisionConfig, VLMConfig
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
    # What cross-attention reads has a gradient, too: for its positions, and for the connector where that is the source.
    through_connector = config.crossattention is not None and config.crossattention.source == "connector"
    passes_on = trains_decoder or through_connector

    total = 2 * length * width * decoder.vocab_size * (1 + backward)
    for segment in config.segments:
        rows = length - (config.num_slots - segment.num_slots)
        weights, attention = _layer(config, rows)
        cross_weights, cross_source, cross_attention = _cross_attention(config, rows)
        total += segment.num_layers * (
            (weights + cross_weights) * (1 + backward)
            + (attention + cross_attention) * 3
            + cross_source * (1 + trains_decoder + passes_on)
        )

    # The tower gets no gradient, nor does the connector through what FlexAttention reads (released code).
    with_gradient = config.num_slots + (config.highres_grid**2 if through_connector else 0)
    total += tower_flops(config) + connector_flops(config) + 2 * _connector(config, with_gradient)
    total += sum(grouping_flops(config))

    if config.reads_highres:
        index, _ = cell_tokens(config.highres_grid, flex.cell_grid)
        read = flex.sample_capacity * index.shape[1]
        rows = length if flex.variant == "paper" else readers
        projections = 2 * 2 * read * width * kv * (2 if trains_decoder else 1)
        # The first layer reads nothing, but where layers are scanned it computes as the others do.
        layers = config.num_flex_layers if config.scan_layers else config.num_flex_layers - 1
        total += layers * (projections + 3 * 4 * rows * read * inner)
    return float(batch * total)


def prefill_flops(
    config: VLMConfig, text_tokens: int, cells_projected: float = 0.0, cells_read: float = 0.0, one_row: bool = False
) -> float:
    """Operations from a picture and a prompt to logits at every position: tower, grouping, connector, decoder, head.

    Args:
      text_tokens: beside the picture's slots; cells_projected, cells_read, one_row: see `decoder_flops`.
    """
    length = config.num_slots + text_tokens
    head = 2 * length * config.decoder.width * config.decoder.vocab_size
    decoder = decoder_flops(config, length, cells_projected, cells_read, one_row)
    return tower_flops(config) + grouping_flops(config)[0] + connector_flops(config) + decoder + head


def tower_flops(config: VLMConfig) -> float:
    """Operations of the tower for one picture, at both resolutions where the model sees both."""
    tower, slots = config.vision, config.num_lowres_tokens
    grids = [config.lowres_grid] + [config.highres_grid // max(config.tiles, 1)] * config.tiles**2
    if isinstance(tower, ConvVisionConfig):
        per_token, channels, area = 0.0, 3, tower.patch_size**2
        for width, stride in zip(tower.stem_widths, tower.stem_strides, strict=True):
            area //= stride**2  # positions of this convolution, a token
            per_token += area * 2 * 4 * stride**2 * channels * width
            channels = width
        per_token += tower.num_layers * 2 * 10 * channels * tower.mlp_dim
        return (slots + (config.highres_grid**2 if config.tiles else 0)) * per_token
    total = 0
    for grid in grids:
        tokens = grid**2 + 1
        block = 2 * tokens * tower.width * (4 * tower.width + 2 * tower.mlp_dim) + 4 * tokens * tokens * tower.width
        total += tower.num_blocks * block + 2 * grid**2 * 3 * tower.patch_size**2 * tower.width
    return float(total)


def grouping_flops(config: VLMConfig) -> tuple[float, float]:
    """Operations of grouping's semantic tokens, in the tower and in their own layer: forward, and backward."""
    if config.grouping is None:
        return 0.0, 0.0
    groups, patches, tower = config.grouping.groups, config.num_lowres_tokens, config.vision
    width = tower.width
    of_groups, of_patches = 2 * 2 * groups * width**2, 2 * 2 * patches * width**2  # two projections of each
    similarities_and_means = 4 * groups * patches * width
    forward = of_groups + of_patches + similarities_and_means
    # Patches have no gradient, so that two of their four products remain; so in the tower's attention, below.
    backward = 2 * of_groups + of_patches + 2 * similarities_and_means
    if config.trains_in_tower:
        weights = 2 * groups * width * (4 * width + 2 * tower.mlp_dim)
        to_patches, to_each_other = 4 * groups * (patches + 1) * width, 4 * groups * groups * width
        forward += tower.num_blocks * (weights + to_patches + to_each_other)
        backward += tower.num_blocks * (weights + to_patches + 2 * to_each_other)  # the tower's weights are frozen
    return float(forward), float(backward)


def connector_flops(config: VLMConfig) -> float:
    """Operations of the connector for one picture, at both resolutions where the decoder reads both through it."""
    cross = config.crossattention
    reads_both = config.reads_highres or (cross is not None and cross.source == "connector")
    return _connector(config, config.num_slots + (config.highres_grid**2 if reads_both else 0))


def _connector(config: VLMConfig, tokens: int) -> float:
    width = config.decoder.width
    return float(2 * tokens * (config.vision.width * width + width * width))


def decoder_flops(
    config: VLMConfig, length: int, cells_projected: float = 0.0, cells_read: float = 0.0, one_row: bool = False
) -> float:
    """Operations of the decoder's layers for a prompt and its answer, each position once.

    Args:
      length: positions where the decoder begins, the picture's tokens in the sequence included.
      cells_projected: FlexAttention's cells whose keys and values are computed, in all layers together.
      cells_read: cells that rows read, in all rows and layers together.
      one_row: one row a layer reads cells, through a cache, and so weighs features before it projects them to values
        (`cells.read_cached`); False: the values of every cell projected are computed.
    """
    decoder, total = config.decoder, 0.0
    for segment in config.segments:
        rows = length - (config.num_slots - segment.num_slots)
        total += segment.num_layers * float(sum(_layer(config, rows)) + sum(_cross_attention(config, rows)))
    if cells_projected or cells_read:
        tokens = cell_tokens(config.highres_grid, config.flexattention.cell_grid)[0].shape[1]
        kv, inner = decoder.num_kv_heads * decoder.head_dim, decoder.num_heads * decoder.head_dim
        keys = 2 * decoder.width * kv * cells_projected + 2 * inner * cells_read
        if one_row:
            values = 2 * decoder.num_heads * decoder.width * cells_read
            total += 2 * (config.num_flex_layers - 1) * inner * decoder.width
        else:
            values = 2 * decoder.width * kv * cells_projected + 2 * inner * cells_read
        total += tokens * (keys + values)
    return total


def _cross_attention(config: VLMConfig, rows: int) -> tuple[int, int, int]:
    """Operations of one layer's cross-attention: the rows' projections, the picture's, and attention itself."""
    cross = config.crossattention
    if cross is None:
        return 0, 0, 0
    tokens, width = config.highres_grid**2, config.decoder.width
    source = config.vision.width if cross.source == "tower" else width
    return 4 * rows * width * cross.width, 4 * tokens * source * cross.width, 4 * rows * tokens * cross.width


def _layer(config: VLMConfig, length: int) -> tuple[int, int]:
    """Operations of one decoder layer over `length` positions: products with weights, and attention."""
    decoder = config.decoder
    inner, kv = decoder.num_heads * decoder.head_dim, decoder.num_kv_heads * decoder.head_dim
    weights = 2 * length * decoder.width * (2 * inner + 2 * kv + 3 * decoder.mlp_dim)
    return weights, 4 * length * length * inner
