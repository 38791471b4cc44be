"""Small problems for the tests of the ways to read a picture."""

import numpy as np

from flexattn_jax.inputs.batching import Buckets, make_batch

PLAIN = {"flexattention": None, "image_size": 56}  # the tiny preset as LLaVA-1.5


def problem(config, lengths, places, seed=0):
    """Prompts of several lengths with the picture at `places` (None: no picture), and pixels."""
    rng = np.random.default_rng(seed)
    ids = [rng.integers(3, config.decoder.vocab_size, n) for n in lengths]
    for prompt, place in zip(ids, places, strict=True):
        if place is not None:
            prompt[place] = -200
    return ids, rng.standard_normal((len(ids), 3, config.image_size, config.image_size)).astype(np.float32)


def batch_of(config, ids, pixels):
    samples = [(prompt, image if -200 in prompt else None) for prompt, image in zip(ids, pixels, strict=True)]
    return make_batch(samples, config, Buckets(text_lengths=(16,)), pad_batch_to=len(ids))
