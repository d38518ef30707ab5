"""RoIAlign for CPUs: each output bin as a weighted sum of rows of one table, which is fast forward and backward."""

import torch
from torch import Tensor
from torch.nn import functional as F


def roi_align_by_rows(
    features: list[Tensor], strides: list[int], images: Tensor, boxes: Tensor, levels: Tensor, output_size: int
) -> Tensor:
    """`pyramid_roi_align` for CPUs; `levels` [R] are those of the boxes.

    torchvision's kernel goes channel by channel and reads a few scattered numbers for each. Here a cell's channels lie
    side by side, in one row of a table [cells of all levels and images, C], and each output bin is a weighted sum of a
    few rows: `embedding_bag`, fast forward and backward.

    Which rows, and with which weights? A bin is the mean of a grid of sample points, each interpolated between the four
    cells around it. Here is one with 2 x 2 sample points (o), which lie between 3 x 3 cells (.):

         .     .     .     0.2
            o     o
         .     .     .     0.5  weights along y
            o     o
         .     .     .     0.3
        0.4   0.5   0.1         weights along x

    Mean and interpolation are separable: the middle cell's weight is 0.5 * 0.5. So `_axis_weights` finds the weights
    along each axis, and `_bin_rows` multiplies them for all pairs.
    """
    channels = features[0].shape[1]
    table = torch.cat([feature.permute(0, 2, 3, 1).reshape(-1, channels) for feature in features]).float()
    with torch.no_grad():
        rows, weights, starts = _bin_rows(features, strides, images, boxes, levels, output_size)
    pooled = F.embedding_bag(rows, table, starts, per_sample_weights=weights.to(table.dtype), mode="sum")
    return pooled.view(len(boxes), output_size, output_size, channels).permute(0, 3, 1, 2)


def _bin_rows(
    features: list[Tensor], strides: list[int], images: Tensor, boxes: Tensor, levels: Tensor, bins: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Which rows of the table each of the `bins` x `bins` output bins of each box adds up.

    Returns:
        Rows [T] of all bins, one bin after another, their weights [T], and where each bin's begin [R * bins * bins].
    """
    # The table is ordered (level, image, y, x).
    shapes = torch.tensor([feature.shape[-2:] for feature in features])
    cells = shapes.prod(dim=1)  # of one image
    level_starts = (cells * len(features[0])).cumsum(0) - cells * len(features[0])
    height, width = shapes[levels].unbind(dim=1)
    boxes = boxes / torch.tensor(strides)[levels, None]
    y, y_weights = _axis_weights(boxes[:, 1], boxes[:, 3], bins, height)
    x, x_weights = _axis_weights(boxes[:, 0], boxes[:, 2], bins, width)
    y = y * width[:, None, None] + (level_starts[levels] + images * cells[levels])[:, None, None]  # table rows of x = 0

    # How many cells a box's largest bin touches along each axis: weights are zero only behind these.
    num_y, num_x = ((weights != 0).any(dim=1).sum(dim=1).clamp(min=1) for weights in (y_weights, x_weights))

    # Boxes differ in `num_y` and `num_x`, so lists of lists are flattened, in two steps. First each output bin is
    # repeated once for each of its cells along y: a "run", as its cells along x are neighbours in the table.
    bin_ids = torch.arange(len(boxes) * bins * bins)
    box = bin_ids // (bins * bins)
    y_bin, x_bin = bin_ids // bins, box * bins + bin_ids % bins  # first index of y and x, as [R * bins, K]
    bin_runs = num_y[box]
    run_bin = bin_ids.repeat_interleave(bin_runs)
    run_in_bin = torch.arange(len(run_bin)) - (bin_runs.cumsum(0) - bin_runs)[run_bin]  # 0, 1, ... in each bin
    y_index = y_bin[run_bin] * y.shape[-1] + run_in_bin
    # Then each run is repeated once for each of its cells along x.
    run_length = num_x[box[run_bin]]
    run = torch.arange(len(run_bin)).repeat_interleave(run_length)
    run_starts = run_length.cumsum(0) - run_length
    x_index = (x_bin[run_bin] * x.shape[-1] - run_starts)[run] + torch.arange(len(run))
    rows = y.flatten()[y_index][run] + x.flatten()[x_index]
    weights = y_weights.flatten()[y_index][run] * x_weights.flatten()[x_index]
    bin_rows = bin_runs * num_x[box]
    return rows, weights, bin_rows.cumsum(0) - bin_rows


def _axis_weights(low: Tensor, high: Tensor, bins: int, length: Tensor) -> tuple[Tensor, Tensor]:
    """Along one axis, the cells that each bin of each box touches, and their weights.

    Args:
        low: [R] where the boxes begin, in cells.
        high: [R] where they end.
        bins: that each box is cut into.
        length: [R] int64, cells of the axis.

    Returns:
        Cells [R, bins, K] int64, neighbours, and weights [R, bins, K].
    """
    bin_size = ((high - low) / bins)[:, None, None]
    num_samples = bin_size.ceil()  # in a bin, one for each cell it covers; a box without extent has none
    sample = torch.arange(int(num_samples.max().clamp(min=1)) if len(num_samples) else 1)
    bin_start = low[:, None, None] - 0.5 + torch.arange(bins)[:, None] * bin_size  # 0 is the first cell's centre
    point = bin_start + (sample + 0.5) * bin_size / num_samples.clamp(min=1)
    last = length[:, None, None] - 1
    # A point more than a cell outside the map counts as zero; a nearer one is moved to the border.
    point_weight = ((sample < num_samples) & (point >= -1) & (point <= last + 1)) / num_samples.clamp(min=1)
    point = point.clamp(min=0).minimum(last)
    # Each point's weight is shared by the cell before it and the one behind it.
    cell = point.floor()
    behind = (point - cell) * point_weight
    first_cell = cell[:, :, :1]
    offset = (cell - first_cell).long()
    weights = point.new_zeros(*point.shape[:2], len(sample) + 1)
    weights.scatter_add_(2, offset, point_weight - behind)
    weights.scatter_add_(2, (offset + 1).clamp(max=len(sample)), behind)
    cells = first_cell.long() + torch.arange(len(sample) + 1)
    return cells.minimum(last), weights
