"""One set in every format: a COCO annotation file and its images, written as other tools would write them."""

import json
import shutil
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import datasets

Content = dict[str, Any]


def of_image(content: Content) -> list[tuple[Content, list[Content]]]:
    """Each image's record with its annotations."""
    return [(i, [a for a in content["annotations"] if a["image_id"] == i["id"]]) for i in content["images"]]


def names_of(content: Content) -> dict[int, str]:
    return {category["id"]: category["name"] for category in content["categories"]}


def coco(content: Content, images: Path, folder: Path) -> None:
    (folder / "annotations").mkdir(parents=True)
    shutil.copytree(images, folder / "images")
    (folder / "annotations/instances_train.json").write_text(json.dumps(content))


def roboflow(content: Content, images: Path, folder: Path) -> None:
    shutil.copytree(images, folder / "train")
    (folder / "train/_annotations.coco.json").write_text(json.dumps(content))


def yolo(content: Content, images: Path, folder: Path) -> None:
    shutil.copytree(images, folder / "train/images")
    (folder / "train/labels").mkdir()
    names = names_of(content)
    numbers = {category: number for number, category in enumerate(names)}
    for image, objects in of_image(content):
        lines = []
        for one in objects:
            x, y, width, height = one["bbox"]
            shares = [(x + width / 2) / image["width"], (y + height / 2) / image["height"]]
            shares += [width / image["width"], height / image["height"]]
            lines.append(" ".join(map(repr, [numbers[one["category_id"]], *shares])))
        (folder / "train/labels" / image["file_name"]).with_suffix(".txt").write_text("\n".join(lines))
    (folder / "data.yaml").write_text(f"train: ../train/images\nnc: {len(names)}\nnames: {list(names.values())}\n")


def voc(content: Content, images: Path, folder: Path) -> None:
    shutil.copytree(images, folder / "JPEGImages")
    (folder / "Annotations").mkdir()
    (folder / "ImageSets/Main").mkdir(parents=True)
    names = names_of(content)
    for image, objects in of_image(content):
        parts = [f"<filename>{escape(image['file_name'])}</filename>"]
        parts.append(f"<size><width>{image['width']}</width><height>{image['height']}</height><depth>3</depth></size>")
        for one in objects:
            x, y, width, height = one["bbox"]
            corners = {"xmin": x + 1, "ymin": y + 1, "xmax": x + width, "ymax": y + height}  # pixels count from 1
            box = "".join(f"<{name}>{value!r}</{name}>" for name, value in corners.items())
            parts.append(f"<object><name>{names[one['category_id']]}</name><bndbox>{box}</bndbox></object>")
        path = (folder / "Annotations" / image["file_name"]).with_suffix(".xml")
        path.write_text(f"<annotation>{''.join(parts)}</annotation>")
    stems = [Path(image["file_name"]).stem for image in content["images"]]
    (folder / "ImageSets/Main/train.txt").write_text("\n".join(stems))


def hub_rows(content: Content, images: Path) -> datasets.Dataset:
    names = names_of(content)
    numbers = {category: number for number, category in enumerate(names)}
    features = datasets.Features(
        image_id=datasets.Value("int64"),
        image=datasets.Image(),
        width=datasets.Value("int64"),
        height=datasets.Value("int64"),
        objects={
            "bbox": datasets.List(datasets.List(datasets.Value("float64"), length=4)),
            "category": datasets.List(datasets.ClassLabel(names=list(names.values()))),
        },
    )
    rows = [
        {
            "image_id": image["id"],
            "image": {"bytes": (images / image["file_name"]).read_bytes(), "path": image["file_name"]},
            "width": image["width"],
            "height": image["height"],
            "objects": {
                "bbox": [one["bbox"] for one in objects],
                "category": [numbers[one["category_id"]] for one in objects],
            },
        }
        for image, objects in of_image(content)
    ]
    return datasets.Dataset.from_list(rows, features=features)


def saved(content: Content, images: Path, folder: Path) -> None:
    datasets.DatasetDict({"train": hub_rows(content, images)}).save_to_disk(str(folder))


def parquet(content: Content, images: Path, folder: Path) -> None:
    folder.mkdir()
    rows = hub_rows(content, images)
    for number in range(2):
        part = rows.shard(2, number, contiguous=True)
        part.to_parquet(str(folder / f"train-{number:05d}-of-00002.parquet"))


def imagefolder(content: Content, images: Path, folder: Path) -> None:
    shutil.copytree(images, folder / "train")
    names = names_of(content)
    with (folder / "train/metadata.jsonl").open("w") as file:
        for image, objects in of_image(content):
            found = {
                "bbox": [one["bbox"] for one in objects],
                "category": [names[one["category_id"]] for one in objects],
            }
            file.write(json.dumps({"file_name": image["file_name"], "objects": found}) + "\n")


FORMATS = {
    "coco": coco,
    "roboflow": roboflow,
    "yolo": yolo,
    "voc": voc,
    "save_to_disk": saved,
    "parquet": parquet,
    "imagefolder": imagefolder,
}
