"""Where a method acts: the stages of a forward pass as an SVG, the method's own highlighted."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

WIDTH, HEIGHT, LEFT, GAP = 106, 76, 12, 10
MAIN, SECOND = 66, 224  # the upper edges of the two streams
STREAM = (  # (stage, what is there, in two lines)
    ("rewrite", "picture,|text"),
    ("tower", "vision|tower"),
    ("see", "visual|tokens"),
    ("before", "residual|stream"),
    ("scores", "scores|q·k"),
    ("weights", "softmax|weights"),
    ("mlp", "feed-|forward"),
    ("logits", "token|logits"),
    ("search", "next|token"),
)
OTHER = (  # the same, and the column that it stands in
    ("contrast", "second|prompt", 0),
    ("other_embeds", "input|embeddings", 2),
    ("other_row", "its|last row", 4),
    ("other_hidden", "hidden|columns", 5),
)
INK, PALE, LINE = "#1f2933", "#f1f3f5", "#adb5bd"
COLOUR = "#c2410c"


def diagram(name: str, stages: tuple[str, ...]) -> str:
    """The SVG file of a method that overrides `stages`."""
    width, height = 2 * LEFT + 9 * WIDTH + 8 * GAP, SECOND + HEIGHT + 26
    said = f"Where {name} acts in a forward pass: {', '.join(stages)}."
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'width="{width}" height="{height}" font-family="system-ui, sans-serif" '
            f'font-size="15" role="img" aria-label="{escape(said)}">',
            f"<title>{escape(said)}</title>",
            f'<rect width="{width}" height="{height}" rx="8" fill="#ffffff"/>',
            *_drawn(frozenset(stages)),
            "</svg>\n",
        ]
    )


def _drawn(stages: frozenset[str]) -> Iterator[str]:
    for top, label, names in (
        (MAIN, "every decoder layer", ("before", "mlp")),
        (SECOND, "the same layers again", ("scores", "weights")),
    ):
        first, last = (_left(_column(name)) for name in names)
        yield (
            f'<rect x="{first - 5}" y="{top - 26}" width="{last - first + WIDTH + 10}" '
            f'height="{HEIGHT + 34}" rx="6" fill="none" stroke="{LINE}" stroke-dasharray="4 3"/>'
        )
        yield _text((first + last + WIDTH) / 2, top - 10, label, "#6b7280")
    yield _text(LEFT, 22, "main stream", INK, "start")
    yield _text(LEFT, SECOND - 14, "second stream, where there is one", INK, "start")
    for column, (stage, what) in enumerate(STREAM):
        if column:
            yield _arrow(_left(column) - GAP, MAIN + HEIGHT / 2, _left(column), MAIN + HEIGHT / 2)
        yield from _box(column, MAIN, stage, what, stage in stages)
    middle, end = SECOND + HEIGHT / 2, _left(_column("logits")) + WIDTH / 2
    yield from _line((_left(0) + WIDTH, middle), (end, middle), (end, MAIN + HEIGHT))
    for stage, what, column in OTHER:
        yield from _box(column, SECOND, stage, what, stage in stages)


def _column(stage: str) -> int:
    return [name for name, _ in STREAM].index(stage)


def _left(column: int) -> int:
    return LEFT + column * (WIDTH + GAP)


def _box(column: int, top: int, stage: str, what: str, on: bool) -> Iterator[str]:
    fill, ink, weight = (COLOUR, "#ffffff", "600") if on else (PALE, "#4b5563", "400")
    yield (
        f'<rect x="{_left(column)}" y="{top}" width="{WIDTH}" height="{HEIGHT}" rx="6" '
        f'fill="{fill}" stroke="{COLOUR if on else LINE}"/>'
    )
    middle = _left(column) + WIDTH / 2
    for line, part in enumerate(what.split("|")):
        yield _text(middle, top + 22 + 18 * line, part, ink, weight=weight)
    mono = ' font-family="monospace" font-size="13"'
    yield _text(middle, top + 63, stage, ink, weight=weight, extra=mono)


def _text(
    x: float, y: float, text: str, fill: str, anchor: str = "middle", weight: str = "400",
    extra: str = "",
) -> str:  # fmt: skip
    return (
        f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" fill="{fill}" '
        f'font-weight="{weight}"{extra}>{escape(text)}</text>'
    )


def _arrow(x: float, y: float, to_x: float, to_y: float) -> str:
    return f'<path d="M{x:g} {y:g}L{to_x:g} {to_y:g}" stroke="{LINE}" stroke-width="1.5"/>'


def _line(*points: tuple[float, float]) -> Iterator[str]:
    path = "L".join(f"{x:g} {y:g}" for x, y in points)
    yield f'<path d="M{path}" fill="none" stroke="{LINE}" stroke-width="1.5"/>'
    x, y = points[-1]
    yield f'<path d="M{x - 4:g} {y + 7:g}L{x:g} {y:g}L{x + 4:g} {y + 7:g}z" fill="{LINE}"/>'
