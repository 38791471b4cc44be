"""Every benchmark's reader on a small copy in the public layout, whole, damaged and half downloaded."""

import json
import shutil

import pytest
from inputs import layouts

from flexattn_jax.evaluation.benchmarks import BENCHMARKS
from flexattn_jax.evaluation.harness import open_picture
from flexattn_jax.inputs.datasets import tables
from flexattn_jax.inputs.datasets.questions import DatasetError
from flexattn_jax.inputs.images import ImageError

NAMES = sorted(layouts.LAYOUTS)
# The file that holds the questions, as a path in the layout, and the folder or file that holds pictures.
FILES = {
    "gqa": ("testdev_balanced_questions.json", "images"),
    "hrbench": ("hr_bench_4k.tsv", None),
    "magnifier": ("data_instructions.json", "images.json"),
    "mmbench": ("mmbench_dev_20230712.tsv", None),
    "mme": (None, None),
    "mmvet": ("mm-vet.json", "images"),
    "pope": ("coco/coco_pope_popular.json", "val2014"),
    "refcoco": ("refcocog_val.tsv", None),
    "rsvqa": ("USGS_split_test_phili_answers.json", "Data"),
    "textvqa": ("TextVQA_0.5.1_val.json", "train_images"),
    "vqav2": ("v2_mscoco_val2014_annotations.json", "val2014"),
}


@pytest.fixture
def folder(tmp_path):
    def make(name):
        layouts.LAYOUTS[name](tmp_path / name)
        return tmp_path / name

    return make


def read(name, folder, variant=None):
    benchmark = BENCHMARKS[name]
    return benchmark.read(folder, variant or benchmark.variants[0])


def facts(questions):
    return [(q.id, q.split, q.question, q.options, q.target, q.answers, q.unit) for q in questions]


@pytest.mark.parametrize("name", NAMES)
def test_a_whole_copy_is_read_without_an_error(name, folder):
    questions, errors = read(name, folder(name))
    assert errors == [] or name == "mme"
    assert len({question.id for question in questions}) == len(questions)
    for question in questions:
        assert max(open_picture(question).size) == layouts.SIDE
        assert question.target is None or 0 <= question.target < len(question.options)
        assert question.options or question.answers


def test_magnifier(folder):
    assert facts(read("magnifier", folder("magnifier"))[0])[0] == (
        *("MAG_INS_1", "test", "What color is the kite? A. Red, B. Blue, C. Light green, D. White"),
        *(("Red", "Blue", "Light green", "White"), 1, (), ""),
    )


def test_textvqa_with_and_without_ocr(folder):
    data = folder("textvqa")
    plain, ocr = read("textvqa", data)[0], read("textvqa", data, "ocr")[0]
    assert plain[0].question == "what is the brand of this camera?" and len(plain[0].answers) == 10
    assert ocr[0].question == "What is the brand of this camera?\nReference OCR token: DAKOTA, DIGITAL, Single-Use"
    assert ocr[1].question == "What does the small white text spell?\nReference OCR token: "
    assert [q.id for q in plain] == [q.id for q in ocr] == ["34602", "34603"]
    (data / "llava_textvqa_val_v051_ocr.jsonl").unlink()
    assert len(read("textvqa", data)[0]) == 2
    with pytest.raises(DatasetError, match=r"has no llava_textvqa_val_v051_ocr.jsonl\. TextVQA is published at https"):
        read("textvqa", data, "ocr")


def test_rsvqa_joins_by_the_questions_answers(folder):
    assert facts(read("rsvqa", folder("rsvqa"))[0]) == [
        ("4", "presence", "Is there a road?", (), None, ("yes",), ""),
        ("5", "comp", "Are there more roads than buildings?", (), None, ("no",), ""),
        ("7", "presence", "Is a small road present?", (), None, ("no",), ""),
    ]


def test_rsvqa_refuses_another_questions_answer(folder):
    data = folder("rsvqa")
    path = data / "USGS_split_test_phili_answers.json"
    content = json.loads(path.read_text())
    content["answers"][7]["question_id"] = 5
    path.write_text(json.dumps(content))
    questions, errors = read("rsvqa", data)
    assert len(questions) == 2 and "entry 5: " in errors[0].reason and "has no active answer to it" in errors[0].reason


def test_gqa(folder):
    data = folder("gqa")
    expected = [
        ("201307251", "verify", "Is it overcast?", (), None, ("no",), ""),
        ("201640614", "query", "Who is wearing the dress?", (), None, ("woman",), ""),
        ("202225914", "choose", "Is the dog red or blue?", (), None, ("red",), ""),
    ]
    assert facts(read("gqa", data)[0]) == expected
    (data / "data").mkdir()  # as LLaVA lays it out
    for name in ("images", "testdev_balanced_questions.json"):
        (data / name).rename(data / "data" / name)
    assert facts(read("gqa", data)[0]) == expected


def test_vqav2(folder):
    data = folder("vqav2")
    questions, _ = read("vqav2", data)
    assert [(q.id, q.split, len(q.answers)) for q in questions] == [
        ("262148000", "other", 10),
        ("262148001", "number", 10),
        ("393225000", "yes/no", 10),
    ]
    secret, _ = read("vqav2", data, "test-dev")
    assert [(q.id, q.split, q.answers) for q in secret] == [("1000", "test-dev", ())]
    (data / "v2_OpenEnded_mscoco_test2015_questions.json").unlink()
    with pytest.raises(DatasetError, match=r"has no v2_OpenEnded_mscoco_test2015_questions\.json"):
        read("vqav2", data, "test-dev")


def test_pope_tells_its_three_files_apart(folder):
    questions, _ = read("pope", folder("pope"))
    assert [q.id for q in questions] == [f"{k}/{n}" for k in ("random", "popular", "adversarial") for n in (1, 2)]
    assert [q.target for q in questions] == [0, 1] * 3 and questions[3].question == "Is there a person in the image?"


def test_mmbench_orders_hints_and_missing_options(folder):
    questions, _ = read("mmbench", folder("mmbench"))
    assert [(q.id, q.unit, q.target, len(q.options)) for q in questions] == [
        *[("241", "241", 0, 3), ("1000241", "241", 2, 3), ("2000241", "241", 1, 3)],
        *[("252", "252", 0, 2), ("1000252", "252", 1, 2)],
    ]
    assert questions[0].question == 'Look at "the\ntail".\nWhich of these is true?'
    assert questions[3].question == "Is it day?" and questions[3].options == ("Yes", "No")
    assert questions[1].options == ("It has a white tail.", "It flies.", "It has a black tail.")
    first, referred, other = (open_picture(questions[k]).tobytes() for k in (0, 2, 3))
    assert first == referred != other


def test_a_table_treats_as_missing_what_pandas_does(folder):
    data = folder("mmbench")
    path = data / "mmbench_dev_20230712.tsv"
    path.write_text(path.read_text().replace("\tNo\t\tnan\tA", "\tNone\t\tnan\tA"))
    _, errors = read("mmbench", data)
    assert [e.id for e in errors] == ["row 4"] and "it has 1 options under A, B, C, D" in errors[0].reason


def test_hrbench_knows_the_four_orders_of_a_question(folder):
    data = folder("hrbench")
    for variant in ("4k", "8k"):
        questions, _ = read("hrbench", data, variant)
        units = [q.unit for q in questions]
        assert len(set(units)) == 2 and units[:4] == [units[0]] * 4 and units[4:] == [units[4]] * 4
        assert [q.options[q.target] for q in questions] == ["red"] * 8
        assert [q.split for q in questions] == ["single"] * 4 + ["cross"] * 4


def test_refcoco_boxes_are_shares_and_pictures_are_stretched(folder):
    questions, errors = read("refcoco", folder("refcoco"))
    assert errors == [] and [q.split for q in questions] == ["small", "large", "large"]  # 2 %, 100 % and 50 %
    shares = [json.loads(q.answers[0]) for q in questions]
    assert shares == [pytest.approx(box) for box in ([0, 0, 0.1, 0.2], [0, 0, 1, 1], [0, 0, 0.5, 1])]
    assert questions[2].question == 'the "left" half'  # OFA's tables have no quotes
    assert open_picture(questions[0]).size == (48, 48)
    assert questions[0].bbox == ((0, 0, pytest.approx(4.8), pytest.approx(9.6)),)  # in the stretched picture


def test_mme_reads_both_folder_forms_and_names_missing_categories(folder):
    data = folder("mme")
    questions, errors = read("mme", data)
    assert len(errors) == 10 and {"count", "landmark"} <= {e.id for e in errors}
    assert [(q.id, q.unit, q.target) for q in questions[:2]] == [
        ("existence/000000006040/1", "existence/000000006040", 0),
        ("existence/000000006040/2", "existence/000000006040", 1),
    ]
    assert [q.question for q in questions[:2]] == ["Is there existence?", "Is there none?"]
    assert [q.image.name for q in questions if q.split == "artwork"] == ["10002.jpg"] * 2
    (data / "MME_Benchmark").mkdir()
    for path in [path for path in data.iterdir() if path.name != "MME_Benchmark"]:
        path.rename(data / "MME_Benchmark" / path.name)
    assert facts(read("mme", data)[0]) == facts(questions)
    (data / "MME_Benchmark" / "OCR" / "0001.txt").write_text("Is it? Please answer yes or no. Yes\nx\tNo")
    (data / "MME_Benchmark" / "existence" / "000000006040.txt").write_bytes(b"\xff\xfe")
    _, errors = read("mme", data)
    assert {e.id for e in errors} >= {"OCR/0001/1", "existence/000000006040/1", "existence/000000006040/2"}


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_folder_or_file_says_what_and_where(name, folder, tmp_path):
    source = BENCHMARKS[name].source
    words = f"{source.name} is published at {source.home}; give the folder that holds {source.layout}"
    for data_dir in ("", tmp_path / "nowhere", tmp_path):
        with pytest.raises(DatasetError) as error:
            read(name, data_dir)
        assert words in str(error.value) and "\n" not in str(error.value)
    data = folder(name)
    for part in filter(None, FILES[name]):
        kept = tmp_path / "kept"
        (data / part).rename(kept)
        with pytest.raises(DatasetError, match=f"has no .*{part.split('/')[-1]}.*{source.name} is published at"):
            read(name, data)
        kept.rename(data / part)


@pytest.mark.parametrize("name", [name for name in NAMES if FILES[name][0]])
@pytest.mark.parametrize("share", [0.5, 0.97])
def test_a_half_downloaded_file_is_refused_or_its_rows_are_named(name, share, folder):
    data = folder(name)
    path = data / FILES[name][0]
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    try:
        questions, errors = read(name, data)
    except DatasetError as error:
        assert str(path) in str(error) or "half of it" in str(error)
        return
    # A table without a damaged row in the middle may end early; then its last picture is broken.
    assert path.suffix == ".tsv" and (errors or _breaks(questions[-1]))


def _breaks(question):
    with pytest.raises(ImageError):
        open_picture(question)
    return True


@pytest.mark.parametrize("name", [name for name in NAMES if FILES[name][1] and FILES[name][1] != "images.json"])
def test_missing_pictures(name, folder):
    data = folder(name)
    pictures = sorted((data / FILES[name][1]).iterdir())
    pictures[0].unlink()
    if len(pictures) > 1:
        questions, errors = read(name, data)
        assert questions and errors and all(str(pictures[0]) in error.reason for error in errors)
    shutil.rmtree(data / FILES[name][1])
    (data / FILES[name][1]).mkdir()
    with pytest.raises(DatasetError, match=r"none of the \d+ pictures is there: the picture .*is published at"):
        read(name, data)


ODD = [None, 3, "x", [], {}, [[]], {"a": []}, True, 1e400, "<image>"]


@pytest.mark.parametrize("name", [n for n in NAMES if (FILES[n][0] or "").endswith(".json") and n != "pope"])
def test_odd_values_anywhere_are_errors_of_their_entry_or_of_the_file(name, folder):
    data = folder(name)
    path = data / FILES[name][0]
    content = json.loads(path.read_text())
    before = len(read(name, data)[0])
    changed = 0
    for place in _places(content):
        for odd in ODD:
            path.write_text(json.dumps(_replaced(content, place, odd)))
            try:
                questions, errors = read(name, data)
            except DatasetError:
                changed += 1
                continue
            assert len(questions) + len(errors) <= before
            assert all(isinstance(q.question, str) and "<image>" not in q.question for q in questions)
            changed += len(questions) < before
    assert changed > 20


def _places(node, at=()):
    yield at
    for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        if len(at) < 4 and not (isinstance(key, int) and key > 4 and len(node) > 8):
            yield from _places(value, (*at, key))


def _replaced(node, place, value):
    if not place:
        return value
    copy = dict(node) if isinstance(node, dict) else list(node)
    copy[place[0]] = _replaced(copy[place[0]], place[1:], value)
    return copy


def test_names_of_pictures_may_not_leave_the_folder(folder):
    data = folder("textvqa")
    path = data / "TextVQA_0.5.1_val.json"
    content = json.loads(path.read_text())
    content["data"][0]["image_id"] = "../../secret"
    path.write_text(json.dumps(content))
    questions, errors = read("textvqa", data)
    assert len(questions) == 1 and "which leaves the data folder" in errors[0].reason


def test_a_name_that_is_used_twice_is_an_error(folder):
    data = folder("textvqa")
    path = data / "TextVQA_0.5.1_val.json"
    content = json.loads(path.read_text())
    content["data"][1]["question_id"] = 34602
    path.write_text(json.dumps(content))
    questions, errors = read("textvqa", data)
    assert len(questions) == 1 and errors[0].id == "entry 2" and "used before" in errors[0].reason


def test_rows_are_found_again_whatever_stands_around_them(tmp_path):
    rows = [
        {"index": k, "question": text, "image": layouts.encoded(k)}
        for k, text in enumerate(["plain", 'a "quoted"\ttab', "two\nlines", "é…", ""])
    ]
    layouts.put_table(tmp_path / "t.tsv", rows)
    (tmp_path / "t.tsv").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "t.tsv").read_bytes())  # as some editors save
    read = list(tables.read_table(tmp_path / "t.tsv", BENCHMARKS["mmbench"].source))
    assert [row.values["question"] for row in read] == [row["question"] for row in rows]
    assert [row.picture.read() for row in read] == [layouts.photograph(k) for k in range(5)]
    assert len({row.picture.mark() for row in read}) == 5 and str(read[1].picture).startswith("the picture of row 2 of")
    (tmp_path / "t.tsv").write_text("gone")
    with pytest.raises(ImageError, match="not where it was"):
        read[2].picture.read()


def test_base64_of_both_alphabets_and_none(tmp_path):
    assert tables.decode("-_-_") == tables.decode("+/+/") == tables.decode("+/\n+/ ")
    for broken in ("abc", "a*b=", "é"):
        with pytest.raises(ImageError, match="base64"):
            tables.decode(broken)
