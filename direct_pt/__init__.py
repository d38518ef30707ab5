"""Direct-PT: object detectors trained from scratch, by low-resolution pre-training on the target data itself."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from direct_pt.version import __version__

if TYPE_CHECKING:
    from direct_pt.checkpoint import from_pretrained
    from direct_pt.models.detector import build_detector
    from direct_pt.onnx_detector import OnnxDetector
    from direct_pt.prediction.supervision import as_supervision

PLACES = {
    "from_pretrained": "direct_pt.checkpoint",
    "build_detector": "direct_pt.models.detector",
    "OnnxDetector": "direct_pt.onnx_detector",
    "as_supervision": "direct_pt.prediction.supervision",
}
__all__ = ["OnnxDetector", "__version__", "as_supervision", "build_detector", "from_pretrained"]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    """They are loaded when they are asked for: PyTorch's launchers look into this package, and want none of them; and
    an exported detector runs where PyTorch is not installed."""
    if name not in PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(PLACES[name]), name)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith(__name__):
            raise
        remedy = "pip install 'direct-pt[train]', or use an exported detector: direct_pt.OnnxDetector"
        raise ModuleNotFoundError(f"{name} needs the package {error.name}: {remedy}", name=error.name) from error
