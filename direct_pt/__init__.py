"""Direct-PT: object detectors trained from scratch, by low-resolution pre-training on the target data itself."""

from direct_pt.checkpoint import from_pretrained
from direct_pt.models.detector import build_detector

__all__ = ["build_detector", "from_pretrained"]
