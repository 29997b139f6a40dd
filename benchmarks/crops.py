"""Does looking again help? Fine print on drawn scenes, and where the crops went.

    python benchmarks/crops.py                                    # the table of docs/look-again
    python benchmarks/crops.py --questions 60 --method vanilla --method "vicrop(window=224)"

The pocket model sees 768-pixel scenes at 96 pixels, where the print on a thing cannot be read: the
plain answer is a guess. In a correct crop it can. pocket-bench's category "print" asks for it, and
the scene says where the asked thing lies, so that crops can be judged by themselves.

* right: the whole answer, without case and outer marks, is the label; in percent.
* against plain: difference of all answers in points with its 95 % bootstrap interval (whole scenes
  drawn), and McNemar's exact p, corrected for the number of methods (Holm).
* crop holds it: the share of the questions whose crop holds 70 % of the area of the thing's box
  or more (what the pocket world counts as seen). An answer about the whole image has no crop; they
  are counted by themselves.
* crop area: mean share of the picture, of the answers with a crop.
* seconds per question: wall-clock of reading passes and answer, questions about one scene asked
  together, pictures drawn and processed for the plain question before.
* oracle: the crop of 336 pixels around the asked thing, from the ground truth: the ceiling.

Every method has a folder of its own in the run's, and a run that was stopped goes on where it was.
Pictures of wins (plain wrong, method right) and failures (method wrong) are the first five of each,
in the order of the questions.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar, Literal

import torch
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from foveate import VLM, FoveateError, Method
from foveate.benchmark import Record, Sample
from foveate.benchmarks.pocket import HABITS, SIZE, PocketBench
from foveate.data import Data
from foveate.evaluation import evaluate
from foveate.form import Registry
from foveate.journal import Journal, write_json
from foveate.method import parse, text
from foveate.methods.vicrop import Pixels, square
from foveate.run import RECORDS, key
from foveate.significance import holm, interval, mcnemar
from foveate.vlm import Chat

ROOT = Path(__file__).resolve().parent.parent
PLAIN = "vanilla"
METHODS = (PLAIN, "vicrop", "vicrop(final_input=crop)", "carve", "laser")
ORACLES = ("oracle", "oracle(final_input=crop)")
WHOLE = (0, 0, SIZE, SIZE)
SEEN = 0.7  # of a thing's box
EXAMPLES = 5

Stack = tuple[Method, ...]


# -- questions with their ground truth -------------------------------------------------------------


TRUTH: dict[str, dict[str, Pixels]] = {}
"""Fingerprint of a picture -> prompt -> the asked thing's box; filled as pictures are opened."""


@dataclass(frozen=True)
class FinePrint(PocketBench):
    """pocket-bench's questions about print, their pictures kept as files.

    Attributes:
        scenes: folder of the pictures.
    """

    scenes: str = ""
    categories: tuple[Literal["print"], ...] = ("print",)  # type: ignore[assignment]

    def read(self, data: Data) -> Iterator[Sample]:
        samples = list(super().read(data))
        truth: dict[str, dict[str, Pixels]] = {}
        for sample in samples:
            (box,) = sample.meta["boxes"]
            truth.setdefault(str(sample.image_name), {})[sample.prompt] = tuple(box)
        for sample in samples:
            name, draw = str(sample.image_name), sample.image
            assert callable(draw)
            path = Path(self.scenes) / f"{name}.png"
            yield replace(sample, image=functools.partial(opened, path, draw, truth[name]))


def opened(path: Path, draw: Callable[[], Any], truth: dict[str, Pixels]) -> Image.Image:
    """A scene's picture, drawn where there is no file of it yet."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        draw().save(part, "PNG")
        part.replace(path)
    image = Image.open(path).convert("RGB")
    TRUTH[fingerprint(image)] = truth
    return image


def fingerprint(image: Image.Image) -> str:
    return hashlib.sha256(image.tobytes()).hexdigest()


@dataclass(frozen=True)
class Oracle(Method, register=False):
    """The crop around the asked thing, from the ground truth.

    Attributes:
        window: side of the crop in pixels.
        final_input: as ViCrop's.
    """

    window: int = 336
    final_input: Literal["both", "crop"] = "both"

    name: ClassVar[str] = "oracle"

    def rewrite(self, vlm: VLM, chats: list[Chat]) -> list[Chat]:
        image = chats[0].images[0]
        truth, found = TRUTH[fingerprint(image)], []
        for chat in chats:
            left, top, right, bottom = truth[chat.text]
            centre = ((left + right) // 2, (top + bottom) // 2)
            crop = square(centre, self.window // 2, image.size)
            piece = image.crop(crop)
            images = [image, piece] if self.final_input == "both" else [piece]
            found.append(replace(chat, images=images, notes={"crop": list(crop)}))
        return found


def stack(given: str) -> Stack:
    """Methods from their text form, the oracle among them."""
    if not given.startswith(Oracle.name):
        return parse(given)
    own = Registry("method", "foveate.methods", "oracle(window=336)", ())
    own.add(Oracle)
    return own.parse(given)


# -- asking ----------------------------------------------------------------------------------------


def ask(vlm: VLM, bench: FinePrint, methods: dict[str, Stack], run: Path, console: Console) -> Any:
    """Records per method, and the environment of the last run."""
    records, environment = {}, {}
    with Progress(console=console) as progress:
        samples = {s.image_name: s for s in bench.samples()}
        for sample in progress.track(samples.values(), description="drawing"):
            sample.load()
        for name, methods_ in methods.items():
            folder = run / re.sub(r"[^\w.=-]+", "_", name).strip("_")
            bar = progress.add_task(name, total=None)
            results = evaluate(
                [bench], vlm, [methods_], folder,
                watch=lambda done, total, _, bar=bar: progress.update(  # type: ignore[misc]
                    bar, completed=done, total=total
                ),
            )  # fmt: skip
            progress.update(bar, total=1, completed=1)
            with contextlib.closing(Journal(folder / RECORDS, key)) as journal:
                records[name] = list(journal.rows.values())
            environment = results["environment"]
            failed = [r["error"] for r in records[name] if r["error"] is not None]
            if failed:
                raise FoveateError(f"{name}: {len(failed)} questions failed, first: {failed[0]}")
    return records, environment


# -- figures ---------------------------------------------------------------------------------------


def held(record: Record) -> float:
    """The share of the asked thing's box that lies in the crop."""
    (box,), crop = record["meta"]["boxes"], record["notes"]["crop"]
    width = min(box[2], crop[2]) - max(box[0], crop[0])
    height = min(box[3], crop[3]) - max(box[1], crop[1])
    return max(0, width) * max(0, height) / ((box[2] - box[0]) * (box[3] - box[1]))


def figures(bench: FinePrint, records: list[Record], plain: list[Record]) -> dict[str, Any]:
    """What one method's records say, beside the plain answers to the same questions."""

    def right(rows: list[Record]) -> dict[str, Any]:
        share = 100 * fmean(bench.correct(r) or 0 for r in rows) if rows else None
        return {"n": len(rows), "right": share}

    found = {habit: right([r for r in records if r["meta"]["habit"] == habit]) for habit in HABITS}
    found["all"] = right(records)
    found["seconds"] = fmean(r["ms"] for r in records) / 1000
    if all("crop" in r["notes"] for r in records):
        cropped = [r for r in records if tuple(r["notes"]["crop"]) != WHOLE]
        crops = [r["notes"]["crop"] for r in cropped]
        areas = [(c[2] - c[0]) * (c[3] - c[1]) / SIZE**2 for c in crops]
        found["crop"] = {
            "whole": right([r for r in records if tuple(r["notes"]["crop"]) == WHOLE]),
            "holds": right([r for r in cropped if held(r) >= SEEN]),
            "misses": right([r for r in cropped if held(r) < SEEN]),
            "area": fmean(areas) if areas else None,
        }
    if records is not plain:
        before = {key(r)[1:3]: bench.correct(r) or 0 for r in plain}  # type: ignore[index]
        pairs = [(bench.correct(r) or 0, before[r["split"], r["line"]]) for r in records]
        differences = [now - then for now, then in pairs]
        ends = interval(differences, [r["image"] for r in records])
        gained, lost = (sum(d == sign for d in differences) for sign in (1, -1))
        found["versus"] = {
            "difference": 100 * fmean(differences),
            "interval": None if ends is None else [100 * end for end in ends],
            "gained": gained,
            "lost": lost,
            "p": mcnemar(gained, lost),
        }
    return found


def compared(bench: FinePrint, records: dict[str, list[Record]]) -> dict[str, Any]:
    """`figures` of every method, p-values corrected for their number."""
    plain = records[PLAIN]
    found = {name: figures(bench, rows, plain) for name, rows in records.items()}
    others = [entry["versus"] for entry in found.values() if "versus" in entry]
    for entry, p in zip(others, holm([entry["p"] for entry in others]), strict=True):
        entry["holm"] = p
    return found


HEADS = [
    "method",
    "with the habit",
    "against it",
    "all",
    "against plain",
    "p",
    "crop holds it",
    "right where it does",
    "right where not",
    "whole image",
    "crop area",
    "s / question",
]


def cells(name: str, found: dict[str, Any]) -> list[str]:
    """A row of the table."""

    def percent(value: float | None) -> str:
        return "" if value is None else f"{value:.1f}"

    row = [name, *(percent(found[part]["right"]) for part in (*HABITS, "all"))]
    versus, crop = found.get("versus"), found.get("crop")
    if versus is None:
        row += ["", ""]
    else:
        low, high = versus["interval"] or (float("nan"),) * 2
        row.append(f"{versus['difference']:+.1f} ({low:+.1f} to {high:+.1f})")
        row.append("< 0.0001" if versus["holm"] < 1e-4 else f"{versus['holm']:.4f}")
    if crop is None:
        row += [""] * 5
    else:
        share = 100 / found["all"]["n"]
        row.append(f"{crop['holds']['n'] * share:.1f} %")
        row += [percent(crop[part]["right"]) for part in ("holds", "misses")]
        row.append(f"{crop['whole']['n'] * share:.1f} %")
        row.append("" if crop["area"] is None else f"{100 * crop['area']:.0f} %")
    return [*row, f"{found['seconds']:.2f}"]


def markdown(report: dict[str, Any]) -> str:
    """The table with what it was measured on."""
    rows = [HEADS, ["---"] * len(HEADS)]
    rows += [cells(f"`{name}`", found) for name, found in report["figures"].items()]
    about = report["environment"]
    return "\n".join(
        [
            f"n = {report['questions']:,} questions about {report['scenes']:,} scenes, the same "
            f"for every method; {report['parts']}.",
            "",
            *(f"| {' | '.join(row)} |" for row in rows),
            "",
            f"Command: `{report['command']}`. {about['hardware']}, {about['threads']} threads, "
            f"shared with other work, so that seconds are rough; torch {about['torch']}, "
            f"transformers {about['transformers']}.",
        ]
    )


# -- pictures --------------------------------------------------------------------------------------


def examples(
    bench: FinePrint, records: list[Record], plain: list[Record]
) -> tuple[list[Record], list[Record]]:
    """The first wins (plain wrong, method right) and the first failures, both habits in turn."""
    before = {(r["split"], r["line"]): bench.correct(r) for r in plain}
    ordered = sorted(records, key=lambda r: (r["line"], r["split"]))
    won = [r for r in ordered if bench.correct(r) and not before[r["split"], r["line"]]]
    lost = [r for r in ordered if not bench.correct(r)]
    return won[:EXAMPLES], lost[:EXAMPLES]


def draw(
    vlm: VLM, bench: FinePrint, name: str, records: list[Record], plain: list[Record], path: Path
) -> Path:
    """Wins on the left, failures on the right: the scene with its frames, what the model saw."""
    from foveate.plots.style import BLUE, GAP, PAD, PAPER, QUIET, RED, Page, bare, wrapped

    side, text_high = 2.0, 0.62
    half = 2 * side + GAP
    columns = examples(bench, records, plain)
    samples = {(s.split, s.line): s for s in bench.samples()}
    said = {(r["split"], r["line"]): r["answer"] for r in plain}
    page = Page(
        wide=2 * PAD + 2 * half + 0.5,
        head=wrapped(f"{name}: fine print that it reads, and that it does not", 9.0, 8.3),
        rows=EXAMPLES,
        row=side + text_high,
        notes=(
            "Left: the first five questions that it answers right and the plain model wrong. "
            "Right: the first five that it answers wrong. Of each, the scene with the asked thing "
            "(orange) and the crop (blue, dashed), and the picture that the model was shown again."
        ),
    )
    for column, rows in enumerate(columns):
        for number, record in enumerate(rows):
            left, top = PAD + column * (half + 0.5), page.top(number)
            place = (record["split"], record["line"])
            image = samples[place].load()
            assert image is not None
            chat = vlm.chat([image], samples[place].prompt, None)
            shown = vlm.rewrite([chat], stack(name))[0].images[-1]
            panels = [page.axes(left + i * (side + GAP), top, side, side) for i in range(2)]
            panels[0].imshow(image)
            panels[0].add_patch(_frame(record["meta"]["boxes"][0], ec=RED, lw=2))
            panels[0].add_patch(_frame(record["notes"]["crop"], ec=PAPER, lw=3.5))
            panels[0].add_patch(_frame(record["notes"]["crop"], ec=BLUE, lw=2, ls=(0, (4, 2))))
            panels[1].imshow(shown)
            for panel in panels:
                bare(panel)
            told = f"{record['label']!r}; plain {said[place]!r}, now {record['answer']!r}"
            page.write(left, top + side + 0.06, record["question"], size=9)
            page.write(left, top + side + 0.24, told, size=9, color=QUIET)
    page.write(PAD, page.bottom + 0.1, page.notes, size=8.5, color=QUIET, linespacing=1.35)
    page.figure.savefig(path, facecolor=PAPER)
    return path


def _frame(box: list[int], **style: Any) -> Any:
    from matplotlib.patches import Rectangle

    left, top, right, bottom = box
    return Rectangle((left, top), right - left, bottom - top, fill=False, **style)


# -- the command -----------------------------------------------------------------------------------


def written(page: str, table: str) -> str:
    """A page with the table between its marks."""
    start, end = "<!-- table -->\n", "\n<!-- end of table -->"
    before, rest = page.split(start)
    return before + start + table + end + rest.split(end)[1]


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Fine print, asked plainly and by looking again.")
    parser.add_argument("--questions", type=int, default=500, help="per habit, an even number")
    parser.add_argument("--method", action="append", help="text form; repeatable; also oracle(...)")
    parser.add_argument("--run", type=Path, default=ROOT / "runs" / "crops", help="records")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's")
    parser.add_argument(
        "--out", type=Path, help="folder for crops.json, README.md and pictures; default: nothing"
    )
    args, console = parser.parse_args(given), Console()
    if not console.is_terminal:
        console = Console(width=200)
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        chosen = [stack(m) for m in args.method or (*METHODS, *ORACLES)]
        methods = {PLAIN: ()} | {text(s): s for s in chosen}
        bench = FinePrint(questions=args.questions, scenes=str(args.run / "scenes"))
        vlm = VLM.load("pocket", device="cpu")
        run = args.run / f"{args.questions}-per-habit"
        records, environment = ask(vlm, bench, methods, run, console)
    except FoveateError as error:
        console.print(str(error))
        return 2
    found = compared(bench, records)
    table = Table(*HEADS, title=f"{2 * args.questions:,} questions")
    for name, entry in found.items():
        table.add_row(*cells(name, entry))
    console.print(table)
    if args.out is None:
        return 0
    plain = records[PLAIN]
    report = {
        "questions": len(plain),
        "scenes": len({r["image"] for r in plain}),
        "parts": ", ".join(f"{found[PLAIN][h]['n']} {h} the habit" for h in HABITS),
        "command": shlex.join(["python", "benchmarks/crops.py", *(given or sys.argv[1:])]),
        "environment": environment,
        "figures": found,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / "crops.json", report)
    page = args.out / "README.md"
    old = page.read_text("utf-8") if page.exists() else "<!-- table -->\n\n<!-- end of table -->\n"
    page.write_text(written(old, markdown(report)), "utf-8")
    for name, rows in records.items():
        if name.isidentifier() and name not in (PLAIN, Oracle.name):
            draw(vlm, bench, name, rows, plain, args.out / f"{name}.png")
    console.print(f"written: {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
