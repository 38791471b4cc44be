"""LLaVA's instruction data: one JSON file of conversations and a folder of the pictures that they name.

    llava_v1_5_mix665k.json   https://huggingface.co/datasets/liuhaotian/LLaVA-Instruct-150K
    pictures/coco/train2017/  gqa/images/  ocr_vqa/images/  textvqa/train_images/  vg/VG_100K/  vg/VG_100K_2/

What the file and the folder do not agree on is common: OCR-VQA's covers come as .jpg, .png and .gif whatever the file
says, and some pictures are gone from the web. So a picture is also found under another suffix, and a conversation that
cannot be used is listed and left out.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from flexattn_jax.files import DATA_BYTES, FileError, leaves_folder, read_json
from flexattn_jax.inputs.conversations import Conversation, ConversationError, Turn
from flexattn_jax.inputs.prompts import IMAGE_TAG

SUFFIXES = (".png", ".jpg", ".jpeg", ".gif", ".webp")  # in the order in which a missing picture is looked for
HOMES = (
    "the conversations are at https://huggingface.co/datasets/liuhaotian/LLaVA-Instruct-150K "
    "(llava_v1_5_mix665k.json), and its LLaVA page says where each folder of pictures comes from: coco/train2017, "
    "gqa/images, ocr_vqa/images, textvqa/train_images, vg/VG_100K, vg/VG_100K_2"
)


class Skipped(NamedTuple):
    """A conversation that is left out, and why."""

    name: str
    reason: str


def read_llava(
    file: str | os.PathLike, pictures: str | os.PathLike, follow_links: bool = False
) -> tuple[list[Conversation], list[Skipped]]:
    """Reads conversations in LLaVA's format and finds their pictures; opens none of them.

    IMAGE_TAG is moved to the front of its question, as LLaVA does, or put before the first one where a conversation
    names a picture and no place for it. A conversation without a picture is about text.

    Args:
        file: JSON list of {"id", "image" (optional), "conversations": [{"from": "human" | "gpt", "value"}, ...]}.
        pictures: folder that "image" is relative to.
        follow_links: whether links may lead out of that folder.

    Returns:
        usable conversations in the file's order, and the others.

    Raises:
        ConversationError: the file or the folder is missing or of another format.
    """
    file, pictures = Path(file), Path(pictures)
    if not file.is_file():
        raise ConversationError(f"the conversations {file} do not exist; give the JSON file: {HOMES}")
    if not pictures.is_dir():
        raise ConversationError(f"the folder of pictures {pictures} does not exist; {HOMES}")
    try:
        records = read_json(file, DATA_BYTES)
    except FileError as error:
        raise ConversationError(f"{file} {error}; download it again") from error
    if not isinstance(records, list):
        raise ConversationError(f"{file} holds no list of conversations; {HOMES}")
    finder = PictureFinder(pictures, follow_links)
    usable, skipped = [], []
    for number, record in enumerate(records):
        name = f"{number}:{record.get('id', '')}" if isinstance(record, dict) else str(number)
        try:
            usable.append(_conversation(name, record, finder))
        except ConversationError as error:
            skipped.append(Skipped(name, str(error)))
    return usable, skipped


class PictureFinder:
    """Finds pictures below a folder by listing each of its folders once, which is far quicker than asking for each."""

    def __init__(self, root: Path, follow_links: bool = False):
        self._root, self._follow_links = root, follow_links
        self._listings: dict[str, dict[str, str]] = {}  # folder -> name, and stem in lower case -> best name
        self._leaving: dict[str, set[str]] = {}  # folder -> names that lead out of the root

    def find(self, path: str) -> str:
        """The picture's path relative to the root: as given, or with another suffix.

        Raises:
            ConversationError: it is not there, or lies outside the root, be it by a link.
        """
        pure = PurePosixPath(path)
        if pure.is_absolute() or ".." in pure.parts or not pure.name or "\0" in path:
            raise ConversationError(f"its picture {path!r} is no path inside the folder of pictures")
        folder = str(pure.parent)
        listing = self._listings.get(folder)
        if listing is None:
            listing = self._listings[folder] = self._list(folder)
        found = listing.get(pure.name) or listing.get(_stem_key(pure.name))
        if found is None:
            raise ConversationError(f"its picture {path} is missing, under any of {', '.join(SUFFIXES)}")
        if found in self._leaving.get(folder, ()):
            raise ConversationError(
                f"its picture {path} is a link out of the folder of pictures; set data.follow_links if it may be one"
            )
        return str(pure.with_name(found))

    def _list(self, folder: str) -> dict[str, str]:
        try:
            outside = leaves_folder(self._root / folder, self._root)
            with os.scandir(self._root / folder) as entries:
                linked = {entry.name: entry.is_symlink() for entry in entries if not entry.is_dir()}
        except (OSError, ValueError):  # half a character, which JSON can hold, is part of no file's name
            return {}
        if not self._follow_links:
            self._leaving[folder] = {
                name
                for name, link in linked.items()
                if outside or (link and leaves_folder(self._root / folder / name, self._root))
            }
        names = list(linked)
        rank = {suffix: place for place, suffix in enumerate(SUFFIXES)}
        known = sorted((n for n in names if _suffix(n) in rank), key=lambda n: (rank[_suffix(n)], n), reverse=True)
        return {_stem_key(name): name for name in known} | {name: name for name in names}


def _suffix(name: str) -> str:
    return PurePosixPath(name).suffix.lower()


def _stem_key(name: str) -> str:
    return PurePosixPath(name).stem + "/"  # a slash, so that it is no file's name


def _conversation(name: str, record: Any, finder: PictureFinder) -> Conversation:
    if not isinstance(record, dict) or not isinstance(record.get("conversations"), list):
        raise ConversationError("it is no conversation: no list `conversations`")
    turns = _turns(record["conversations"])
    picture = record.get("image")
    tags = sum(turn.question.count(IMAGE_TAG) for turn in turns)
    if any(IMAGE_TAG in turn.answer for turn in turns):
        raise ConversationError(f"{IMAGE_TAG} stands in an answer")
    if picture is None:
        if tags:
            raise ConversationError(f"it holds {IMAGE_TAG} and names no picture")
        return Conversation(name, turns)
    if isinstance(picture, list) and len(picture) > 1:
        raise ConversationError("it names more than one picture; one a conversation is supported")
    if not isinstance(picture, str):
        raise ConversationError("its `image` is not the path of a picture")
    if tags > 1:
        raise ConversationError(f"{IMAGE_TAG} stands in it {tags} times; one picture a conversation is supported")
    place = next((i for i, turn in enumerate(turns) if IMAGE_TAG in turn.question), 0)
    question = turns[place].question.replace(IMAGE_TAG, "").strip()
    moved = turns[place]._replace(question=f"{IMAGE_TAG}\n{question}".strip())
    return Conversation(name, (*turns[:place], moved, *turns[place + 1 :]), finder.find(picture))


def _turns(sentences: Iterable[Any]) -> tuple[Turn, ...]:
    """Pairs of questions and answers. As in LLaVA an answer before the first question is dropped."""
    said = []
    for sentence in sentences:
        who, what = (sentence.get("from"), sentence.get("value")) if isinstance(sentence, dict) else (None, None)
        if who not in ("human", "gpt") or not isinstance(what, str):
            raise ConversationError('a sentence of it is not {"from": "human" or "gpt", "value": text}')
        said.append((who, what))
    if said and said[0][0] == "gpt":
        said = said[1:]
    if any(who != ("human", "gpt")[place % 2] for place, (who, _) in enumerate(said)):
        raise ConversationError("its questions and answers do not alternate")
    pairs = [Turn(said[i][1], said[i + 1][1]) for i in range(0, len(said) - 1, 2)]  # a last question has no answer
    if not pairs:
        raise ConversationError("it has no question with an answer")
    return tuple(pairs)
