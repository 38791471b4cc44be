"""The whole model once more, in plain float64 numpy, one sample at a time: no batch, no cache, no capacity tricks.

Written from the description of the released code, not from the package, whose functions it does not use.
"""

import math

import numpy as np


def model(params, config, ids, pixels=None, size=None, readers=None, alpha=1.0, shared_row=None):
    """Logits (T, V), and cells {layer: {row: (C,) bool}} that each selecting row keeps.

    ids hold -200 in the picture's place. readers: rows that read high resolution; None: the last one.
    shared_row (variant "paper"): the one row that selects for all.
    """
    flex, decoder = config.flexattention, config.decoder
    table = params["decoder"]["embedding"].astype(np.float64)
    ids, slots = list(ids), (config.lowres_size // config.vision.patch_size) ** 2
    start = ids.index(-200) if -200 in ids else None
    if start is None:
        x, highres = table[ids], None
    else:
        lowres, highres = encode(params, config, pixels.astype(np.float64))
        x = np.concatenate([table[ids[:start]], lowres, table[ids[start + 1 :]]])
        width, height = size
        margin = int((abs(width - height) // 2) / max(width, height) * math.isqrt(slots))
    length, half = len(x), decoder.head_dim // 2
    frequencies = decoder.rope_theta ** -(np.arange(half) / half)
    angles = np.arange(length)[:, None] * frequencies
    cos, sin = np.cos(angles), np.sin(angles)
    if highres is not None:
        grid, fine = math.isqrt(slots), math.isqrt(len(highres))
        up = bicubic(grid, fine)
        cos_hd, sin_hd = (
            np.einsum("yi,xj,ijd->yxd", up, up, t[start : start + slots].reshape(grid, grid, half)).reshape(-1, half)
            for t in (cos, sin)
        )
    readers = [length - 1] if readers is None else list(readers)
    selection, made = {}, {}
    for i in range(decoder.num_layers):
        p = layer_of(params["decoder"], i, config)
        h = rms(x, p["input_norm"]["scale"], decoder.norm_eps)
        q, k, v = (heads(h @ p["self_attn"][f"{n}_proj"]["kernel"].T, decoder.head_dim) for n in "qkv")
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        share = decoder.num_heads // decoder.num_kv_heads
        k, v = np.repeat(k, share, axis=1), np.repeat(v, share, axis=1)
        logits = np.einsum("thd,xhd->htx", q, k) / np.sqrt(decoder.head_dim)
        logits = np.where(np.tril(np.ones((length, length), bool)), logits, -np.inf)
        plain = softmax(logits)
        out = np.einsum("htx,xhd->thd", plain, v)
        full = plain.copy()
        reads = highres is not None and flex is not None and flex.enabled and i >= flex.first_layer
        if reads:
            k_hd, v_hd = (heads(highres @ p["self_attn"][f"{n}_proj_hd"]["kernel"].T, decoder.head_dim) for n in "kv")
            k_hd = np.repeat(rotate(k_hd, cos_hd, sin_hd), share, axis=1)
            v_hd = np.repeat(v_hd, share, axis=1)
            for row in readers if flex.variant == "released" else range(length):
                cells = selection.get(row if flex.variant == "released" else shared_row)
                if cells is None or not cells.any():
                    continue
                tokens = token_mask(cells, fine, flex.cell_grid)
                extra = np.einsum("hd,xhd->hx", q[row], k_hd[tokens]) / np.sqrt(decoder.head_dim)
                joint = softmax(np.concatenate([logits[:, row], extra], axis=-1))
                both = np.concatenate([v, v_hd[tokens]])
                out[row] = (1 - alpha) * out[row] + alpha * np.einsum("hx,xhd->hd", joint, both)
                full[:, row] = joint[:, :length]
            selection = {}
            for row in readers if flex.variant == "released" else [shared_row]:
                maps = (plain if flex.variant == "released" else full)[:, row, start : start + slots].sum(axis=0)
                maps = maps.reshape(grid, grid).copy()
                if flex.variant == "released" and margin:
                    band = maps if width > height else maps.T
                    band[:margin] = band[-margin:] = 0
                read = [below[row] for below in made.values()]
                selection[row] = select(maps, flex, [] if flex.revisit else read)
            made[i] = selection
        x = x + out.reshape(length, -1) @ p["self_attn"]["o_proj"]["kernel"].T
        h = rms(x, p["post_attention_norm"]["scale"], decoder.norm_eps)
        gate = h @ p["mlp"]["gate_proj"]["kernel"].T
        up_projection = h @ p["mlp"]["up_proj"]["kernel"].T
        x = x + (gate / (1 + np.exp(-gate)) * up_projection) @ p["mlp"]["down_proj"]["kernel"].T
    x = rms(x, params["decoder"]["final_norm"]["scale"], decoder.norm_eps)
    head = params["decoder"]["embedding"] if decoder.tie_embeddings else params["decoder"]["lm_head"]["kernel"]
    return x @ head.astype(np.float64).T, made


def encode(params, config, pixels):
    """Low-resolution tokens (N, D), and high-resolution ones (M, D) in raster order, or None."""
    down = triangle(pixels.shape[-1], config.lowres_size)
    small = np.einsum("yi,xj,cij->cyx", down, down, pixels)
    if hasattr(config.vision, "stem_widths"):  # reads the large picture whole
        both = [connect(params, conv_tower(params["vision"], config.vision, picture)) for picture in (small, pixels)]
        return both[0], None if config.flexattention is None else both[1]
    lowres = connect(params, tower(params, config, small))
    if config.flexattention is None:
        return lowres, None
    zoom, grid = config.flexattention.zoom_ratio, config.lowres_size // config.vision.patch_size
    side = pixels.shape[-1] // zoom
    raster = np.zeros((zoom * grid, zoom * grid, lowres.shape[-1]))
    for i in range(zoom):
        for j in range(zoom):
            part = pixels[:, i * side : (i + 1) * side, j * side : (j + 1) * side]
            tokens = connect(params, tower(params, config, part)).reshape(grid, grid, -1)
            raster[i * grid : (i + 1) * grid, j * grid : (j + 1) * grid] = tokens
    return lowres, raster.reshape(-1, raster.shape[-1])


def tower(params, config, pixels):
    return tower_tokens(params, config, pixels)[0][1:]


def tower_tokens(params, config, pixels, semantic=None):
    """All tokens, the class token first, `semantic` ones last; the last block's attention (H, n, n), keys (n, H, d)."""
    vision, p = config.vision, params["vision"]
    patch, grid = vision.patch_size, pixels.shape[-1] // vision.patch_size
    patches = [
        pixels[:, y * patch : (y + 1) * patch, x * patch : (x + 1) * patch].ravel()
        for y in range(grid)
        for x in range(grid)
    ]
    native = vision.image_size // patch
    places = [0] + [1 + y * native + x for y in range(grid) for x in range(grid)]
    x = np.stack([p["class_embedding"], *(np.array(patches) @ p["patch_embedding"]["kernel"].T.astype(np.float64))])
    x = x + p["position_embedding"][places]
    hidden = np.zeros((len(x), len(x)))
    if semantic is not None:  # which the others do not read
        hidden = np.zeros((len(x) + len(semantic),) * 2)
        hidden[: len(x), len(x) :] = -np.inf
        x = np.concatenate([x, semantic])
    x = layer_norm(x, p["pre_norm"], vision.norm_eps)
    for i in range(vision.num_layers + 1 + vision.select_layer):
        block = take(p["blocks"], i)
        h = layer_norm(x, block["norm1"], vision.norm_eps)
        q, k, v = (heads(linear(h, block["self_attn"][f"{n}_proj"]), vision.width // vision.num_heads) for n in "qkv")
        weights = softmax(np.einsum("thd,xhd->htx", q, k) / np.sqrt(q.shape[-1]) + hidden)
        x = x + linear(np.einsum("htx,xhd->thd", weights, v).reshape(x.shape), block["self_attn"]["out_proj"])
        h = linear(layer_norm(x, block["norm2"], vision.norm_eps), block["mlp"]["fc1"])
        x = x + linear(h / (1 + np.exp(-1.702 * h)), block["mlp"]["fc2"])
    return x, weights, k


def conv_tower(p, vision, pixels):
    """pixels (3, s, s) -> (tokens, Dv): what was seen, then sines and cosines of x, then of y, in rising frequency."""
    x = pixels.transpose(1, 2, 0)
    for i, stride in enumerate(vision.stem_strides):
        x = layer_norm(gelu_tanh(convolve(x, p[f"stem_{i}"], stride)), p[f"stem_norm_{i}"], vision.norm_eps)
    for i in range(vision.num_layers):
        block = take(p["blocks"], i)
        h = gelu_tanh(convolve(layer_norm(x, block["norm"], vision.norm_eps), block["conv"], 1))
        x = x + linear(h, block["fc"])
    x = layer_norm(x, p["post_norm"], vision.norm_eps)
    tokens = []
    for j, i in np.ndindex(x.shape[:2]):
        place = []
        for at in ((i + 0.5) / len(x), (j + 0.5) / len(x)):
            angles = [math.pi * at * 2**k for k in range(vision.position_dims // 4)]
            place += [*map(math.sin, angles), *map(math.cos, angles)]
        tokens.append(np.concatenate([x[j, i], place]))
    return np.stack(tokens)


def convolve(x, p, stride):
    """Windows of the kernel's side around the middle of each stride x stride block; zeros around the picture."""
    kernel = p["kernel"].astype(np.float64)
    window, count = len(kernel), len(x) // stride
    margin = (window - stride) // 2
    x = np.pad(x, ((margin, margin), (margin, margin), (0, 0)))
    out = np.zeros((count, count, kernel.shape[-1]))
    for j, i in np.ndindex(count, count):
        part = x[j * stride : j * stride + window, i * stride : i * stride + window]
        out[j, i] = np.einsum("yxc,yxco->o", part, kernel) + p["bias"]
    return out


def gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def connect(params, features):
    h = linear(features, params["connector"]["fc1"])
    return linear(h * 0.5 * (1 + np.vectorize(math.erf)(h / math.sqrt(2))), params["connector"]["fc2"])


def select(maps, flex, read):
    """(C,) bool: min-max, max-pool over overlapping windows, threshold; none of the cells that were read."""
    span = maps.max() - maps.min()
    if flex.selector == "all":
        return np.ones(flex.cell_grid**2, bool)
    if span == 0:
        return np.zeros(flex.cell_grid**2, bool)
    scaled, grid, cells = (maps - maps.min()) / span * 255, len(maps), flex.cell_grid
    edges = [(math.floor(i * grid / cells), math.ceil((i + 1) * grid / cells)) for i in range(cells)]
    scores = np.array([scaled[a:b, c:d].max() for a, b in edges for c, d in edges])
    wanted = scores > flex.threshold if flex.selection == "threshold" else scores >= 0
    for cells in read:
        wanted, scores = wanted & ~cells, np.where(cells, -1.0, scores)
    strongest = np.argsort(-scores, kind="stable")[: flex.capacity or len(scores)]
    return wanted & np.isin(np.arange(len(scores)), strongest)


def token_mask(cells, fine, cell_grid):
    nearest = [math.floor(t * cell_grid / fine) for t in range(fine)]
    return cells.reshape(cell_grid, cell_grid)[nearest][:, nearest].ravel()


def triangle(size, small):
    """(small, size): antialiased bilinear down-scaling, edges renormalised."""
    scale = size / small
    centres = (np.arange(small) + 0.5) * scale
    weights = np.maximum(0, 1 - np.abs(np.arange(size) + 0.5 - centres[:, None]) / max(scale, 1))
    return weights / weights.sum(axis=1, keepdims=True)


def bicubic(size, large):
    """(large, size): PyTorch's bicubic, a = -0.75, borders clamped."""

    def kernel(t, a=-0.75):
        t = abs(t)
        if t <= 1:
            return (a + 2) * t**3 - (a + 3) * t**2 + 1
        return a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a if t < 2 else 0.0

    weights = np.zeros((large, size))
    for out in range(large):
        place = (out + 0.5) * size / large - 0.5
        for tap in range(math.floor(place) - 1, math.floor(place) + 3):
            weights[out, min(max(tap, 0), size - 1)] += kernel(place - tap)
    return weights


def layer_of(decoder, i, config):
    layer, plain = take(decoder["layers"], i), config.num_plain_layers
    if i >= plain:
        layer["self_attn"] |= take(decoder["highres"], i - plain)
    return layer


def take(tree, i):
    return {k: take(v, i) if isinstance(v, dict) else v[i].astype(np.float64) for k, v in tree.items()}


def heads(x, width):
    return x.reshape(len(x), -1, width)


def linear(x, p):
    return x @ p["kernel"].T.astype(np.float64) + p["bias"]


def rotate(x, cos, sin):
    half = x.shape[-1] // 2
    a, b, cos, sin = x[..., :half], x[..., half:], cos[:, None], sin[:, None]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def rms(x, scale, eps):
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps) * scale


def layer_norm(x, p, eps):
    x = x - x.mean(axis=-1, keepdims=True)
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps) * p["scale"] + p["bias"]


def softmax(x):
    x = np.exp(x - x.max(axis=-1, keepdims=True))
    return x / x.sum(axis=-1, keepdims=True)
