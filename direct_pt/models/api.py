"""What a trained detector offers: predictions, thresholds, class names, saving and sharing."""

from abc import abstractmethod
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from huggingface_hub import HfApi
from torch import Tensor, nn

from direct_pt.batch import Batch, Detections, Objects, collate
from direct_pt.files import write_text
from direct_pt.images.decoding import Images, rgb_images
from direct_pt.models.config import DetectorConfig
from direct_pt.models.masks import paste_masks
from direct_pt.models.model_card import model_card
from direct_pt.models.model_folder import History, check_model_folder, write_model
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
    pixel_mean: Tensor

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

    @abstractmethod
    def detect(self, batch: Batch) -> Detections:
        """The detections of a batch, in the original images' frames. Call it in eval mode."""

    def above(self, found: Detections, threshold: float | str) -> Detections:
        """The detections above a score, or above its own: "model", or "per-class" for each class's.

        Raises:
            ValueError: that is none, or the detector's own are none.
        """
        own = (self.score_threshold, *self.class_thresholds)
        if len(own) != 1 + len(self.config.class_names) or not all(0 <= score < 1 for score in own):
            raise ValueError(
                "score_threshold must be a number from 0 to below 1, and class_thresholds one for each class, in the "
                f"order of id2label: they are {own[0]!r} and {own[1:]!r:.60}"
            )
        if threshold == "per-class":
            return found.above(torch.tensor(self.class_thresholds, dtype=torch.float64)[found.labels])
        score = self.score_threshold if threshold == "model" else threshold
        if isinstance(score, str) or not 0 <= score < 1:
            raise ValueError(
                f"score_threshold is {threshold!r}: give a number from 0 to below 1, 'model' or 'per-class'"
            )
        return found.above(score)

    def predict(
        self, images: Images, score_threshold: float | str = "model", batch_size: int = 1
    ) -> list[dict[str, Any]]:
        """Detections in whole images.

        Args:
            images: one or several, of any sizes: paths, PIL images, RGB arrays or tensors
                (`direct_pt.images.decoding.as_rgb`).
            score_threshold: of what is returned: a number, or as for `above`.
            batch_size: images at once. Those of a batch are padded to its largest, which changes last digits.

        Returns:
            For each image, also a single one, a dictionary: "boxes" [n, 4] in its pixels, "scores" [n], "labels" (class
            names), "class_ids" (their indices, see `id2label`) and "category_ids" (the data set's own), best first, and
            of mask detectors "masks" [n, h, w] bool.

        Raises:
            TypeError, ValueError, UnreadableImage: see `as_rgb`; or a threshold or `batch_size` that is none.
        """
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size is {batch_size!r}: give a whole number above 0")
        was_training, results, waiting = self.training, [], iter(rgb_images(images))
        self.eval()
        try:
            while arrays := list(islice(waiting, batch_size)):
                results += self._predict_batch(arrays, score_threshold)
        finally:
            self.train(was_training)
        return results

    def _predict_batch(self, images: list[np.ndarray], score_threshold: float | str) -> list[dict[str, Any]]:
        """`predict` for RGB arrays [h, w, 3] uint8, at once."""
        config = self.config
        preset = TestPreset(config.short_side, config.long_side)
        samples = [preset(image, Objects.none(), np.random.default_rng(0)) for image in images]
        everything = self.detect(collate(samples).to(self.pixel_mean.device)).to("cpu")
        results = []
        for position, image in enumerate(images):
            found = self.above(everything.of_image(position), score_threshold)
            labels = found.labels.tolist()
            result: dict[str, Any] = {"boxes": found.boxes.numpy(), "scores": found.scores.numpy()}
            result["labels"] = [config.class_names[label] for label in labels]
            result["class_ids"] = labels
            result["category_ids"] = [config.category_ids[label] for label in labels]
            if found.masks is not None:
                result["masks"] = paste_masks(found.masks.numpy(), found.boxes.numpy(), image.shape[:2])
            results.append(result)
        return results

    def save_pretrained(self, folder: str | Path, repo_id: str | None = None, license: str | None = None) -> None:
        """Write a model folder, with a model card unless it has a README.md. `from_pretrained` and the scripts read it.

        Args:
            folder: created if it does not exist.
            repo_id: for the card: where on the hub it will lie.
            license: for the card, by the hub's identifiers, such as "apache-2.0". Its data's licences decide it.

        Raises:
            InputError: the folder holds something else, such as a run.
            OSError: the folder cannot be written; its earlier content is unchanged.
        """
        folder, card = Path(folder), Path(folder) / CARD
        check_model_folder(folder)
        history = self._history_to_save()
        write_model(folder, self.config.to_dict(), self.state_dict(), history)
        if not card.exists():
            thresholds = (self.score_threshold, self.class_thresholds)
            name = repo_id or folder.name
            write_text(card, model_card(name, self.config, history, thresholds, self.has_masks, license))

    def _history_to_save(self) -> History:
        """The history, with thresholds that were set since."""
        last = self.history[-1] if self.history else {}
        names = self.config.class_names
        known = last.get("thresholds", {"all": SCORE_THRESHOLD, "per_class": {}})
        measured = [known["all"], *(known["per_class"].get(name) or known["all"] for name in names)]
        if measured == [self.score_threshold, *self.class_thresholds]:
            return self.history
        per_class = dict(zip(names, self.class_thresholds, strict=True))
        own = {"thresholds": {"all": self.score_threshold, "per_class": per_class}, "thresholds_set_by_hand": True}
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

        Files of other names stay there, and so does a model card.

        Args:
            repo_id: "user/name", created if it does not exist.
            private: whether a new one is; None for the account's default.
            token: of an account that may write there; None for that of `hf auth login`.
            commit_message: of the upload.
            license: see `save_pretrained`.

        Raises:
            huggingface_hub.errors.HfHubHTTPError: the hub refuses it.
        """
        hub = HfApi(token=token)
        repo_id = hub.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder, repo_id, license)
            kept = [CARD] if hub.file_exists(repo_id, CARD) else None
            return str(
                hub.upload_folder(
                    repo_id=repo_id, folder_path=folder, commit_message=commit_message, ignore_patterns=kept
                )
            )
