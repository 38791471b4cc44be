"""MagnifierBench (OtterHD, arXiv 2311.04219): multiple-choice questions about small things.

    data_dir/images.json               {name: base64 of a picture}
    data_dir/data_instructions.json    {"data": {name: {instruction, answer (a letter), image_ids, rel_ins_ids}}}

The instruction holds question and options: "What is ...? A. x, B. y, C. z, D. w". The layout is the one that
UMass-Foundation-Model/FlexAttention reads (utils/magnifier.py).
"""

from __future__ import annotations

import re
from pathlib import Path

from flexattn_jax.inputs.datasets import questions as q
from flexattn_jax.inputs.datasets.tables import EncodedPicture

SOURCE = q.Source(
    name="MagnifierBench",
    home="https://github.com/UMass-Foundation-Model/FlexAttention (README; also https://huggingface.co/datasets/Otter-AI)",
    layout="images.json and data_instructions.json",
)

# Each mark is looked for once, behind the one before it: where a later one is missing, no other choice would help.
_OPTIONS = re.compile(r"(?>.*?A\. )(?>(.+?), B\. )(?>(.+?), C\. )(?>(.+?), D\. )(.+)", re.DOTALL)


def read_magnifier(data_dir: str | Path) -> q.Reading:
    """The questions, and what could not be read. The options are four letters where the instruction has another form.

    Raises:
        DatasetError: a file is missing or cannot be read.
    """
    root = SOURCE.root(data_dir)
    where = SOURCE.find(root, "data_instructions.json")
    pictures = SOURCE.load(SOURCE.find(root, "images.json"))
    content = SOURCE.load(where)
    entries = content.get("data") if isinstance(content, dict) else None
    if not isinstance(entries, dict) or not isinstance(pictures, dict):
        raise q.DatasetError(f"{where} or images.json beside it has another form than {SOURCE.name}'s. {SOURCE}")

    def make(name: str, entry: dict) -> q.Question:
        instruction, answer = q.text(entry, "instruction"), q.text(entry, "answer")
        if answer not in tuple("ABCD"):
            raise q.EntryError(f"'answer' is {answer!r}; it must be one of A, B, C, D")
        wanted = q.texts(entry, "image_ids")
        held = next((key for key in wanted if isinstance(pictures.get(key), str)), None)
        if held is None:
            raise q.EntryError(f"images.json has no picture {wanted[0]!r}; download it again from {SOURCE.home}")
        options = _OPTIONS.match(instruction)
        return q.Question(
            id=name,
            split="test",
            image=EncodedPicture(f"picture {held} of {root / 'images.json'}", pictures[held]),
            question=instruction,
            options=tuple(option.strip() for option in options.groups()) if options else tuple("ABCD"),
            target="ABCD".index(answer),
        )

    return SOURCE.collect(root, where, ((name, lambda n=name, e=entry: make(n, e)) for name, entry in entries.items()))
