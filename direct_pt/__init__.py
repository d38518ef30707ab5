"""Direct-PT: object detectors trained from scratch, by low-resolution pre-training on the target data itself."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from direct_pt.checkpoint import from_pretrained
    from direct_pt.models.detector import build_detector

__version__ = "0.1.0"
__all__ = ["__version__", "build_detector", "from_pretrained"]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    """Both are loaded when they are asked for: PyTorch's launchers look into this package, and want neither."""
    if name == "from_pretrained":
        from direct_pt.checkpoint import from_pretrained

        return from_pretrained
    if name == "build_detector":
        from direct_pt.models.detector import build_detector

        return build_detector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
