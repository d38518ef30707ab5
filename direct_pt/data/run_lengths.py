"""COCO's compressed run lengths, looked through before they are decoded: decoders trust them."""

import numpy as np

LONGEST = 6  # characters of a count that is no nonsense: under 2**30


def totals(characters: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """[n] int64: how many pixels the counts of n masks cover; -1 where they are no counts, 0 where there are none.

    The format is pycocotools': a count is written in groups of five bits, the lowest first, a character a group, from
    48 on; bit 5 says that another group follows, and the last group's bit 4 is the sign. From the fourth count on, the
    difference to the count two before is written.

    Args:
        characters: [R] uint8 of all masks, one after another.
        starts: [n + 1] where each mask's begin.
    """
    lengths = np.diff(starts)
    sums = np.zeros(len(lengths), np.int64)
    if not len(characters):
        return sums
    codes = characters.astype(np.int64) - 48
    ends = codes & 32 == 0
    mask_of = np.repeat(np.arange(len(lengths)), lengths)
    nonsense = np.bincount(mask_of, (codes < 0) | (codes > 63), len(lengths)) > 0
    last = starts[1:][lengths > 0] - 1
    nonsense[mask_of[last]] |= ~ends[last]  # cut short
    ends[last] = True

    begins = np.concatenate([[0], np.flatnonzero(ends)[:-1] + 1])  # of each count
    sizes = np.diff(np.append(begins, len(codes)))
    place = np.arange(len(codes)) - np.repeat(begins, sizes)
    mask_of = mask_of[begins]
    nonsense |= np.bincount(mask_of, sizes > LONGEST, len(lengths)) > 0
    values = np.add.reduceat((codes & 31) << np.minimum(5 * place, 5 * LONGEST), begins)
    negative = codes[begins + sizes - 1] & 16 > 0
    values -= np.where(negative, 1 << np.minimum(5 * sizes, 5 * LONGEST), 0)

    firsts = np.searchsorted(mask_of, mask_of)  # of each count's mask
    number = np.arange(len(values)) - firsts
    # The first, then every other one: each of the three chains of a mask adds up to its counts.
    chain = 3 * mask_of + np.where(number == 0, 0, 1 + (number + 1) % 2)
    order = np.argsort(chain, kind="stable")
    summed, chain = np.cumsum(values[order]), chain[order]
    before = np.concatenate([[0], summed])[np.searchsorted(chain, chain)]
    counts = summed - before
    np.add.at(sums, mask_of[order], counts)
    nonsense |= np.bincount(mask_of[order], counts < 0, len(lengths)) > 0
    sums[nonsense] = -1
    return sums
