"""Bins of positions and of distances, with edges on parts or multiples of the window."""

from __future__ import annotations

from bisect import bisect_right


def bin_edges(length: int, window_size: int, num_bins: int) -> list[int]:
    """Edges `0 = e_0 < e_1 < … < e_k = length`, with every multiple of the window an edge.

    Where the window holds several bins it is cut into equal parts; where there are more windows
    than bins, a bin takes in several windows. The window's own end is always an edge (if it is
    below `length`), so that no bin mixes what the window sees with what it does not.

    Args:
        length: end of the last bin, in tokens.
        window_size: W, in tokens.
        num_bins: about how many bins are wanted.

    Raises:
        ValueError: an argument is below 1.
    """
    for name, value in (
        *(("length", length), ("window_size", window_size), ("num_bins", num_bins)),
    ):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1; give a positive number")
    num_windows = -(-length // window_size)
    if num_windows > num_bins:
        stride = -(-num_windows // num_bins) * window_size
        edges = {0, window_size, *range(0, length, stride)}
    else:
        parts = min(max(1, num_bins // num_windows), window_size)
        edges = {
            start + part * window_size // parts
            for start in range(0, length, window_size)
            for part in range(parts)
        }
    return [*sorted(edge for edge in edges if edge < length), length]


def bin_index(edges: list[int], value: int) -> int:
    """The bin `i` with `edges[i] <= value < edges[i + 1]`.

    Raises:
        ValueError: `value` is outside the edges.
    """
    if not edges[0] <= value < edges[-1]:
        raise ValueError(
            f"value={value} is outside the bins [{edges[0]}, {edges[-1]}); make the bins longer"
        )
    return bisect_right(edges, value) - 1


def bin_label(edges: list[int], index: int) -> str:
    """`"64-127"`: first and last value of a bin, both inclusive."""
    return f"{edges[index]}-{edges[index + 1] - 1}"


def parse_label(label: str) -> tuple[int, int]:
    """First and last value of a bin from its label, `"64-127"` to `(64, 127)`.

    Raises:
        ValueError: the label is not of that form.
    """
    first, dash, last = label.partition("-")
    if not (dash and first.isdigit() and last.isdigit()):
        raise ValueError(f"bin label {label!r} is not of the form 64-127; write first-last")
    return int(first), int(last)
