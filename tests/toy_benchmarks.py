"""Tiny data directories of benchmarks, each in its own file format: LLaVA's, and tables of lmms-lab's layout.

The questions of a table are those of LLaVA's files, in their order.
"""

import io
import zlib
from pathlib import Path

from PIL import Image
from toy_eval_data import write_json, write_lines, write_table

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."


def drawn(name: str) -> bytes:
    """Return the image file of a name; colour and size depend on the name."""
    seed = zlib.crc32(Path(name).stem.encode())
    image = Image.new("RGB", (20 + seed % 9, 16 + seed % 7), (seed % 256, seed // 256 % 256, seed // 65536 % 256))
    file = io.BytesIO()
    image.save(file, "PNG" if name.endswith("png") else "JPEG")
    return file.getvalue()


def draw(path: Path) -> None:
    """Write the image of a name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(drawn(path.name))


def ten(*answers: str) -> list[str]:
    """Return the answers of ten people: those given, and the first one as often as is left."""
    return [*answers, *[answers[0]] * (10 - len(answers))]


# (part, image, object, label): two questions of each part.
POPE = [
    ("adversarial", "COCO_val2014_000000000001.jpg", "dog", "yes"),
    ("adversarial", "COCO_val2014_000000000002.jpg", "cat", "no"),
    ("popular", "COCO_val2014_000000000001.jpg", "dog", "yes"),
    ("popular", "COCO_val2014_000000000002.jpg", "person", "no"),
    ("random", "COCO_val2014_000000000001.jpg", "dog", "yes"),
    ("random", "COCO_val2014_000000000002.jpg", "kite", "no"),
]


def pope_lines():
    """Return the lines of the label files, with their part."""
    return [
        {
            "question_id": 1 + number % 2,
            "image": image,
            "text": f"Is there a {thing} in the image?",
            "label": label,
            "part": part,
        }
        for number, (part, image, thing, label) in enumerate(POPE)
    ]


def pope(directory: Path) -> None:
    """POPE: LLaVA's questions, a label file of each part, two images."""
    for part in ("adversarial", "popular", "random"):
        lines = [
            {key: value for key, value in line.items() if key != "part"}
            for line in pope_lines()
            if line["part"] == part
        ]
        write_lines(directory / f"coco/coco_pope_{part}.json", lines)
    keys = ("question_id", "image")
    write_lines(
        directory / "llava_pope_test.jsonl",
        [
            {**{key: line[key] for key in keys}, "text": line["text"] + SHORT, "category": line["part"]}
            for line in pope_lines()
        ],
    )
    for name in {line["image"] for line in pope_lines()}:
        draw(directory / "val2014" / name)


def pope_table(directory: Path) -> None:
    """POPE: the test table, and the tables of the parts beside it, which hold the same questions again."""
    rows = [
        {
            "question_id": str(line["question_id"]),
            "question": line["text"],
            "answer": line["label"],
            "image_source": line["image"].removesuffix(".jpg"),
            "image": drawn(line["image"]),
            "category": line["part"],
        }
        for line in pope_lines()
    ]
    write_table(directory / "data/test-00000-of-00001.parquet", rows)
    write_table(directory / "Full/random-00000-of-00001.parquet", rows[4:])


TEXTVQA = [
    ("0a1", "what is the brand?", ["DELL", "XPS"], ten("dell", "Dell.", "hp")),
    ("0a2", "What year is it?", [], ten("2015", "2015", "2014", "unanswerable")),
    ("0a1", "how many letters?", ["DELL", "XPS"], ten("4", "four", "3", "3", "5", "6", "7", "8", "9", "10")),
]


def textvqa(directory: Path) -> None:
    """TextVQA: LLaVA's questions with OCR tokens, the annotations, two images."""
    lines, data = [], []
    for number, (image, question, tokens, answers) in enumerate(TEXTVQA):
        ocr = f"\nReference OCR token: {', '.join(tokens)}" if tokens else ""
        lines.append(
            {"question_id": image, "image": f"{image}.jpg", "text": question + ocr + SHORT, "category": "default"}
        )
        data.append({"question_id": 34602 + number, "image_id": image, "question": question, "answers": answers})
        draw(directory / "train_images" / f"{image}.jpg")
    write_lines(directory / "llava_textvqa_val_v051_ocr.jsonl", lines)
    write_json(directory / "TextVQA_0.5.1_val.json", {"data": data})


def textvqa_table(directory: Path) -> None:
    """TextVQA: the validation table."""
    rows = [
        {
            "image_id": image,
            "question_id": 34602 + number,
            "question": question,
            "image": drawn(f"{image}.jpg"),
            "ocr_tokens": tokens,
            "answers": answers,
        }
        for number, (image, question, tokens, answers) in enumerate(TEXTVQA)
    ]
    write_table(directory / "data/validation-00000-of-00001.parquet", rows)


# (id, number of the image, question, type of the answer, answers)
VQAV2 = [
    (42000, 42, "Is the ball red?", "yes/no", ten("yes", "no", "no")),
    (42001, 42, "How many balls?", "number", ten("2", "two", "3", "3", "4", "5", "6", "7", "8", "9")),
    (43000, 43, "What is it?", "other", ten("black / white", "zebra")),
]
VQAV2_TEST = [(1, 11, "Is it day?"), (2, 11, "What is left?"), (3, 12, "How many?")]


def vqav2(directory: Path) -> None:
    """VQAv2: the files of val, and LLaVA's questions of test-dev and test."""
    questions = [{"image_id": image, "question": text, "question_id": key} for key, image, text, _, _ in VQAV2]
    annotations = [
        {
            "question_id": key,
            "image_id": image,
            "answer_type": kind,
            "answers": [
                {"answer": answer, "answer_confidence": "yes", "answer_id": 1 + n} for n, answer in enumerate(answers)
            ],
        }
        for key, image, _, kind, answers in VQAV2
    ]
    write_json(directory / "v2_OpenEnded_mscoco_val2014_questions.json", {"questions": questions})
    write_json(directory / "v2_mscoco_val2014_annotations.json", {"annotations": annotations[::-1]})
    for image in (42, 43):
        draw(directory / "val2014" / f"COCO_val2014_{image:012d}.jpg")
    lines = [
        {"question_id": key, "image": f"COCO_test2015_{image:012d}.jpg", "text": text + SHORT, "category": "default"}
        for key, image, text in VQAV2_TEST
    ]
    write_lines(directory / "llava_vqav2_mscoco_test2015.jsonl", lines)
    write_lines(directory / "llava_vqav2_mscoco_test-dev2015.jsonl", lines[:2])
    for image in (11, 12):
        draw(directory / "test2015" / f"COCO_test2015_{image:012d}.jpg")


def vqav2_table(directory: Path) -> None:
    """VQAv2: the tables of validation, testdev and test."""
    rows = [
        {
            "question_id": key,
            "image_id": image,
            "question": text,
            "answer_type": kind,
            "answers": [
                {"answer": answer, "answer_confidence": "yes", "answer_id": n} for n, answer in enumerate(answers)
            ],
            "image": drawn(f"COCO_val2014_{image:012d}.jpg"),
        }
        for key, image, text, kind, answers in VQAV2
    ]
    write_table(directory / "data/validation-00000-of-00001.parquet", rows)
    tests = [
        {
            "question_id": key,
            "image_id": image,
            "question": text,
            "answers": None,
            "image": drawn(f"COCO_test2015_{image:012d}.jpg"),
        }
        for key, image, text in VQAV2_TEST
    ]
    write_table(directory / "data/test-00000-of-00001.parquet", tests)
    write_table(directory / "data/testdev-00000-of-00001.parquet", tests[:2])


VIZWIZ_ENDING = "\nWhen the provided information is insufficient, respond with 'Unanswerable'." + SHORT
VIZWIZ = [
    ("VizWiz_val_00000000.jpg", "What is this?", "other", ten("soup", "can of soup", "soup.")),
    ("VizWiz_val_00000001.jpg", "what Color is IT?", "unanswerable", ten("unanswerable", "blue", "blue")),
]


def vizwiz(directory: Path) -> None:
    """VizWiz: val.json, LLaVA's questions of test, images of both."""
    items = [
        {
            "image": image,
            "question": text,
            "answers": [{"answer": answer, "answer_confidence": "yes"} for answer in answers],
            "answer_type": kind,
            "answerable": int(kind != "unanswerable"),
        }
        for image, text, kind, answers in VIZWIZ
    ]
    write_json(directory / "val.json", items)
    names = [f"VizWiz_test_0000000{number}.jpg" for number in (1, 0)]
    lines = [
        {"question_id": number, "image": name, "text": "What is this?" + VIZWIZ_ENDING, "category": "default"}
        for number, name in enumerate(names)
    ]
    write_lines(directory / "llava_test.jsonl", lines)
    for image, *_ in VIZWIZ:
        draw(directory / "val" / image)
    for name in names:
        draw(directory / "test" / name)


def vizwiz_table(directory: Path) -> None:
    """VizWiz: the tables of val and test."""
    rows = [
        {
            "question_id": image.removesuffix(".jpg"),
            "image": drawn(image),
            "question": text,
            "answers": answers,
            "category": kind,
        }
        for image, text, kind, answers in VIZWIZ
    ]
    write_table(directory / "data/val-00000-of-00001.parquet", rows)
    names = [f"VizWiz_test_0000000{number}" for number in (1, 0)]
    tests = [
        {"question_id": name, "image": drawn(f"{name}.jpg"), "question": "What is this?", "answers": None}
        for name in names
    ]
    write_table(directory / "data/test-00000-of-00001.parquet", tests)


GQA = {
    "201307251": ("Is it dark?", "no", "n161313", "verify", "global"),
    "20116": ("What color is the car?", "red", "n161313", "query", "attr"),
    "20117": ("Who is left of the car?", "man", "n2", "query", "rel"),
}


def gqa(directory: Path) -> None:
    """GQA: LLaVA's questions, the balanced questions of test-dev, two images."""
    lines = [
        {"question_id": key, "image": f"{image}.jpg", "text": text + SHORT, "category": "default"}
        for key, (text, _, image, _, _) in GQA.items()
    ]
    write_lines(directory / "llava_gqa_testdev_balanced.jsonl", lines)
    write_json(directory / "data/testdev_balanced_questions.json", gqa_questions())
    for image in ("n161313", "n2"):
        draw(directory / "data/images" / f"{image}.jpg")


def gqa_questions():
    """Return the content of GQA's question file."""
    return {
        key: {
            "question": text,
            "answer": answer,
            "imageId": image,
            "isBalanced": True,
            "types": {"structural": structural, "semantic": semantic, "detailed": "x"},
        }
        for key, (text, answer, image, structural, semantic) in GQA.items()
    }


def gqa_table(directory: Path) -> None:
    """GQA: a table of questions and one of images."""
    rows = [{"id": key, **item} for key, item in gqa_questions().items()]
    write_table(directory / "testdev_balanced_instructions/testdev-00000-of-00001.parquet", rows)
    photos = [{"id": image, "image": drawn(f"{image}.jpg")} for image in ("n2", "n161313")]
    write_table(directory / "testdev_balanced_images/testdev-00000-of-00001.parquet", photos)


SQA = {
    "4": ("Which is it?", ["chiasmus", "apostrophe"], 1, "", None),
    "11": ("What is shown?", ["Maryland", "New Hampshire", "Vermont"], 0, "Look at  the map.", "image.png"),
    "12": ("Which is cold?", ["ice", "fire"], 0, "", "image.png"),
}
SQA_TEXTS = {
    "4": "Context: N/A\nQuestion: Which is it?\nOptions: (A) chiasmus (B) apostrophe",
    "11": "Context: Look at the map.\nQuestion: What is shown?\nOptions: (A) Maryland (B) New Hampshire (C) Vermont",
    "12": "Context: N/A\nQuestion: Which is cold?\nOptions: (A) ice (B) fire",
}


def sqa(directory: Path) -> None:
    """ScienceQA: LLaVA's records, the problems, the ids of test, two images."""
    records, problems = [], {"1": {"question": "of train", "choices": ["a"], "answer": 0, "hint": "", "image": None}}
    for key, (question, choices, answer, hint, image) in SQA.items():
        record = {"id": key}
        text = SQA_TEXTS[key]
        if image:
            record["image"] = f"{key}/{image}"
            text += "\n<image>"
            draw(directory / "images/test" / key / image)
        record["conversations"] = [{"from": "human", "value": text}, {"from": "gpt", "value": "The answer is A."}]
        records.append(record)
        problems[key] = {"question": question, "choices": choices, "answer": answer, "hint": hint, "image": image}
    write_json(directory / "llava_test_CQM-A.json", records)
    write_json(directory / "problems.json", problems)
    write_json(directory / "pid_splits.json", {"train": ["1"], "test": list(SQA)})


def sqa_table(directory: Path) -> None:
    """ScienceQA: the tables FULL and IMG."""
    rows = [
        {
            "image": drawn(image) if image else None,
            "question": question,
            "choices": choices,
            "answer": answer,
            "hint": hint,
        }
        for question, choices, answer, hint, image in sorted(SQA.values(), key=lambda one: one[4] is None)
    ]
    write_table(directory / "ScienceQA-FULL/test-00000-of-00001.parquet", rows)
    write_table(directory / "ScienceQA-IMG/test-00000-of-00001.parquet", rows[:2])


# (id, file, kind, number of the type, question, letter)
SEED = [
    ("101669", "SEED-Bench-image/1_2", "image", 5, "How many towels?", "A"),
    ("101670", "SEED-Bench-image/1_2", "image", 1, "Where is it?", "D"),
    ("v1738", "SEED-Bench-video-image/v1738.png", "video", 10, "What is done?", "B"),
]
SEED_CHOICES = ["One", "Two", "Three", "Four"]


def seed(directory: Path) -> None:
    """SEED-Bench: LLaVA's questions, the annotations, an image and a frame."""
    lines, questions = [], []
    for key, file, kind, number, text, letter in SEED:
        options = "".join(f"\n{name}. {choice}" for name, choice in zip("ABCD", SEED_CHOICES, strict=True))
        question_id = int(key) if key.isdigit() else key
        lines.append(
            {"question_id": question_id, "image": file, "text": text + options + LETTER, "category": "default"}
        )
        choices = {f"choice_{name}": choice for name, choice in zip("abcd", SEED_CHOICES, strict=True)}
        ids = {"question_id": key, "question_type_id": number, "data_id": file, "data_type": kind}
        questions.append({**ids, **choices, "question": text, "answer": letter})
        draw(directory / file)
    names = {"Scene Understanding": 1, "Instances Counting": 5, "Action Recognition": 10}
    write_lines(directory / "llava-seed-bench.jsonl", lines)
    write_json(directory / "SEED-Bench.json", {"questions": questions[::-1], "question_type": names})


def seed_table(directory: Path) -> None:
    """SEED-Bench: the test table; of the video it holds three frames."""
    rows = []
    for key, file, kind, number, text, letter in SEED:
        names = ["1_2"] if kind == "image" else ["before.png", "v1738.png", "after.png"]
        choices = {f"choice_{name}": choice for name, choice in zip("abcd", SEED_CHOICES, strict=True)}
        rows.append(
            {
                "answer": letter,
                **choices,
                "data_id": file,
                "data_type": kind,
                "question": text,
                "question_id": key,
                "question_type_id": number,
                "image": [drawn(name) for name in names],
            }
        )
    write_table(directory / "data/test-00000-of-00001.parquet", rows)


MME_SPLIT = ("artwork", "celebrity", "landmark", "posters", "scene")
MME_TASKS = (
    *("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR"),
    *("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"),
)


def mme_questions(task):
    """Return the two questions of a task's image, as MME writes them, with their answers."""
    # The second one has two spaces, as some of MME.
    return [
        (f"Is it {task}? Please answer yes or no.", "Yes"),
        (f"Is it not {task}?  Please answer yes or no.", "No"),
    ]


def mme(directory: Path, with_questions: bool = True) -> None:
    """MME: its release with an image of each task, and LLaVA's questions."""
    release, lines = directory / "MME_Benchmark_release_version", []
    for task in MME_TASKS:
        texts, images = release / task, release / task
        if task in MME_SPLIT:
            texts, images = release / task / "questions_answers_YN", release / task / "images"
        draw(images / "0001.png")
        texts.mkdir(exist_ok=True)
        text = "".join(f"{question}\t{answer}\n" for question, answer in mme_questions(task))
        (texts / "0001.txt").write_text(text)
        for question, _ in mme_questions(task):
            bare = question.removesuffix("Please answer yes or no.").strip()
            name = f"{task}/0001.png"
            lines.append({"question_id": name, "image": name, "text": bare + SHORT, "category": task})
    if with_questions:
        write_lines(directory / "llava_mme.jsonl", lines)


def mme_table(directory: Path) -> None:
    """MME: the test table."""
    rows = [
        {
            "question_id": f"{task}/0001.png",
            "image": drawn("0001.png"),
            "question": question,
            "answer": answer,
            "category": task,
        }
        for task in MME_TASKS
        for question, answer in mme_questions(task)
    ]
    write_table(directory / "data/test-00000-of-00001.parquet", rows)


EASY_VQA = [
    ["what shape is in the image?", "circle", 0],
    ["is there a red shape?", "no", 0],
    ["what color is the shape?", "teal", 1],
    ["does the image contain a circle?", "yes", 1],
]


def easy_vqa(directory: Path) -> None:
    """easy-VQA: the data directory of its package."""
    for split in ("test", "train"):
        write_json(directory / split / "questions.json", EASY_VQA)
        for number in (0, 1):
            draw(directory / split / "images" / f"{number}.png")
    (directory / "answers.txt").write_text("circle\nno\nteal\nyes\n")
