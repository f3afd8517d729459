"""COCO run-length encoding of masks: byte for byte what pycocotools writes, several times faster.

pycocotools copies the mask to column-major order and then looks at every pixel one by one. Here
the mask stays in row-major order: each row is compared with the row above (the top row with the
bottom row one column to the left, its predecessor in column-major order), eight pixels at a time.
Only the few pixels that differ are brought into column-major order, by sorting their positions.
Masks with so many changes that sorting would cost more than it saves go to pycocotools itself.

The format is that of the COCO API (T.-Y. Lin et al., "Microsoft COCO: Common Objects in Context",
2014): run lengths down the columns, the first run is zeros, each run from the fourth on stored as
the difference to the one two before, in base 32 with a continuation bit, shifted to printable
ASCII.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from workers.errors import MaskmillError

_DENSE_SHARE = 1 / 24
"""Share of 8-pixel words with a change above which pycocotools is faster than sorting."""


class InvalidRleError(MaskmillError, ValueError):
    """Counts that are no COCO run lengths of the given size."""


@dataclass(frozen=True, slots=True)
class EncodedMask:
    """One mask as it is stored, with what the tables say about it.

    Attributes
    ----------
    counts : bytes
        COCO compressed counts.
    area : int
        Pixels of the object.
    bbox_xywh : tuple of 4 float
        Smallest box around the object in pixels, as COCO writes it: left, top, width, height. All
        zero for an empty mask.
    touches_border : bool
        Whether a pixel of the object lies in the first or last row or column.
    """

    counts: bytes
    area: int
    bbox_xywh: tuple[float, float, float, float]
    touches_border: bool


class LazyMask:
    """A mask in the form it came in, and in the others when they are asked for.

    A tracker has pixels, or from a GPU the places where the mask changes; what waited in a spool
    has counts. Tables take counts, so that pixels are only made for somebody who looks at them.

    Parameters
    ----------
    height, width : int
        Size in pixels.
    pixels : ndarray of uint8, shape (H, W), optional
        1 on the object.
    changes : ndarray of int64, shape (R,), optional
        Column-major positions of the pixels that differ from the one before, ascending; before
        the first pixel the mask counts as zero.
    counts : bytes, optional
        COCO compressed counts. One of the three must be given.

    Examples
    --------
    >>> mask = LazyMask(3, 4, changes=np.array([7, 9]))
    >>> mask.counts
    b'723'
    >>> mask.pixels.tolist()
    [[0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 1, 0]]
    """

    __slots__ = ("_changes", "_counts", "_pixels", "height", "width")

    def __init__(
        self,
        height: int,
        width: int,
        *,
        pixels: NDArray[np.uint8] | None = None,
        changes: NDArray[np.int64] | None = None,
        counts: bytes | None = None,
    ) -> None:
        self.height = height
        self.width = width
        self._pixels = pixels
        self._changes = changes
        self._counts = counts

    @classmethod
    def of(cls, pixels: NDArray[np.uint8]) -> LazyMask:
        """Return the mask of an array of shape (H, W)."""
        return cls(*pixels.shape, pixels=pixels)

    @property
    def pixels(self) -> NDArray[np.uint8]:
        """1 on the object, shape (H, W)."""
        if self._pixels is None:
            runs = np.diff(self.changes, prepend=0, append=self.height * self.width)
            self._pixels = _filled(runs, self.height, self.width)
        return self._pixels

    @property
    def changes(self) -> NDArray[np.int64]:
        """Column-major positions where the mask changes."""
        if self._changes is None:
            runs = run_lengths(self.counts, self.height, self.width)
            self._changes = np.cumsum(runs)[:-1]
        return self._changes

    @property
    def counts(self) -> bytes:
        """COCO compressed counts."""
        if self._counts is None:
            if self._changes is not None:
                self._counts = _compress(self._changes, self.height, self.width)
            else:
                self._counts = encode(self.pixels)
        return self._counts

    @property
    def is_empty(self) -> bool:
        """Whether the mask has no pixel."""
        return not (self.changes.size if self._pixels is None else self._pixels.any())

    @property
    def num_bytes(self) -> int:
        """Size of the forms it has by now."""
        arrays = [form.nbytes for form in (self._pixels, self._changes) if form is not None]
        return sum(arrays) + len(self._counts or b"")

    def encoded(self) -> EncodedMask:
        """Return counts, area, box and border contact, as `encode_with_stats` does."""
        if self._pixels is not None and self._changes is None and self._counts is None:
            return encode_with_stats(self._pixels)
        stats = _stats(self.changes, self.height, self.width)
        return _with_stats(self.counts, *stats, self.height, self.width)


def encode(mask: NDArray[Any]) -> bytes:
    """Return the COCO compressed counts of a mask.

    Parameters
    ----------
    mask : ndarray of bool or any integer type, shape (H, W)
        Non-zero on the object.

    Returns
    -------
    bytes
        What ``pycocotools.mask.encode(np.asfortranarray(mask != 0))["counts"]`` returns.

    Raises
    ------
    ValueError
        The array is no mask: not two-dimensional, without pixels, or of floats.

    Examples
    --------
    >>> mask = np.zeros((3, 4), np.uint8)
    >>> mask[1:, 2] = 1
    >>> encode(mask)
    b'723'
    >>> decode(b'723', 3, 4).tolist()
    [[0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 1, 0]]
    """
    binary = _as_bytes(mask)
    changes = _change_positions(binary)
    if changes is None:
        return _encode_dense(binary)
    return _compress(changes, *binary.shape)


def encode_with_stats(mask: NDArray[Any]) -> EncodedMask:
    """Return counts, area, box and border contact of a mask, in one pass over its pixels.

    Parameters
    ----------
    mask : ndarray of bool or any integer type, shape (H, W)
        Non-zero on the object.

    Returns
    -------
    EncodedMask
        The box and the area are those that pycocotools computes from the counts.

    Raises
    ------
    ValueError
        The array is no mask: not two-dimensional, without pixels, or of floats.

    Examples
    --------
    >>> mask = np.zeros((3, 4), np.uint8)
    >>> mask[1:, 2] = 1
    >>> encode_with_stats(mask)
    EncodedMask(counts=b'723', area=2, bbox_xywh=(2.0, 1.0, 1.0, 2.0), touches_border=True)
    """
    binary = _as_bytes(mask)
    height, width = binary.shape
    changes = _change_positions(binary)
    if changes is None:
        counts = _encode_dense(binary)
        num_pixels, box = _stats_dense(binary)
    else:
        counts = _compress(changes, height, width)
        num_pixels, box = _stats(changes, height, width)
    return _with_stats(counts, num_pixels, box, height, width)


def decode(counts: bytes | str, height: int, width: int) -> NDArray[np.uint8]:
    """Return the mask that compressed counts stand for.

    Parameters
    ----------
    counts : bytes or str
        COCO compressed counts.
    height, width : int
        Size of the mask in pixels.

    Returns
    -------
    ndarray of uint8, shape (H, W)
        1 on the object, else 0; C order.

    Raises
    ------
    InvalidRleError
        The runs do not add up to the size.
    """
    return _filled(run_lengths(counts, height, width), height, width)


def area(counts: bytes | str, height: int, width: int) -> int:
    """Return the number of object pixels that compressed counts stand for.

    Raises
    ------
    InvalidRleError
        The runs do not add up to the size.

    Examples
    --------
    >>> area(b'723', 3, 4)
    2
    """
    return int(run_lengths(counts, height, width)[1::2].sum())


def bbox_xywh(counts: bytes | str, height: int, width: int) -> tuple[float, float, float, float]:
    """Return the smallest box around the object, as COCO writes it.

    Returns
    -------
    tuple of 4 float
        Left, top, width, height in pixels; all zero for an empty mask.

    Raises
    ------
    InvalidRleError
        The runs do not add up to the size.

    Examples
    --------
    >>> bbox_xywh(b'723', 3, 4)
    (2.0, 1.0, 1.0, 2.0)
    """
    runs = run_lengths(counts, height, width)
    return _stats(np.cumsum(runs)[:-1], height, width)[1]


def run_lengths(counts: bytes | str, height: int, width: int) -> NDArray[np.int64]:
    """Return the run lengths that compressed counts stand for.

    Parameters
    ----------
    counts : bytes or str
        COCO compressed counts.
    height, width : int
        Size of the mask in pixels.

    Returns
    -------
    ndarray of int64, shape (R,)
        Pixels per run down the columns, zeros first.

    Raises
    ------
    InvalidRleError
        The runs do not add up to the size, or the text is cut off inside a number.

    Examples
    --------
    >>> run_lengths(b'723', 3, 4).tolist()
    [7, 2, 3]
    """
    return run_lengths_of([counts], height, width)[0]


def run_lengths_of(
    masks: Sequence[bytes | str], height: int, width: int
) -> list[NDArray[np.int64]]:
    """Return the run lengths of many masks of one size, several times faster than one by one.

    Parameters
    ----------
    masks : sequence of bytes or str, N of them
        COCO compressed counts.
    height, width : int
        Size of the masks in pixels.

    Returns
    -------
    list of ndarray of int64, shape (R,)
        As `run_lengths` returns them, one per mask.

    Raises
    ------
    InvalidRleError
        The runs of a mask do not add up to the size, or its text is cut off inside a number.

    Examples
    --------
    >>> [runs.tolist() for runs in run_lengths_of([b'723', b'<'], 3, 4)]
    [[7, 2, 3], [12]]
    """
    if not masks:
        return []
    texts = [mask.encode("ascii", "replace") if isinstance(mask, str) else mask for mask in masks]
    digits = np.frombuffer(b"".join(texts), np.uint8).astype(np.int64) - 48
    sizes = np.fromiter(map(len, texts), np.int64, len(texts))
    ends = np.cumsum(sizes)
    wrong = (digits < 0) | (digits > 63)
    if not sizes.all() or wrong.any() or (digits[ends - 1] & 32).any():
        faulty = next(text for text in texts if not _is_text_of_numbers(text))
        raise InvalidRleError(
            f"the mask counts {_shown(faulty)} are not COCO compressed counts: they are empty, cut "
            f"off, or hold a foreign character"
        )
    # Each number ends at the digit without the continuation bit; digits are the low bits first.
    last = np.flatnonzero(digits < 32)
    first = np.concatenate(([0], last[:-1] + 1))
    mask_of = np.searchsorted(last, ends - 1)
    place = np.arange(len(digits)) - np.repeat(first, last - first + 1)
    if place.max() > 11:
        faulty = texts[int(np.searchsorted(ends, place.argmax(), side="right"))]
        raise InvalidRleError(f"the mask counts {_shown(faulty)} hold a number that is too large")
    values = np.add.reduceat((digits & 31) << (5 * place), first)
    negative = (digits[last] & 16) != 0
    values -= np.where(negative, np.int64(1) << (5 * (last - first + 1)), 0)
    found = []
    begin = 0
    for text, end in zip(texts, (mask_of + 1).tolist(), strict=True):
        # From the fourth run on each is stored as the difference to the one two before.
        runs = values[begin:end]
        np.cumsum(runs[1::2], out=runs[1::2])
        np.cumsum(runs[2::2], out=runs[2::2])
        if runs.min() < 0 or runs.sum() != height * width:
            raise InvalidRleError(
                f"the mask counts {_shown(text)} do not fit a mask of {height}x{width} pixels: "
                f"give the size [height, width] that they were encoded with"
            )
        found.append(runs)
        begin = end
    return found


def _is_text_of_numbers(text: bytes) -> bool:
    """Tell whether counts hold nothing but whole numbers."""
    return bool(text) and all(48 <= letter < 112 for letter in text) and not (text[-1] - 48) & 32


def _as_bytes(mask: NDArray[Any]) -> NDArray[np.uint8]:
    """Return the mask as C-ordered bytes, non-zero on the object."""
    if mask.ndim != 2 or mask.size == 0 or mask.dtype.kind not in "bui":
        raise ValueError(
            f"a mask must be an integer or bool array of shape (H, W), got {mask.dtype} of shape "
            f"{mask.shape}"
        )
    if mask.dtype.itemsize != 1:
        mask = mask != 0
    return np.ascontiguousarray(mask).view(np.uint8)


def _change_positions(binary: NDArray[np.uint8]) -> NDArray[np.int64] | None:
    """Return the column-major positions where the mask changes, or None if they are too many."""
    height, width = binary.shape
    flat = binary.reshape(-1)
    size = flat.size
    num_words = -(-size // 8)
    differs = np.empty(num_words * 8, np.uint8)
    differs[size:] = 0
    # In column-major order the pixel above comes first, and the bottom pixel of the column to the
    # left comes before the top pixel. Before the very first pixel the mask counts as zero.
    np.bitwise_xor(binary[0, 1:], binary[-1, :-1], out=differs[1:width])
    differs[0] = binary[0, 0]
    np.bitwise_xor(flat[width:], flat[:-width], out=differs[width:size])
    words = differs.view(np.uint64)
    changed = np.flatnonzero(words != 0)
    if len(changed) > num_words * _DENSE_SHARE:
        return None
    inside = np.flatnonzero(words[changed].view(np.uint8))
    positions = (changed[inside >> 3] << 3) + (inside & 7)
    y, x = np.divmod(positions, width)
    # Two different non-zero values are no change: compare what is left as booleans.
    before = np.where(y > 0, positions - width, (height - 1) * width + x - 1)
    was_set = (flat[before] != 0) & (positions > 0)
    keep = (flat[positions] != 0) != was_set
    if not keep.all():
        x, y = x[keep], y[keep]
    changes: NDArray[np.int64] = x * height + y
    changes.sort()
    return changes


def _stats(
    changes: NDArray[np.int64], height: int, width: int
) -> tuple[int, tuple[float, float, float, float]]:
    """Return area and COCO box of a mask from the positions where it changes."""
    if not len(changes):
        return 0, (0.0, 0.0, 0.0, 0.0)
    begins = changes[0::2]
    ends = changes[1::2]
    if len(ends) < len(begins):
        ends = np.append(ends, height * width)
    filled = ends > begins
    if not filled.all():
        begins, ends = begins[filled], ends[filled]
    if not len(begins):
        return 0, (0.0, 0.0, 0.0, 0.0)
    num_pixels = int((ends - begins).sum())
    x_first, y_first = np.divmod(begins, height)
    x_last, y_last = np.divmod(ends - 1, height)
    left, right = int(x_first[0]), int(x_last[-1])
    if (x_first != x_last).any():
        # A run that goes on in the next column covers the bottom of one and the top of the other.
        top, bottom = 0, height - 1
    else:
        top, bottom = int(y_first.min()), int(y_last.max())
    return num_pixels, (float(left), float(top), float(right - left + 1), float(bottom - top + 1))


def _with_stats(
    counts: bytes,
    num_pixels: int,
    box: tuple[float, float, float, float],
    height: int,
    width: int,
) -> EncodedMask:
    """Return counts with what is known of their mask."""
    x, y, w, h = box
    touches = num_pixels > 0 and (x == 0 or y == 0 or x + w == width or y + h == height)
    return EncodedMask(counts, num_pixels, box, touches)


def _filled(runs: NDArray[np.int64], height: int, width: int) -> NDArray[np.uint8]:
    """Return the mask of run lengths down the columns, zeros first."""
    values = np.arange(len(runs)) & 1
    columns = np.repeat(values.astype(np.uint8), runs)
    return _transposed(columns.reshape(width, height))


def _stats_dense(binary: NDArray[np.uint8]) -> tuple[int, tuple[float, float, float, float]]:
    """Return area and COCO box of a mask by looking at every pixel."""
    columns = np.flatnonzero(np.bitwise_or.reduce(binary, axis=0))
    rows = np.flatnonzero(np.bitwise_or.reduce(binary, axis=1))
    left, right, top, bottom = (int(v) for v in (columns[0], columns[-1], rows[0], rows[-1]))
    box = (float(left), float(top), float(right - left + 1), float(bottom - top + 1))
    return int(np.count_nonzero(binary)), box


def _compress(changes: NDArray[np.int64], height: int, width: int) -> bytes:
    """Return the compressed counts for a mask that changes at these positions."""
    from pycocotools import mask as coco

    runs = np.empty(len(changes) + 1, np.uint32)
    if len(changes):
        runs[0] = changes[0]
        np.subtract(changes[1:], changes[:-1], out=runs[1:-1], casting="unsafe")
        runs[-1] = height * width - changes[-1]
    else:
        runs[0] = height * width
    rle = coco.frPyObjects({"counts": runs, "size": [height, width]}, height, width)
    counts: bytes = rle["counts"]
    return counts


def _encode_dense(binary: NDArray[np.uint8]) -> bytes:
    """Return the compressed counts of a mask by looking at every pixel."""
    from pycocotools import mask as coco

    # Making it column-major this way is much faster than numpy.asfortranarray, which pays for the
    # look at the changes that was in vain.
    columns = _transposed((binary != 0).view(np.uint8)).T
    counts: bytes = coco.encode(columns)["counts"]
    return counts


def _transposed(array: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the transpose in C order, ten times faster than NumPy copies it."""
    import cv2

    # OpenCV knows no single column apart from a vector.
    transposed: NDArray[np.uint8] = cv2.transpose(array)
    return transposed.reshape(array.shape[1], array.shape[0])


def _shown(data: bytes) -> str:
    text = data[:24].decode("ascii", "replace")
    return repr(text + "..." if len(data) > 24 else text)
