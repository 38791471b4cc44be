"""TextVQA v0.5.1, validation: questions about text in photographs, each with ten people's answers.

    data_dir/TextVQA_0.5.1_val.json             {"data": [{question_id, question, image_id, answers (10)}]}
    data_dir/train_images/IMAGE_ID.jpg
    data_dir/llava_textvqa_val_v051_ocr.jsonl   variant "ocr": LLaVA's prompts with OCR tokens (its eval.zip)

Without OCR tokens ("plain") is FlexAttention's protocol (scripts/evaluation/eval_textvqa.py); with them is LLaVA-1.5's
(scripts/v1_5/eval/textvqa.sh). Figures of the two are not comparable.
"""

from __future__ import annotations

from pathlib import Path

from flexattn_jax.inputs.datasets import questions as q
from flexattn_jax.inputs.prompts import SHORT_ANSWER

SOURCE = q.Source(
    name="TextVQA",
    home="https://textvqa.org/dataset",
    layout="TextVQA_0.5.1_val.json and train_images/ (for :ocr also LLaVA's llava_textvqa_val_v051_ocr.jsonl)",
)
VARIANTS = ("plain", "ocr")
OCR_FILE = "llava_textvqa_val_v051_ocr.jsonl"
OCR_MARK = "Reference OCR token:"


def read_textvqa(data_dir: str | Path, variant: str) -> q.Reading:
    """The questions, and what could not be read. In variant "ocr" a question goes on with a line of OCR tokens.

    Raises:
        DatasetError: a file is missing or cannot be read.
    """
    root = SOURCE.root(data_dir)
    where = SOURCE.find(root, "TextVQA_0.5.1_val.json")
    entries = SOURCE.entries(where, "data")
    pictures = SOURCE.find(root, "train_images")
    prompts = _ocr_prompts(SOURCE.find(root, OCR_FILE)) if variant == "ocr" else None

    def make(entry: dict) -> q.Question:
        question, image = q.text(entry, "question"), q.file_name(entry, "image_id")
        if prompts is not None:
            if (image, question.lower()) not in prompts:
                raise q.EntryError(f"{OCR_FILE} has no prompt for {question!r} about {image}")
            question = prompts[image, question.lower()]
        return q.Question(
            id=q.number_or_text(entry, "question_id"),
            split="val",
            image=pictures / f"{image}.jpg",
            question=question,
            answers=q.human_answers(entry, "answers"),
        )

    return SOURCE.collect(root, where, q.numbered(entries, make))


def _ocr_prompts(path: Path) -> dict[tuple[str, str], str]:
    """Question and OCR line by picture and question, as llava/eval/eval_textvqa.py joins them."""
    prompts = {}
    for entry in SOURCE.load_lines(path):
        try:
            prompt, image = q.text(entry, "text").removesuffix(SHORT_ANSWER), q.number_or_text(entry, "question_id")
        except q.EntryError as error:
            raise q.DatasetError(f"{path} has an entry of another form: {error}. {SOURCE}") from None
        lines = prompt.split("\n")
        question = next((line for line in lines if not line.startswith(OCR_MARK)), "")
        prompts[image, question.lower()] = prompt
    return prompts
