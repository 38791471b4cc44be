"""Small copies of the benchmarks in their public layouts, with real photographs scaled down to a few kilobytes."""

from __future__ import annotations

import base64
import csv
import functools
import io
import json
from pathlib import Path

from PIL import Image

from flexattn_jax.evaluation.demo import demo_questions

SIDE = 48


@functools.cache
def photograph(number: int = 0, kind: str = "JPEG", size: tuple[int, int] | None = None) -> bytes:
    """The bytes of a small picture; `number` tells photographs apart, `size` stretches one."""
    paths = sorted(demo_questions().glob("*/*.jpg"))
    picture = Image.open(paths[number % len(paths)]).convert("RGB")
    if size:
        picture = picture.resize(size)
    picture.thumbnail((SIDE, SIDE))
    file = io.BytesIO()
    picture.save(file, kind)
    return file.getvalue()


def encoded(number: int = 0, **kwargs) -> str:
    return base64.b64encode(photograph(number, **kwargs)).decode()


def put(path: Path, content: bytes | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def put_json(path: Path, content) -> None:
    put(path, json.dumps(content))


def put_lines(path: Path, entries: list) -> None:
    put(path, "".join(json.dumps(entry) + "\n" for entry in entries))


def put_table(path: Path, rows: list[dict]) -> None:
    """As pandas writes a table: tabs, a head, quotes where they are needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]), delimiter="\t", lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


def magnifier(folder: Path) -> None:
    put_json(folder / "images.json", {"MAG_IMG_1": encoded(0), "MAG_IMG_2": encoded(1)})
    instructions = {
        "MAG_INS_1": ("What color is the kite? A. Red, B. Blue, C. Light green, D. White", "B", "MAG_IMG_1"),
        "MAG_INS_2": ("How many dogs are there? A. one, B. two, C. three, D. none", "A", "MAG_IMG_2"),
    }
    data = {
        name: {"instruction": text, "answer": answer, "image_ids": [image], "rel_ins_ids": []}
        for name, (text, answer, image) in instructions.items()
    }
    put_json(folder / "data_instructions.json", {"meta": {"version": "0.0.1"}, "data": data})


def textvqa(folder: Path) -> None:
    data = [
        {
            "question": "what is the brand of this camera?",
            "image_id": "003a8ae2ef43b901",
            "question_id": 34602,
            "answers": ["nous les gosses", "dakota", "clos culombu", "dakota digital", *["dakota"] * 6],
        },
        {
            "question": "What does the small white text spell?",
            "image_id": "004d876be74ec32d",
            "question_id": 34603,
            "answers": ["copenhagen", "", *["drupalcon copenhagen"] * 8],
        },
    ]
    put_json(folder / "TextVQA_0.5.1_val.json", {"dataset_type": "val", "data": data})
    for number, entry in enumerate(data):
        put(folder / "train_images" / f"{entry['image_id']}.jpg", photograph(number))
    tail = "\nAnswer the question using a single word or phrase."
    prompts = [
        "What is the brand of this camera?\nReference OCR token: DAKOTA, DIGITAL, Single-Use" + tail,
        "What does the small white text spell?\nReference OCR token: " + tail,
    ]
    lines = [
        {"question_id": e["image_id"], "image": f"{e['image_id']}.jpg", "text": text, "category": "default"}
        for e, text in zip(data, prompts, strict=True)
    ]
    put_lines(folder / "llava_textvqa_val_v051_ocr.jsonl", lines)


def rsvqa(folder: Path) -> None:
    name = "USGS_split_test_phili_{}.json"
    # As in the published files, entries of other splits are there without content, and ids do not start at 0.
    questions = [{"id": k, "active": False} for k in range(4)] + [
        {"id": 4, "date_added": 1.5e9, "img_id": 8, "people_id": 0, "type": "presence", "active": True}
        | {"question": "Is there a road?", "answers_ids": [7]},
        {"id": 5, "img_id": 8, "type": "comp", "question": "Are there more roads than buildings?", "active": True}
        | {"answers_ids": [6]},
        {"id": 6, "img_id": 9, "type": "count", "question": "How many roads?", "answers_ids": [8], "active": True},
        {"id": 7, "img_id": 9, "type": "presence", "question": "Is a small road present?", "active": True}
        | {"answers_ids": [4]},
    ]
    answers = [{"id": k, "active": False} for k in range(4)] + [
        {"id": 4, "question_id": 7, "answer": "no", "active": True},
        {"id": 5, "active": False},
        {"id": 6, "question_id": 5, "answer": "no", "active": True},
        {"id": 7, "question_id": 4, "answer": "yes", "active": True},
        {"id": 8, "question_id": 6, "answer": "12", "active": True},
    ]
    put_json(folder / name.format("questions"), {"questions": questions})
    put_json(folder / name.format("answers"), {"answers": answers})
    put_json(folder / name.format("images"), {"images": [{"id": k, "active": k > 7} for k in range(10)]})
    for number in (8, 9):
        put(folder / "Data" / f"{number}.tif", photograph(number, kind="TIFF"))


def gqa(folder: Path) -> None:
    def entry(image, question, answer, structural):
        types = {"structural": structural, "semantic": "attr", "detailed": "x"}
        return {"imageId": image, "question": question, "answer": answer, "isBalanced": True, "types": types}

    questions = {
        "201307251": entry("n161313", "Is it overcast?", "no", "verify"),
        "201640614": entry("n235859", "Who is wearing the dress?", "woman", "query"),
        "202225914": entry("n161313", "Is the dog red or blue?", "red", "choose"),
    }
    put_json(folder / "testdev_balanced_questions.json", questions)
    for number, image in enumerate(("n161313", "n235859")):
        put(folder / "images" / f"{image}.jpg", photograph(number))


def vqav2(folder: Path) -> None:
    asked = [
        {"image_id": 262148, "question": "Where is he looking?", "question_id": 262148000},
        {"image_id": 262148, "question": "How many people are there?", "question_id": 262148001},
        {"image_id": 393225, "question": "Is this a creamy soup?", "question_id": 393225000},
    ]

    def answers(*texts):
        return [{"answer": t, "answer_confidence": "yes", "answer_id": k} for k, t in enumerate(texts, start=1)]

    annotations = [
        {"question_id": 262148000, "answer_type": "other", "answers": answers(*["down"] * 8, "at table", "skateboard")},
        {"question_id": 262148001, "answer_type": "number", "answers": answers(*["2"] * 10)},
        {"question_id": 393225000, "answer_type": "yes/no", "answers": answers(*["no"] * 7, *["yes"] * 3)},
    ]
    put_json(folder / "v2_OpenEnded_mscoco_val2014_questions.json", {"questions": asked})
    put_json(folder / "v2_mscoco_val2014_annotations.json", {"annotations": annotations})
    secret = [{"image_id": 1, "question": "Is it day?", "question_id": 1000}]
    put_json(folder / "v2_OpenEnded_mscoco_test-dev2015_questions.json", {"questions": secret})
    every = [*secret, {"image_id": 14, "question": "What is it?", "question_id": 14000}]
    put_json(folder / "v2_OpenEnded_mscoco_test2015_questions.json", {"questions": every})
    for number in (262148, 393225):
        put(folder / "val2014" / f"COCO_val2014_{number:012d}.jpg", photograph(number))
    put(folder / "test2015" / "COCO_test2015_000000000001.jpg", photograph(1))


def pope(folder: Path) -> None:
    for kind, thing in (("random", "zebra"), ("popular", "person"), ("adversarial", "fork")):
        image = "COCO_val2014_000000310196.jpg"
        lines = [
            {"question_id": 1, "image": image, "text": "Is there a snowboard in the image?", "label": "yes"},
            {"question_id": 2, "image": image, "text": f"Is there a {thing} in the image?", "label": "no"},
        ]
        put_lines(folder / "coco" / f"coco_pope_{kind}.json", lines)
    put(folder / "val2014" / image, photograph())


def mmbench(folder: Path) -> None:
    options = ("It has a black tail.", "It has a white tail.", "It flies.")
    rows = []
    for turn in range(3):  # the question in each order of its options; VLMEvalKit's tables refer to the first's picture
        turned = options[turn:] + options[:turn]
        rows.append(
            {"index": 241 + turn * 1_000_000, "question": "Which of these is true?", "hint": 'Look at "the\ntail".'}
            | dict(zip("ABC", turned, strict=True))
            | {"D": "", "answer": "ABC"[turned.index(options[0])], "category": "attribute_recognition"}
            | {"image": "241" if turn else encoded(0, kind="PNG"), "source": "s", "l2-category": "x", "comment": ""}
        )
    for turn in range(2):
        rows.append(
            {"index": 252 + turn * 1_000_000, "question": "Is it day?", "hint": "nan", "A": ("Yes", "No")[turn]}
            | {"B": ("No", "Yes")[turn], "C": "", "D": "nan", "answer": "AB"[turn], "category": "image_scene"}
            | {"image": encoded(1), "source": "s", "l2-category": "y", "comment": ""}
        )
    put_table(folder / "mmbench_dev_20230712.tsv", rows)


def hrbench(folder: Path) -> None:
    options = ("red", "blue", "green", "white")
    for size, number in (("4k", 0), ("8k", 1)):
        rows = [
            {"index": 4 * k + turn, "question": f"What color is bag {k}?", "answer": "ABCD"[-turn % 4]}
            | dict(zip("ABCD", options[turn:] + options[:turn], strict=True))
            | {"category": ("single", "cross")[k], "cycle_category": f"cycle {turn}", "image": encoded(number)}
            for k in range(2)
            for turn in range(4)
        ]
        put_table(folder / f"hr_bench_{size}.tsv", rows)


def refcoco(folder: Path) -> None:
    wide = {"size": (100, 50), "kind": "PNG"}  # a thumbnail of 48 x 24
    image = encoded(0, **wide).replace("+", "-").replace("/", "_")  # OFA's tables use the other alphabet
    lines = [
        f"0\t1001\tthe dog's ear\t0.0,0.0,4.8,4.8\t{image}\n",
        f"1\t1001\tall of it\t0,0,48,24\t{image}\n",
        f'2\t1001\tthe "left" half\t0,0,24,24\t{image}\n',
    ]
    put(folder / "refcocog_val.tsv", "".join(lines))


def mme(folder: Path) -> None:
    flat = {"existence": "000000006040", "OCR": "0001", "code_reasoning": "0020"}
    for number, (category, name) in enumerate(flat.items()):
        suffix, kind = (".png", "PNG") if category == "code_reasoning" else (".jpg", "JPEG")
        put(folder / category / f"{name}{suffix}", photograph(number, kind=kind))
        lines = f"Is there {category}? Please answer yes or no.\tYes\nIs there none?  Please answer yes or no.\tNo\n"
        put(folder / category / f"{name}.txt", lines)
    put(folder / "artwork" / "images" / "10002.jpg", photograph(5))
    lines = "Does this artwork exist in the form of painting? Please answer yes or no.\tYes\n"
    lines += "Does this artwork exist in the form of glassware? Please answer yes or no.\tNo\n"
    put(folder / "artwork" / "questions_answers_YN" / "10002.txt", lines)


def mmvet(folder: Path) -> None:
    entries = {
        "v1_0": ("v1_0.png", "What is x in the equation?", "-1<AND>-5"),
        "v1_1": ("v1_1.png", "What is d in the last equation?", "5"),
    }
    content = {
        name: {"imagename": image, "question": question, "answer": answer, "imagesource": "u", "capability": ["ocr"]}
        for name, (image, question, answer) in entries.items()
    }
    put_json(folder / "mm-vet.json", content)
    for number, name in enumerate(entries):
        put(folder / "images" / f"{name}.png", photograph(number, kind="PNG"))


LAYOUTS = {
    one.__name__: one for one in (magnifier, textvqa, rsvqa, gqa, vqav2, pope, mmbench, hrbench, refcoco, mme, mmvet)
}
