"""Masks as text: expected and actual side by side, or one alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

#: A picture shows at most this many rows and columns, around the first difference: two masks and
#: the row numbers fill the 80 columns of a terminal.
ROWS, COLUMNS = 24, 35

#: What a "?" says.
UNCOUNTED = "NaN or no number of times"

#: One mask alone may be larger.
ROWS_ALONE, COLUMNS_ALONE = 48, 72


@dataclass(frozen=True)
class Excerpt:
    """Rows of two masks, from row `top` and column `left` on, one character a cell.

    `#` both, `+` extra, `-` missing, digits: a cell that both see, but not equally often, shows how
    often it was seen ("*" beyond 9, "?" where that could not be read).
    """

    top: int
    left: int
    expected: tuple[str, ...]
    actual: tuple[str, ...]


def excerpt(expected: np.ndarray, actual: np.ndarray) -> Excerpt:
    """What a picture shows of two (rows, columns) masks of multiplicities."""
    wrong = np.argwhere(expected != actual)
    row, column = wrong[0] if len(wrong) else (0, 0)
    top = int(max(0, min(row - ROWS // 2, expected.shape[0] - ROWS)))
    left = int(max(0, min(column - COLUMNS // 2, expected.shape[1] - COLUMNS)))
    view = (slice(top, top + ROWS), slice(left, left + COLUMNS))
    pairs = list(zip(expected[view], actual[view]))
    return Excerpt(
        top,
        left,
        tuple("".join(map(_expected, want)) for want, _ in pairs),
        tuple("".join(map(_actual, want, have)) for want, have in pairs),
    )


def side_by_side(masks: Excerpt) -> str:
    """Expected and actual mask beside each other."""
    width = len(masks.expected[0])
    last_row, last_column = masks.top + len(masks.expected) - 1, masks.left + width - 1
    width = max(width, len("expected"))
    cells = "".join(masks.actual)
    signs = ["# both", "+ extra", "- missing"]
    signs += ["2 seen twice"] if any(map(str.isdigit, cells)) else []
    signs += [f"? {UNCOUNTED}"] if "?" in cells else []
    lines = [
        f"rows {masks.top}..{last_row}, columns {masks.left}..{last_column}   ({', '.join(signs)})",
        f"{'':5}{'expected':<{width}}   actual",
    ]
    for t, (want, have) in enumerate(zip(masks.expected, masks.actual), masks.top):
        lines.append(f"{t:4} {want:<{width}}   {have}")
    return "\n".join(lines)


def one_mask(mask: np.ndarray) -> str:
    """One (rows, columns) mask, from its last row and column back as far as there is room."""
    rows, columns = mask.shape
    if not mask.size:
        return "(nothing to draw)"
    top, left = max(0, rows - ROWS_ALONE), max(0, columns - COLUMNS_ALONE)
    width = len(str(rows - 1))
    lines = []
    if top or left:
        lines.append(f"only rows {top}..{rows - 1}, columns {left}..{columns - 1}:")
    for t in range(top, rows):
        lines.append(f"{t:{width}} {''.join(map(_expected, mask[t, left:]))}")
    return "\n".join(lines)


def _expected(cell: int) -> str:
    return "." if cell == 0 else "#" if cell == 1 else str(cell) if cell < 10 else "*"


def _actual(want: int, have: int) -> str:
    if want == have:
        return _expected(want)
    if have == 0:
        return "-"
    if want == 0:
        return "+"
    return "?" if have < 0 else str(have) if have < 10 else "*"
