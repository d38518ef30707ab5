"""What several test files share: one core, small runs, and a small COCO set in a folder of its own."""

import gc
import json
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_detectors
import small_runs
import torch
from accelerate import Accelerator
from PIL import Image

from direct_pt.batch import Batch, collate
from direct_pt.data.annotations import AnnotationTable
from direct_pt.data.formats.coco import CocoSplit, find_coco
from direct_pt.data.loader import TrainingImages
from direct_pt.data.sources import load_split
from direct_pt.distributed.launch import make_accelerator
from direct_pt.transforms import PretrainPreset

# Launchers, DeepSpeed, two hosts, faults, fuzz, benchmarks, and what else takes minutes: `make test` leaves them out.
SLOW = (
    "test_launch", "test_deepspeed", "test_faults", "test_spread", "test_benchmark", "test_two_nodes",
    "test_five_detectors", "test_stream", "test_same_images", "test_odd_sets", "test_real_data",
    "test_image_cache", "test_fuzz", "test_memory", "test_checkpointing", "test_compile", "test_demo_data",
    "test_experiment_runs", "test_import_mmdet", "test_micro_batch", "test_backbones", "test_backbone_weights",
    "test_peers", "test_folder_lock", "test_standard_streams", "test_stopping",
    "test_short_of_memory", "test_first_seconds", "test_local_hub_sets",
)  # fmt: skip
LONGEST = (
    "test_export",  # half of it is slow
    *SLOW,
    "test_training",
    "test_resume",
    "test_skipped_steps",
    "test_divergence",
    "test_golden",
    "test_malformed",
    "test_tiled_table",
    "test_video",
    "test_predict_results",
)
CATEGORIES = ({"id": 7, "name": "seven"}, {"id": 2, "name": "two"})  # with holes, and not in order


def pytest_configure(config: pytest.Config) -> None:
    """One core for this process and those it starts: sums in another order round differently, and some tests compare
    one process with several to the last digits. pytest-xdist's workers have one each."""
    for number in (signal.SIGINT, signal.SIGHUP):  # a shell's background and nohup ignore them, for what they start too
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    worker = getattr(config, "workerinput", {}).get("workerid", "")
    if worker or not getattr(config.option, "numprocesses", None):  # but for the process that starts the workers
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw") or -1) % len(cores)]})
        torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the slow files' tests; those that take longest come first: else one of pytest-xdist's workers would end long
    before another."""
    places = {name: place for place, name in enumerate(LONGEST)}
    for item in items:
        if item.path.stem in SLOW:
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


def pytest_collection_finish() -> None:
    """What the libraries hold is not to be searched for garbage again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Caches of this process and those it starts lie with the tests' other files, not in the home folder."""
    os.environ["DIRECT_PT_CACHE"] = small_runs.ENVIRONMENT["DIRECT_PT_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo set in small."""
    return small_runs.demo_data(tmp_path_factory)


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pre-trained run on it, which tests must leave as it is."""
    return small_runs.pretrained_run(tmp_path_factory)


@pytest.fixture(scope="session")
def training_images(demo: Path) -> TrainingImages:
    """The small set's training images, with masks, of the size that `small_detectors` take."""
    table, preset = load_split(find_coco(demo)["train"]), PretrainPreset(small_detectors.SIDE)
    return TrainingImages(table, preset, seed=0, with_masks=True)


@pytest.fixture
def batch(training_images: TrainingImages) -> Batch:
    """Four real images, with unequal numbers of objects."""
    batch = collate([training_images[0, image] for image in range(4)])
    assert len(set(batch.valid.sum(dim=1).tolist())) > 1
    return batch


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    """One of its own: accelerate keeps its first one's settings for the whole process."""
    with small_runs.fresh_process():
        yield make_accelerator("no")


class CocoFolder:
    """Images of noise on disk, and the annotation file's `content`, to be changed at will before `load`."""

    def __init__(self, folder: Path, sizes: Sequence[tuple[int, int]], annotations: Sequence[dict[str, Any]]) -> None:
        self.paths = CocoSplit(folder / "pictures", folder / "labels.json")
        self.paths.images.mkdir(parents=True)
        rng = np.random.default_rng(0)
        images = []
        for row, (height, width) in enumerate(sizes):
            pixels = rng.integers(256, size=(height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(self.paths.images / f"{row}.png")
            images.append({"id": 10 * row + 10, "file_name": f"{row}.png", "height": height, "width": width})
        numbered = [{"id": 100 + row, "category_id": 7, **record} for row, record in enumerate(annotations)]
        self.content = {"images": images, "annotations": numbered, "categories": list(map(dict, CATEGORIES))}

    def write(self) -> CocoSplit:
        """The annotation file as `content` stands."""
        self.paths.annotations.write_text(json.dumps(self.content))
        return self.paths

    def load(self) -> AnnotationTable:
        """The table of what was written."""
        return load_split(self.write())


MakeCocoFolder = Callable[..., CocoFolder]


@pytest.fixture
def coco_folder(tmp_path: Path) -> MakeCocoFolder:
    """Makes a set: `coco_folder(sizes, annotations)`. Image ids are 10, 20, ...; annotation ids 100, 101, ..."""

    def make(
        sizes: Sequence[tuple[int, int]], annotations: Sequence[dict[str, Any]] = (), name: str = "set"
    ) -> CocoFolder:
        return CocoFolder(tmp_path / name, sizes, annotations)

    return make
