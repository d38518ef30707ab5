"""What a trained detector offers: predictions, thresholds, class names, saving and sharing."""

from abc import abstractmethod
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from huggingface_hub import HfApi
from torch import nn

from direct_pt.batch import Batch, Detections, Objects, collate
from direct_pt.errors import InputError
from direct_pt.files import write_text
from direct_pt.images.decoding import Images, rgb_images
from direct_pt.images.tiles import Tiling, checked_tiling, find_in_tiles, trained_tiling
from direct_pt.models.config import DetectorConfig
from direct_pt.models.model_card import is_own_card, model_card
from direct_pt.models.model_folder import CONFIG, WEIGHTS, History, check_model_folder, write_model
from direct_pt.models.saved_config import check_config
from direct_pt.onnx_detector import Found, as_result, batch_count, chosen_thresholds, is_threshold
from direct_pt.transforms import TestPreset

SCORE_THRESHOLD = 0.3  # of what is shown, where none was measured
CARD = "README.md"


class DetectorAPI(nn.Module):
    """The base class of detectors: all but the network.

    Attributes:
        config: what it was built from.
        has_masks: whether it learns and predicts masks.
        score_threshold: above it, detections are shown.
        class_thresholds: [C] the same for each class.
        history: one dictionary a stage of training, as the model's folder says; empty for a detector that was built.
        id2label: the names of the classes by their indices.
        label2id: the other way round.
    """

    has_masks = False

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__()
        self.config = config
        self.history: History = []
        self.score_threshold = SCORE_THRESHOLD
        self.class_thresholds = (SCORE_THRESHOLD,) * len(config.class_names)

    @property
    def id2label(self) -> dict[int, str]:
        return dict(enumerate(self.config.class_names))

    @property
    def label2id(self) -> dict[str, int]:
        return {name: index for index, name in enumerate(self.config.class_names)}

    @property
    def tiling(self) -> Tiling | None:
        """The tiles that it was trained on; None for whole images."""
        return trained_tiling(self.history)

    @property
    def device(self) -> torch.device:
        """Where batches must lie."""
        return next(self.parameters()).device

    @abstractmethod
    def detect(self, batch: Batch) -> Detections:
        """The detections of a batch, in the original images' frames. Call it in eval mode."""

    def above(self, found: Detections, threshold: float | str) -> Detections:
        """The detections above a score, or above its own: see `thresholds`."""
        return found.above(torch.from_numpy(self.thresholds(threshold))[found.labels])

    def thresholds(self, threshold: float | str) -> np.ndarray:
        """[C] float64, the score of each class above which detections are shown.

        Args:
            threshold: a number for all; or the detector's own: "model", or "per-class" for each class's.

        Raises:
            ValueError: that is none, or the detector's own are none.
        """
        self._check_thresholds()
        return chosen_thresholds(threshold, self.score_threshold, self.class_thresholds)

    def _check_thresholds(self) -> None:
        """Raise ValueError where the detector's own are none."""
        own = (self.score_threshold, *self.class_thresholds)
        if len(own) != 1 + len(self.config.class_names) or not all(map(is_threshold, own)):
            raise ValueError(
                "score_threshold must be a number from 0 to below 1, and class_thresholds one for each class, in the "
                f"order of id2label: they are {own[0]!r} and {own[1:]!r:.60}"
            )

    def predict(
        self,
        images: Images,
        score_threshold: float | str = "model",
        batch_size: int = 1,
        tiles: int | None = None,
        overlap: float | None = None,
    ) -> list[dict[str, Any]]:
        """Detections in images.

        Args:
            images: one or several, of any sizes: paths, PIL images, RGB arrays or tensors
                (`direct_pt.images.decoding.as_rgb`).
            score_threshold: of what is returned: a number, or as for `above`.
            batch_size: images at once, of which those of one shape, once resized, are computed together.
            tiles: look at overlapping tiles of so many pixels a side too, `batch_size` at once; 0 for none, None for
                those that it was trained on.
            overlap: of tiles, as a share of their side; None for 0.2, or that of training.

        Returns:
            For each image, also a single one, a dictionary: "boxes" [n, 4] in its pixels, "scores" [n], "labels" (class
            names), "class_ids" (their indices, see `id2label`) and "category_ids" (the data set's own), best first, and
            of mask detectors "masks" [n, h, w] bool.

        Raises:
            TypeError, ValueError, UnreadableImage: see `as_rgb`; or a threshold or `batch_size` that is none.
            InputError: tiles that cannot be.
        """
        count, thresholds = batch_count(batch_size), self.thresholds(score_threshold)
        tiling = checked_tiling(tiles, overlap, self.tiling)
        was_training, results, waiting = self.training, [], iter(rgb_images(images))
        names, ids = self.config.class_names, self.config.category_ids
        self.eval()
        try:
            while arrays := list(islice(waiting, count)):
                if tiling is None:
                    everything = self.find(arrays)
                else:
                    everything = [find_in_tiles(image, tiling, self.find, count) for image in arrays]
                for image, found in zip(arrays, everything, strict=True):
                    results.append(as_result(found.above(thresholds), image.shape[:2], names, ids))
        finally:
            self.train(was_training)
        return results

    def find(self, images: Sequence[np.ndarray], preset: TestPreset | None = None) -> list[Found]:
        """All detections in RGB arrays [h, w, 3] uint8, in their pixels. Call it in eval mode.

        Padding changes what is found: those of one shape, once resized, are computed together, and no others.
        `preset` resizes them, by default to the detector's own size.
        """
        preset = preset or TestPreset(self.config.short_side, self.config.long_side)
        samples = [preset(image, Objects.none(), np.random.default_rng(0)) for image in images]
        shapes: dict[tuple[int, ...], list[int]] = {}
        for place, sample in enumerate(samples):
            shapes.setdefault(tuple(sample.image.shape), []).append(place)
        results: dict[int, Found] = {}
        for places in shapes.values():
            batch = collate([samples[place] for place in places])
            found = self.detect(batch.to(self.device)).to("cpu")
            results |= dict(zip(places, found.arrays(len(places)), strict=True))
        return [results[place] for place in range(len(images))]

    def save_pretrained(self, folder: str | Path, repo_id: str | None = None, license: str | None = None) -> None:
        """Write a model folder, with a model card unless it has one by hand. `from_pretrained` and the scripts read it.

        Args:
            folder: created if it does not exist.
            repo_id: for the card: where on the hub it will lie.
            license: for the card, by the hub's identifiers, such as "apache-2.0". Its data's licences decide it.

        Raises:
            InputError: the folder holds something else, such as a run.
            OSError: the folder cannot be written; its earlier content is unchanged.
        """
        if not str(folder):
            raise InputError("save_pretrained: the folder's name is empty")
        self._check_saved()
        folder, history = Path(folder), self._history_to_save()
        check_model_folder(folder)
        thresholds = (float(self.score_threshold), [float(score) for score in self.class_thresholds])
        name = repo_id or folder.resolve().name
        text = model_card(name, self.config, history, thresholds, self.has_masks, license)
        write_model(folder, self.config, self.state_dict(), history)
        if not (folder / CARD).exists() or is_own_card(folder / CARD):
            write_text(folder / CARD, text)

    def _check_saved(self) -> None:
        """Raise InputError where nobody could load what `save_pretrained` would write."""
        self._check_thresholds()
        try:
            check_config(self.config, "config")
        except ValueError as error:
            raise InputError(f"save_pretrained: {error}") from error

    def _history_to_save(self) -> History:
        """The history, with thresholds that were set since."""
        last = self.history[-1] if self.history else {}
        names = self.config.class_names
        known = last.get("thresholds", {"all": SCORE_THRESHOLD, "per_class": {}})
        measured = [known["all"], *(known["per_class"].get(name) for name in names)]
        measured = [known["all"] if score is None else score for score in measured]
        now, *per_class = map(float, (self.score_threshold, *self.class_thresholds))
        if measured == [now, *per_class]:
            return self.history
        thresholds = {"all": now, "per_class": dict(zip(names, per_class, strict=True))}
        own = {"thresholds": thresholds, "thresholds_set_by_hand": True}
        return [*self.history[:-1], {**last, **own}]

    def push_to_hub(
        self,
        repo_id: str,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str = "Upload a Direct-PT detector",
        license: str | None = None,
    ) -> str:
        """Upload what `save_pretrained` writes to the Hugging Face hub; the commit's address.

        Files of other names stay there, and so does a model card that was written by hand.

        Args:
            repo_id: "user/name", created if it does not exist.
            private: whether a new one is; None for the account's default.
            token: of an account that may write there; None for that of `hf auth login`.
            commit_message: of the upload.
            license: see `save_pretrained`.

        Raises:
            Exception: of huggingface_hub, or of its connection: the hub refuses it, or cannot be reached.
        """
        hub = HfApi(token=token)
        self._check_saved()
        repo_id = hub.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with TemporaryDirectory() as folder:
            if hub.file_exists(repo_id, CARD):
                hub.hf_hub_download(repo_id, CARD, local_dir=folder)
            self.save_pretrained(folder, repo_id, license)
            files = [WEIGHTS, CONFIG, CARD]
            return str(
                hub.upload_folder(
                    repo_id=repo_id, folder_path=folder, commit_message=commit_message, allow_patterns=files
                )
            )
