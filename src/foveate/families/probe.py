"""A layout found by looking, for models that no file of this folder describes.

Pictures of light and dark bands go through the model's vision tower, first along one axis, then
along the other, every one with its inverse. The bands are a binary Gray code: no two neighbouring
places are light and dark on the same pictures, and only one picture changes from a place to the
next. So the pictures on which a token is light say where it lies, and a token on a border is wrong
by one step at most. A place is half as wide as a token would be if all of them tiled the picture
once. Then tokens line by line are put together to grids.

What is light is told by each token's features of an all light and an all dark picture: the
difference of the features of a pattern and its inverse is projected onto theirs. What reaches a
token from the rest of the picture is nearly the same on both and cancels. What is left is its own
place's, also on towers that were never trained, unless their attention drowns it.

What this cannot find: tokens that stand for no place (resamplers, query transformers), tokens in
another order than line by line, and how high a single line of tokens is, or how wide a single
column (their cells are taken for squares). Edges are exact to half a cell. On untrained towers the
layout of very long and thin pictures, which fill half a token across, may be wrong and look right.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..core.visual import WHOLE, Box
from .layout import Grid

Look = Callable[[Image.Image], Tensor]
"""A picture -> the features (N_v, D) of its visual tokens, in the prompt's order."""

NEEDED = 0.7
"""The least confidence with which a layout is used. In our tests (`tests/test_probe.py`) layouts
that are right have more than 0.85, and tokens in no order or without a place less than 0.1."""

LIGHT, DARK = 235, 20  # grey values of 255, inside what cameras and screens give
SILENT = 1e-3  # of the median token's response: tokens below it do not see the picture
CLEAR = 0.4  # an answer of so much of the token's clearest tells light from dark
FEW = 0.25  # patterns are fine enough when no greater share of the tokens tells light from dark
SURE = 1.5  # an answer of 1 / SURE of the clearest counts as all light or all dark
AGREE = 0.6  # the least share of a line's tokens that lie where the line says
LEAST = 2.5  # score of the smallest grid, unless the picture has fewer tokens


@dataclass(frozen=True)
class Found:
    """Where the visual tokens of a picture of one size lie.

    Attributes:
        grids: counted from the picture's first visual token.
        count: visual tokens of the picture.
        tokens: (count,) confidence per token, -1 to 1: how its light and dark pictures agree with
            those of its place, weighted by how clearly it says so. 1 is in all of them, 0 by
            chance. 0 for tokens outside the grids; NaN for those that do not see the picture, such
            as newlines and padding.
        pictures: how many went through the tower.
    """

    grids: tuple[Grid, ...]
    count: int
    tokens: tuple[float, ...]
    pictures: int

    @property
    def confidence(self) -> float:
        """The mean over tokens that see the picture; 0 where none does."""
        seen = [value for value in self.tokens if value == value]
        return sum(seen) / len(seen) if seen else 0.0


def find(look: Look, size: tuple[int, int]) -> Found:
    """The layout of pictures of (width, height) pixels.

    With `n` tokens along an axis some ``log2(2 n)`` patterns and as many inverses are looked at,
    and two plain pictures: 30 of 24 x 24 tokens.
    """
    light, dark = (look(Image.new("RGB", size, (grey,) * 3)) for grey in (LIGHT, DARK))
    apart = light - dark
    count, strength = len(apart), apart.square().sum(-1)
    if not count:
        return Found((), 0, (), 2)
    awake = strength > SILENT**2 * strength.median()
    answers = [_answers(look, size, axis, apart, awake) for axis in (0, 1)]
    seeing = awake.cpu().numpy()
    x, y = (_places(said, seeing) for said in answers)
    steps = 0.5 ** answers[0].shape[1], 0.5 ** answers[1].shape[1]
    grids = _tidy(_grids(x, y, steps), size)
    pictures = 2 + 2 * sum(said.shape[1] for said in answers)
    return Found(tuple(grids), count, _confidence(grids, answers, seeing), pictures)


def _answers(
    look: Look, size: tuple[int, int], axis: int, apart: Tensor, awake: Tensor
) -> np.ndarray:
    """What every token says of one pattern after the other, coarse ones first.

    There are enough for as many tokens as there are, in squares over the whole picture. Where the
    tokens lie closer, as on a part of the picture or a small tile, finer ones follow until few
    tokens tell light from dark.

    Returns:
        (N, patterns) float64, from -1, all dark, to 1, all light; 0 for those that see nothing.
    """
    strength = apart.square().sum(-1).where(awake, 1)
    enough = math.log2(2 * math.sqrt(len(apart) * size[axis] / size[1 - axis]))
    said: list[Tensor] = []
    level = 0
    while not said or 2 ** (level + 1) <= size[axis]:
        level += 1
        moved = look(_bands(size, axis, level)) - look(_bands(size, axis, level, inverse=True))
        answer = (moved * apart).sum(-1) / strength
        said.append(answer.clamp(-1, 1).where(awake, 0.0))
        clearest = torch.stack(said).abs().amax(0)
        clear = said[-1].abs() > CLEAR * clearest
        if level >= enough and clear[awake].float().mean() < FEW:
            break
    return torch.stack(said, -1).double().cpu().numpy()


def agreement(found: Found, grids: Sequence[Grid]) -> tuple[int, int]:
    """How far what was found is what a layout file says.

    Args:
        grids: of one picture, from `foveate.families.layout.grids`.

    Returns:
        How many tokens lie at the same place, that is within half a cell, and of how many: those
        that have at least half of their cell on the picture, in either direction.
    """
    mine = {token: cell for grid in found.grids for token, cell in grid.cells()}
    same = compared = 0
    for grid in grids:
        for token, cell in grid.cells():
            near = [(cell[axis + 2] - cell[axis]) / 2 for axis in (0, 1)]
            shown = _inside(cell)
            if any(shown[axis + 2] - shown[axis] < near[axis] for axis in (0, 1)):
                continue
            compared += 1
            if token in mine:
                other = _inside(mine[token])
                apart = [sum(shown[axis::2]) - sum(other[axis::2]) for axis in (0, 1)]
                same += all(abs(a) / 2 <= n for a, n in zip(apart, near, strict=True))
    return same, compared


def _inside(cell: Box) -> list[float]:
    """What of a cell lies on the picture."""
    return [min(max(edge, 0.0), 1.0) for edge in cell]


# -- patterns --------------------------------------------------------------------------------------


def _pattern(level: int) -> np.ndarray:
    """(2 ** level,) bool: which places are light on the pattern of a level, 1 being the coarsest.

    The last bit of a Gray code; bands are two places wide, but for those at the ends.
    """
    places = np.arange(2**level)
    return ((places ^ places >> 1) & 1).astype(bool)


def _bands(size: tuple[int, int], axis: int, level: int, inverse: bool = False) -> Image.Image:
    place = np.arange(size[axis]) * 2**level // size[axis]
    line = np.where(_pattern(level)[place] != inverse, LIGHT, DARK).astype(np.uint8)
    grey = np.broadcast_to(line if axis == 0 else line[:, None], size[::-1])
    return Image.fromarray(np.repeat(grey[:, :, None], 3, axis=2))


def _lights(levels: int) -> np.ndarray:
    """(places, levels): -1 dark, 1 light, with the places of the finest level."""
    lines = [np.repeat(_pattern(level), 2 ** (levels - level)) for level in range(1, levels + 1)]
    return np.stack(lines, -1) * 2.0 - 1


def _places(said: np.ndarray, seeing: np.ndarray) -> np.ndarray:
    """Where the tokens with these answers (N, patterns) lie: (N,) 0 to 1, NaN for blind ones.

    That is the middle of the stretch whose share of light on every pattern is nearest to the
    answers, which are scaled so that the clearest counts as all light or all dark.
    """
    levels = said.shape[1]
    total = 2**levels
    sums = np.concatenate([np.zeros((1, levels)), _lights(levels).cumsum(0)])
    widths = {width for power in range(levels + 1) for width in (2**power, 3 * 2**power // 2)}
    shares, middles = [], []
    for width in sorted(width for width in widths if width <= total):
        shares.append((sums[width:] - sums[:-width]) / width)
        middles.append((np.arange(total - width + 1) + width / 2) / total)
    share, middle = np.concatenate(shares), np.concatenate(middles)
    clearest = np.abs(said).max(1, keepdims=True)
    scaled = (SURE * said / np.where(clearest > 0, clearest, 1)).clip(-1, 1)
    cost = (share**2).sum(1)
    parts = np.array_split(scaled, 1 + len(said) // 1024)  # memory is a part times all stretches
    best = [np.argmin(cost - 2 * part @ share.T, 1) for part in parts]
    return np.where(seeing, middle[np.concatenate(best)], np.nan)


# -- from places to grids --------------------------------------------------------------------------


@dataclass(frozen=True)
class _Lines:
    """Equal lines of tokens that lie as a grid does."""

    start: int
    rows: int
    cols: int
    period: int  # tokens from a line's first to the next line's
    score: float  # sum over tokens, 1 at its place, less where it is off, -1 where it lies
    # elsewhere, times the square of their mean: better several good grids than one that fits badly
    across: tuple[float, float]  # middle of the first column, and the step to the next
    down: tuple[float, float]

    @property
    def stop(self) -> int:
        return self.start + self.rows * self.period

    def grid(self) -> Grid:
        (x, dx), (y, dy) = self.across, self.down
        left, top = x - dx / 2, y - dy / 2
        box = (left, top, left + self.cols * dx, top + self.rows * dy)
        return Grid(self.rows, self.cols, self.start, box, self.period - self.cols)


def _grids(x: np.ndarray, y: np.ndarray, steps: tuple[float, float]) -> list[_Lines]:
    """The longest grids, one behind the other; tokens that fit none are passed over.

    None where so many are passed over that the confidence would be below `NEEDED`.

    Args:
        x, y: (N,) where tokens lie, NaN for those that see nothing. steps: from place to place.
    """
    found: list[_Lines] = []
    at, count = 0, len(x)
    seeing = np.flatnonzero(~np.isnan(x))
    least, spare = min(LEAST, 0.5 * len(seeing)), (1 - NEEDED) * len(seeing)
    best_at = functools.cache(lambda start: _best(x, y, start, steps))
    for first in map(int, seeing):
        if first < at:
            continue
        starts = dict.fromkeys((at, first, first + 1))  # a token may stand before the first line
        lines = [best_at(start) for start in starts if start < count]
        best = max((one for one in lines if one), key=lambda one: one.score, default=None)
        if best is not None and best.score >= least:
            found.append(best)
            at = best.stop
            continue
        at, spare = first + 1, spare - 1
        if spare < 0:
            return []
    return found


def _best(x: np.ndarray, y: np.ndarray, start: int, steps: tuple[float, float]) -> _Lines | None:
    """The best grid that begins with a token; no line has more tokens than there are places."""
    longest = min(len(x) - start, round(1 / steps[0]) + 1)
    ones = [_lines(x, y, start, period, steps) for period in range(1, longest + 1)]
    return max((one for one in ones if one), key=lambda one: one.score, default=None)


def _lines(
    x: np.ndarray, y: np.ndarray, start: int, period: int, steps: tuple[float, float]
) -> _Lines | None:
    """Lines of this period from a token on, as many as lie like a grid.

    The first lines say where columns are, by medians, so that single tokens may be wrong.
    """
    high = (len(x) - start) // period
    xs, ys = (v[start : start + high * period].reshape(high, period) for v in (x, y))
    if high > 1 and np.mean(np.abs(xs[0] - xs[1]) > max(0.1, 3 * steps[0])) > 1 - AGREE**2:
        high, xs, ys = 1, xs[:1], ys[:1]  # the next line lies elsewhere
        half = period // 2
        if half and np.mean(xs[0, half:] < xs[0, :-half]) > 1 - AGREE:
            return None
    seen = ~np.isnan(xs)
    across = _line(_medians(xs[:3].T))  # the columns
    if across is None:
        return None
    off = np.abs(xs - (across[0] + across[1] * np.arange(period)))
    off = off / max(0.75 * across[1], 1.5 * steps[0])
    right = off <= 1
    good = (right & seen).sum(1) >= AGREE * seen.sum(1)
    high = int(np.argmin(good)) if not good.all() else high
    if not high:
        return None
    xs, ys, off, seen = xs[:high], ys[:high], off[:high], seen[:high]
    tops = _medians(ys)
    down = _line(tops[: _falls(tops, steps[1])]) or _line(tops[:1])
    if down is None:
        return None
    beside = np.abs(ys - (down[0] + down[1] * np.arange(high))[:, None])
    beside = beside / max(0.75 * down[1], 1.5 * steps[1])
    right = (off <= 1) & (beside <= 1)
    good = right.sum(1) >= AGREE * seen.sum(1)
    rows = int(np.argmin(good)) if not good.all() else high
    if not rows:
        return None
    gain = np.where(right, 1 - (off**2 + beside**2) / 2, -1)
    gain = np.where(seen, gain, 0)[:rows].sum(0).cumsum()
    cols = int(np.argmax(gain)) + 1
    mean = float(gain[cols - 1]) / (int(seen[:rows].sum()) or 1)
    score = float(gain[cols - 1]) * mean**2
    inside = (right & seen)[:rows, :cols]
    row, col = np.nonzero(inside)
    return _Lines(
        start,
        rows,
        cols,
        period,
        score,
        _fitted(col, xs[:rows, :cols][inside], across),
        _fitted(row, ys[:rows, :cols][inside], down),
    )


def _falls(middles: np.ndarray, step: float) -> int:
    """How many lines there are until one lies clearly above the line before it."""
    known = np.flatnonzero(~np.isnan(middles))
    back = np.flatnonzero(np.diff(middles[known]) < -1.5 * step)
    return int(known[back[0]]) + 1 if len(back) else len(middles)


def _medians(values: np.ndarray) -> np.ndarray:
    """Of every row, those that are known; NaN where none is."""
    known = ~np.isnan(values)
    out = np.full(len(values), np.nan)
    some = known.any(1)
    if some.any():
        out[some] = np.nanmedian(values[some], axis=1)
    return out


def _line(values: np.ndarray) -> tuple[float, float] | None:
    """First value and step of values that rise evenly, by medians; None where they do not rise.

    The step of a single value is 0.
    """
    at = np.flatnonzero(~np.isnan(values))
    if not len(at):
        return None
    if len(at) == 1:
        return float(values[at[0]]), 0.0
    half = len(at) // 2
    steps = (values[at[half:]] - values[at[:-half]]) / (at[half:] - at[:-half])
    step = float(np.median(steps))
    return (float(np.median(values[at] - step * at)), step) if step > 0 else None


def _fitted(at: np.ndarray, values: np.ndarray, usual: tuple[float, float]) -> tuple[float, float]:
    """First value and step by least squares, over the tokens that lie right."""
    if len(at) < 2 or at.min() == at.max():
        return usual
    step, first = np.polyfit(at, values, 1)
    return (float(first), float(step)) if step > 0 else usual


def _tidy(lines: list[_Lines], size: tuple[int, int]) -> list[Grid]:
    """Grids whose edges meet: those within half a cell of each other or the picture's are one.

    A single line's cells are as high as they are wide in pixels; a single token has the picture.
    """
    grids = []
    for one in lines:
        (x, dx), (y, dy) = one.across, one.down
        if not dx and not dy:
            grids.append(Grid(1, 1, one.start, WHOLE, one.period - 1))
            continue
        one = replace(
            one,
            across=(x, dx or dy * size[1] / size[0]),
            down=(y, dy or dx * size[0] / size[1]),
        )
        grids.append(one.grid())
    edges: list[dict[float, float]] = []
    for axis, name in enumerate(("cols", "rows")):
        cells = [(g.box[axis + 2] - g.box[axis]) / getattr(g, name) for g in grids]
        near = min(cells, default=1.0) / 2
        edges.append(_merged([e for g in grids for e in (g.box[axis], g.box[axis + 2])], near))
    across, down = edges
    return [
        replace(grid, box=(across[left], down[top], across[right], down[bottom]))
        for grid in grids
        for left, top, right, bottom in [grid.box]
    ]


def _merged(values: list[float], near: float) -> dict[float, float]:
    """Values that lie within `near` of a first one -> their mean, or 0 or 1 if that is as near."""
    out: dict[float, float] = {}
    left = sorted(set(values))
    while left:
        group = [value for value in left if value - left[0] <= near]
        mean = sum(group) / len(group)
        edge = float(round(mean))
        shared = edge if edge in (0.0, 1.0) and abs(mean - edge) <= near else mean
        out |= dict.fromkeys(group, shared)
        left = left[len(group) :]
    return out


def _confidence(
    grids: list[Grid], answers: list[np.ndarray], seeing: np.ndarray
) -> tuple[float, ...]:
    """See `Found.tokens`."""
    out = np.where(seeing, 0.0, np.nan)
    lights = [_lights(said.shape[1]) for said in answers]
    for grid in grids:
        for token, cell in grid.cells():
            if not seeing[token]:
                continue
            agreed = said = 0.0
            for axis, values in enumerate(answers):
                total = len(lights[axis])
                low = min(max(math.floor(cell[axis] * total), 0), total - 1)
                high = max(math.ceil(cell[axis + 2] * total), low + 1)
                shown = lights[axis][low:high].mean(0) * values[token]
                agreed, said = agreed + shown.sum(), said + np.abs(shown).sum()
            out[token] = agreed / said if said else 0.0
    return tuple(round(float(value), 3) for value in out)
