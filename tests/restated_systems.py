"""The other ways to read a picture, in plain float64 numpy, one sample at a time; the parts are restatement.py's.

Written from docs/systems.md, not from the package, whose functions it does not use.
"""

import math

import numpy as np
import restatement as plain


def model(params, config, ids, pixels=None, ranker=None):
    """Logits (T, V), NaN in rows that were dropped, and the rows that are left after each cut.

    ids hold -200 in the picture's place. ranker: the row whose attention ranks the picture's tokens; None: the last.
    """
    decoder, ids = config.decoder, list(ids)
    table = params["decoder"]["embedding"].astype(np.float64)
    start, slots, source = None, 0, None
    if -200 in ids:
        start = ids.index(-200)
        tokens, source = encode(params, config, pixels.astype(np.float64))
        slots = len(tokens)
        x = np.concatenate([table[ids[:start]], tokens, table[ids[start + 1 :]]])
    else:
        x = table[ids]
    length, rows, positions = len(x), np.arange(len(x)), np.arange(len(x))
    ranker, weights, left = length - 1 if ranker is None else ranker, None, []
    for p, kept in layers(params, config):
        if kept is not None and start is not None:
            is_slot = (rows >= start) & (rows < start + slots)
            scores = weights[:, list(rows).index(ranker)].sum(axis=0)
            scores[rows == ranker] = np.inf
            order = sorted(np.flatnonzero(is_slot), key=lambda r: (-scores[r], r))[:kept]
            stay = ~is_slot
            stay[order] = True
            x, rows, positions = x[stay], rows[stay], positions[stay]
            if config.reduction.method == "pyramiddrop":
                positions = np.arange(len(rows))
            left.append(set(rows))
        weights, x = layer(p, config, x, positions, source)
    x = plain.rms(x, params["decoder"]["final_norm"]["scale"], decoder.norm_eps)
    logits = np.full((length, decoder.vocab_size), np.nan)
    logits[rows] = x @ params["decoder"]["lm_head"]["kernel"].astype(np.float64).T
    return logits, left


def layers(params, config):
    """Each layer's parameters, and how many of the picture's tokens are kept before it; None: nothing is dropped."""
    reduction, depth, decoder = config.reduction, config.decoder.num_layers, params["decoder"]
    cuts = {}
    if reduction is not None and reduction.method in ("fastv", "pyramiddrop"):
        grid = config.lowres_size // config.vision.patch_size
        total = grid**2 + ((config.image_size // config.vision.patch_size) ** 2 if config.dense else 0)
        usual = [2] if reduction.method == "fastv" else [depth // 4, depth // 2, 3 * depth // 4]
        places = list(reduction.layers or usual)
        ratio = (reduction.tokens / total) ** (1 / len(places))
        cuts = {place: round(total * ratio ** (n + 1)) for n, place in enumerate(places)}
    stack, row = "layers", 0
    for i in range(depth):
        if i in cuts:
            stack, row = f"stage{1 + list(cuts).index(i)}", 0
        yield plain.take(decoder[stack], row), cuts.get(i)
        row += 1


def layer(p, config, x, positions, source):
    """Attention weights (H, T, T), and the residual stream after the layer."""
    decoder, length = config.decoder, len(x)
    half = decoder.head_dim // 2
    angles = positions[:, None] * decoder.rope_theta ** -(np.arange(half) / half)
    h = plain.rms(x, p["input_norm"]["scale"], decoder.norm_eps)
    q, k, v = (plain.heads(h @ p["self_attn"][f"{n}_proj"]["kernel"].T, decoder.head_dim) for n in "qkv")
    q, k = (plain.rotate(part, np.cos(angles), np.sin(angles)) for part in (q, k))
    share = decoder.num_heads // decoder.num_kv_heads
    k, v = np.repeat(k, share, axis=1), np.repeat(v, share, axis=1)
    logits = np.einsum("thd,xhd->htx", q, k) / math.sqrt(decoder.head_dim)
    weights = plain.softmax(np.where(np.tril(np.ones((length, length), bool)), logits, -np.inf))
    out = np.einsum("htx,xhd->thd", weights, v).reshape(length, -1)
    x = x + out @ p["self_attn"]["o_proj"]["kernel"].T
    if source is not None:
        cross, c = config.crossattention, p["cross_attn"]
        h = plain.rms(x, c["norm"]["scale"], decoder.norm_eps)
        width = cross.width // cross.num_heads
        q = plain.heads(h @ c["q_proj"]["kernel"].T, width)
        k, v = (plain.heads(source @ c[f"{n}_proj"]["kernel"].T, width) for n in "kv")
        read = plain.softmax(np.einsum("thd,xhd->htx", q, k) / math.sqrt(width))
        x = x + np.einsum("htx,xhd->thd", read, v).reshape(length, -1) @ c["o_proj"]["kernel"].T
    h = plain.rms(x, p["post_attention_norm"]["scale"], decoder.norm_eps)
    gate = h @ p["mlp"]["gate_proj"]["kernel"].T
    return weights, x + (gate / (1 + np.exp(-gate)) * (h @ p["mlp"]["up_proj"]["kernel"].T)) @ p["mlp"]["down_proj"][
        "kernel"
    ].T


def encode(params, config, pixels):
    """Tokens that sit in the sequence, and what cross-attention reads, or None."""
    down = plain.triangle(pixels.shape[-1], config.lowres_size)
    small = np.einsum("yi,xj,cij->cyx", down, down, pixels)
    if config.reduction is not None and config.reduction.method in REDUCTIONS:
        return plain.connect(params, REDUCTIONS[config.reduction.method](params, config, small)), None
    if config.grouping is not None:
        return plain.connect(params, grouped(params, config, small)[0]), None
    lowres = see(params, config, small)
    if config.dense is not None:
        both = np.concatenate([lowres, see_tiles(params, config, pixels, config.dense.tiles)])
        return plain.connect(params, both), None
    if config.crossattention is None:
        return plain.connect(params, lowres), None
    highres = see_tiles(params, config, pixels, config.crossattention.tiles)
    if config.crossattention.source == "connector":
        highres = plain.connect(params, highres)
    return plain.connect(params, lowres), highres + params["highres"]["positions"]


def see(params, config, pixels):
    if hasattr(config.vision, "stem_widths"):
        return plain.conv_tower(params["vision"], config.vision, pixels)
    return plain.tower(params, config, pixels)


def see_tiles(params, config, pixels, tiles):
    """(M, Dv) in raster order; the convolutional tower reads the whole picture."""
    if hasattr(config.vision, "stem_widths"):
        return see(params, config, pixels)
    side = pixels.shape[-1] // tiles
    grid = side // config.vision.patch_size
    rows = []
    for i in range(tiles):
        parts = [pixels[:, i * side : (i + 1) * side, j * side : (j + 1) * side] for j in range(tiles)]
        rows.append(np.concatenate([see(params, config, part).reshape(grid, grid, -1) for part in parts], axis=1))
    return np.concatenate(rows).reshape((tiles * grid) ** 2, -1)


def grouped(params, config, pixels):
    """VIS tokens (groups, Dv), and the group of each patch."""
    p, patches = params["grouping"], see(params, config, pixels)
    g = p["semantic_tokens"].astype(np.float64)
    if not hasattr(config.vision, "stem_widths"):  # in a convolutional tower there is nothing for them to read
        g = plain.tower_tokens(params, config, pixels, g)[0][-len(g) :]
    q, k, v = (x @ p[f"{n}_proj"]["kernel"].T for n, x in (("q", g), ("k", patches), ("v", patches)))
    group = (q @ k.T).argmax(axis=0)
    out = []
    for i, own in enumerate(g):
        members = v[group == i]
        out.append(own + members.sum(axis=0) / (len(members) + 1) @ p["o_proj"]["kernel"].T)
    return np.stack(out), group


def visionzip(params, config, pixels):
    tokens, weights, keys = plain.tower_tokens(params, config, pixels)
    count = config.reduction.tokens
    contextual = count * 10 // 64
    scores, keys, patches = weights.sum(axis=0)[0, 1:], keys.mean(axis=1)[1:], tokens[1:]
    dominant = sorted(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[: count - contextual - 1])
    left = [i for i in range(len(scores)) if i not in dominant]
    targets = left[:: max(1, len(left) // max(contextual, 1))][:contextual]
    groups = {t: [patches[t]] for t in targets}
    for i in left:
        if i not in targets and targets:
            cosines = [keys[i] @ keys[t] / np.linalg.norm(keys[i]) / np.linalg.norm(keys[t]) for t in targets]
            groups[targets[int(np.argmax(cosines))]].append(patches[i])
    return np.stack([tokens[0], *patches[dominant], *(np.mean(group, axis=0) for group in groups.values())])


def tome(params, config, pixels):
    tokens = [(1, token) for token in see(params, config, pixels)]
    while len(tokens) > config.reduction.tokens:
        pairs = min(len(tokens) // 2, len(tokens) - config.reduction.tokens)
        first, second = range(0, len(tokens), 2), range(1, len(tokens), 2)
        unit = [token / np.linalg.norm(token) for _, token in tokens]
        nearest = {i: max(second, key=lambda j: (unit[i] @ unit[j], -j)) for i in first}
        gone = sorted(first, key=lambda i: (-(unit[i] @ unit[nearest[i]]), i))[:pairs]
        merged = []
        for j in range(len(tokens)):
            if j in gone:
                continue
            members = [tokens[j], *(tokens[i] for i in gone if j % 2 and nearest[i] == j)]
            size = sum(n for n, _ in members)
            merged.append((size, sum(n * token for n, token in members) / size))
        tokens = merged
    return np.stack([token for _, token in tokens])


def random(params, config, pixels):
    features = see(params, config, pixels)
    order = np.random.default_rng(config.reduction.seed).permutation(len(features))
    return features[sorted(order[: config.reduction.tokens])]


def downsample(params, config, pixels):
    """Means over areas, summed up on a raster so fine that no border cuts a cell."""
    features, count = see(params, config, pixels), config.reduction.tokens
    grid = math.isqrt(len(features))
    bands = max(round(math.sqrt(count)), math.ceil(count / grid))
    parts = [(i + 1) * count // bands - i * count // bands for i in range(bands)]
    means = []
    for i, part in enumerate(parts):
        for j in range(part):
            total, area = 0.0, 0.0
            for y in range(grid):
                for x in range(grid):
                    high = min((i + 1) * grid / bands, y + 1) - max(i * grid / bands, y)
                    wide = min((j + 1) * grid / part, x + 1) - max(j * grid / part, x)
                    if high > 0 and wide > 0:
                        total, area = total + high * wide * features[y * grid + x], area + high * wide
            means.append(total / area)
    return np.stack(means)


REDUCTIONS = {"visionzip": visionzip, "tome": tome, "random": random, "downsample": downsample}
