"""Training images that cannot be read: named once, and too many of them end the run."""

from collections.abc import Callable

from accelerate.utils import gather_object

from direct_pt.data.loader import Feed
from direct_pt.errors import printable

MAX_SHARE = 0.01  # of the training images; more than that, and more than one image, end the run


class UnreadableImages:
    """Those of this process, and what all processes were told of them.

    Attributes:
        own: of this process.
    """

    def __init__(self, feed: Feed) -> None:
        self.own: set[int] = set()
        self._feed = feed
        self._reported: set[int] = set()
        self._reasons: dict[int, str] = {}  # of all processes' images

    def report(self, write: Callable[[str], object] | None) -> str:
        """Name the new ones, on the main process by `write`. Every process must call it.

        Returns:
            In words, that there are too many of them; else nothing.
        """
        feed, reasons = self._feed, self._reasons
        own = [(image, feed.unreadable_reason(image)) for image in sorted(self.own - self._reported)]
        self._reported |= self.own
        new = {image: reason for image, reason in gather_object(own) if image not in reasons}
        reasons |= new
        for image in sorted(new):
            if write is not None:
                write(f"unreadable image, replaced by another: {printable(new[image])}")
        if len(reasons) / len(feed) <= MAX_SHARE or len(reasons) <= 1:
            return ""
        first = reasons[min(reasons)]
        return (
            f"{len(reasons)} of {len(feed)} training images cannot be read (more than {MAX_SHARE:.0%}), first {first}"
        )
