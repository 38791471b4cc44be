"""Text to ids and back with the tokeniser of a checkpoint folder, in Hugging Face's or in SentencePiece's format.

Both give the ids of the LlamaTokenizer that LLaVA-1.5 was trained with (`legacy`): text between special tokens is
encoded on its own, each piece with SentencePiece's leading space, so a piece that starts with a line break, as the one
after the picture does, starts with a lone "▁" token.
"""

from __future__ import annotations

import abc
import contextlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers

from flexattn_jax.config import IMAGE_PLACEHOLDER
from flexattn_jax.files import FileError, first_line, read_bytes, read_json
from flexattn_jax.inputs.prompts import IMAGE_TAG

MAX_CHARACTERS = 1 << 20  # of a text; no model takes as many tokens
_MAX_BYTES = 1 << 28  # of a vocabulary; the largest published ones have 30 MB
_MAX_ID = 1 << 20
_STOPS = KeyboardInterrupt, SystemExit, GeneratorExit
_EXPECTED = (
    "a checkpoint folder holds tokenizer.json (Hugging Face) or tokenizer.model (SentencePiece); copy one from the "
    "published checkpoint"
)


class TokenizerError(ValueError):
    """A tokeniser that cannot be loaded, or text that it cannot take; the message says what to do."""


class Tokenizer(abc.ABC):
    """What the rest of the library knows of a tokeniser. Special tokens written in a text, as "</s>", become their id.

    Attributes:
        vocab_size: largest id + 1.
        bos_id: begin of sequence; None where the tokeniser has none.
        eos_id: end of sequence.
        adds_bos: whether the model was trained on prompts that start with `bos_id`.
    """

    vocab_size: int
    bos_id: int | None
    eos_id: int
    adds_bos: bool

    def encode(self, text: str, add_bos: bool = False) -> list[int]:
        """Ids of `text`, after `bos_id` if asked for (and if there is one)."""
        # A lone surrogate, which JSON can hold, has no UTF-8 form, and the tokenisers would crash on it.
        if not isinstance(text, str):
            raise TokenizerError(f"a text is expected, not {type(text).__name__}")
        if len(text) > MAX_CHARACTERS:
            raise TokenizerError(f"a text has {len(text):,} characters, the limit is {MAX_CHARACTERS:,}; shorten it")
        with _blamed(f"take the text {text[:40]!r}"):
            ids = self._encode(text.encode("utf-8", "replace").decode())
        return [self.bos_id, *ids] if add_bos and self.bos_id is not None else ids

    def decode(self, ids: list[int]) -> str:
        """Text of `ids`, without special tokens and without ids that are in no vocabulary (padded embeddings)."""
        with _blamed(f"decode the ids {ids[:10]}"):
            return self._decode(ids)

    @abc.abstractmethod
    def _encode(self, text: str) -> list[int]: ...

    @abc.abstractmethod
    def _decode(self, ids: list[int]) -> str: ...


class _HuggingFaceTokenizer(Tokenizer):
    def __init__(self, backend: tokenizers.Tokenizer, settings: dict[str, Any]):
        # Files saved after training carry both, and would cut or pad prompts silently.
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.bos_id = _special_id(settings, "bos_token", "<s>", backend.token_to_id)
        self.eos_id = _special_id(settings, "eos_token", "</s>", backend.token_to_id)
        template = self.bos_id is not None and backend.encode("a").ids[:1] == [self.bos_id]
        self.adds_bos = _adds_bos(settings, template)

    def _encode(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=False).ids

    def _decode(self, ids: list[int]) -> str:
        known = [int(i) for i in ids if 0 <= i < self.vocab_size]
        return self._backend.decode(known, skip_special_tokens=True)


class _SentencePieceTokenizer(Tokenizer):
    def __init__(self, backend: sentencepiece.SentencePieceProcessor, added: dict[str, int], settings: dict[str, Any]):
        self._backend = backend
        pieces = backend.GetPieceSize()
        self._special = {backend.IdToPiece(i): i for i in range(pieces) if backend.IsControl(i) or backend.IsUnknown(i)}
        self._special |= added
        self.vocab_size = max([pieces - 1, *self._special.values()]) + 1
        self.bos_id = _special_id(settings, "bos_token", "<s>", self._special.get)
        self.eos_id = _special_id(settings, "eos_token", "</s>", self._special.get)
        self.adds_bos = _adds_bos(settings, self.bos_id is not None)
        longest_first = sorted(self._special, key=len, reverse=True)
        self._splitter = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")

    def _encode(self, text: str) -> list[int]:
        ids = []
        for piece in self._splitter.split(text):
            ids += [self._special[piece]] if piece in self._special else self._backend.EncodeAsIds(piece)
        return ids

    def _decode(self, ids: list[int]) -> str:
        special = set(self._special.values())
        pieces = self._backend.GetPieceSize()
        return self._backend.DecodeIds([int(i) for i in ids if 0 <= i < pieces and i not in special])


@contextlib.contextmanager
def _blamed(what: str) -> Iterator[None]:
    """Makes a TokenizerError of whatever a library raises, as it does where a file's parts do not fit each other."""
    try:
        yield
    except _STOPS:
        raise
    except BaseException as error:
        raise TokenizerError(
            f"the tokeniser cannot {what} ({first_line(error)}), so its file is damaged: {_EXPECTED}"
        ) from error


def load_tokenizer(folder: str | os.PathLike) -> Tokenizer:
    """The tokeniser of a checkpoint folder: tokenizer.json, or else tokenizer.model with its added_tokens.json.

    tokenizer_config.json and special_tokens_map.json, where present, name the special tokens.

    Raises:
        TokenizerError: no such file, a broken one, or no end-of-sequence token.
    """
    folder = Path(folder)
    fast, slow = folder / "tokenizer.json", folder / "tokenizer.model"
    file = fast if fast.is_file() else slow
    if not file.is_file():
        raise TokenizerError(f"{folder} holds no tokeniser: {_EXPECTED}")
    settings = _read_json(folder / "special_tokens_map.json") | _read_json(folder / "tokenizer_config.json")
    added = _read_json(folder / "added_tokens.json")
    if not all(token and type(i) is int and 0 <= i < _MAX_ID for token, i in added.items()):
        raise TokenizerError(f"{folder / 'added_tokens.json'} must map tokens to ids from 0 on; copy it again")
    try:
        data = read_bytes(file, _MAX_BYTES)
    except FileError as error:
        raise TokenizerError(f"{file} {error}: {_EXPECTED}") from error
    if not data:
        raise TokenizerError(f"{file} is empty: {_EXPECTED}")
    try:
        if file == fast:
            tokenizer = _HuggingFaceTokenizer(tokenizers.Tokenizer.from_str(data.decode()), settings)
        else:
            backend = sentencepiece.SentencePieceProcessor(model_proto=data)
            tokenizer = _SentencePieceTokenizer(backend, added, settings)
    except TokenizerError as error:
        raise TokenizerError(f"{folder}: {error}") from None
    except _STOPS:
        raise
    except BaseException as error:  # of every type, on a damaged file; a panic of Rust's is not even an Exception
        raise TokenizerError(f"{file} is damaged or of another format: {_EXPECTED}") from error
    if tokenizer.eos_id is None:
        raise TokenizerError(f"{folder} names no end-of-sequence token; set eos_token in its tokenizer_config.json")
    return tokenizer


def tokenize_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Ids of a prompt with IMAGE_PLACEHOLDER in the place of "<image>" (LLaVA's `tokenizer_image_token`).

    The texts before and after the picture are encoded separately; BOS stands once, in front.

    Raises:
        TokenizerError: more than one "<image>".
    """
    pieces = prompt.split(IMAGE_TAG)
    if len(pieces) > 2:
        raise TokenizerError(
            f'the prompt holds "{IMAGE_TAG}" {len(pieces) - 1} times; one picture a prompt is supported, '
            "so write it once, and not in the question itself"
        )
    ids = tokenizer.encode(pieces[0], add_bos=tokenizer.adds_bos)
    for piece in pieces[1:]:
        ids += [IMAGE_PLACEHOLDER, *tokenizer.encode(piece)]
    return ids


def tokenize_continuation(tokenizer: Tokenizer, prompt: str, continuation: str) -> list[int]:
    """Ids that `continuation` adds to `prompt` when the two are tokenised as one text, as the V* scorers do.

    Raises:
        TokenizerError: it adds no id, or it changes how the prompt itself is tokenised (a score would then be of
            another text).
    """
    before = tokenize_prompt(tokenizer, prompt)
    ids = tokenize_prompt(tokenizer, prompt + continuation)
    if ids[: len(before)] != before:
        raise TokenizerError(
            f"the continuation {continuation!r} melts into the last token of the prompt {prompt[-20:]!r}; "
            "start it with a space and end the prompt without one"
        )
    if len(ids) == len(before):
        raise TokenizerError(f"the continuation {continuation!r} adds no token to the prompt; give some text to score")
    return ids[len(before) :]


def _special_id(settings: dict[str, Any], key: str, usual: str, lookup: Callable[[str], int | None]) -> int | None:
    name = settings.get(key) or usual
    name = name.get("content") if isinstance(name, dict) else name
    if not isinstance(name, str):
        raise TokenizerError(f"{key} is {str(name)[:80]!r}; it must be a token, or a table with the token as content")
    return lookup(name)


def _adds_bos(settings: dict[str, Any], usual: bool) -> bool:
    value = settings.get("add_bos_token")
    return value if isinstance(value, bool) else usual


def _read_json(file: Path) -> dict[str, Any]:
    try:
        values = read_json(file)
    except FileNotFoundError:
        return {}
    except FileError as error:
        raise TokenizerError(f"{file} {error}; copy it again from the published checkpoint") from error
    if not isinstance(values, dict):
        raise TokenizerError(f"{file} holds no JSON object; copy it again from the published checkpoint")
    return values
