"""A look at some image files before training starts: what is wrong with most of them shows in a second."""

import numpy as np

from direct_pt.data.annotations import AnnotationTable
from direct_pt.data.images import UnreadableImage, header_sizes
from direct_pt.errors import InputError

LOOKED_AT = 256  # images, spread over the table
MOST_WRONG = 0.01  # share of them that training puts up with; a single one always


def spot_check(table: AnnotationTable) -> None:
    """Raises InputError where the headers of many images cannot be read, or tell another size than the annotations."""
    rows = np.unique(np.linspace(0, len(table) - 1, LOOKED_AT).astype(int))
    wrong = [reason for row in rows.tolist() if (reason := _reason(table, row))]
    if len(wrong) > max(1, MOST_WRONG * len(rows)):
        raise InputError(
            f"{len(wrong)} of {len(rows)} images that were looked at cannot be trained on, first: {wrong[0]}; "
            "scripts/check_data.py lists all"
        )


def _reason(table: AnnotationTable, row: int) -> str:
    name = table.image_name(row)
    try:
        sizes = header_sizes(table.path(row) if table.encoded is None else table.image_content(row), name)
    except (UnreadableImage, OSError) as error:
        return str(error)
    height, width = table.image_size(row)
    fitting = [sizes.upright, sizes.stored] if table.decoding.exif else [sizes.stored]
    if (height, width) in fitting:
        return ""
    return f"{name}: is {fitting[0][1]}x{fitting[0][0]} pixels, but its annotation says {width}x{height}"
