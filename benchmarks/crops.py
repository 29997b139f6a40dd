"""Does looking again help? Fine print on drawn scenes, and where the crops went.

    python benchmarks/crops.py --out docs/look-again              # the table and the pictures
    python benchmarks/crops.py --layers --out docs/look-again     # where each layer looks
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
* layers (``--layers``): how often ViCrop's crop would hold the thing if the map were another
  layer's, with the general instruction divided out and without, with ViCrop's suffix in the reading
  passes and without. Other scenes than the table's, so that a layer can be chosen there.

The pictures are asked about in ten parts, each part with all methods in turn, so that whatever else
the machine does hits all alike. A run that was stopped goes on where it was, with other methods,
too; ``--tenths`` ends it after some parts.
Pictures of wins (plain wrong, method right) and failures (method wrong) are the first five of each,
in the order of the questions.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from fineprint import FinePrint, Oracle, Stack, stack  # beside this file
from report import between, grid
from rich.console import Console
from rich.progress import Progress, TaskID
from rich.table import Table

from foveate import VLM, FoveateError
from foveate.backends.transformers.anatomy import anatomy
from foveate.base.journal import Journal, write_json
from foveate.base.stats import holm, interval, mcnemar
from foveate.benchmarks.pocket import HABITS, SIZE
from foveate.core.method import text
from foveate.evaluation.ask import Plan, evaluate
from foveate.evaluation.benchmark import EvalRecord, Sample
from foveate.evaluation.run import RECORDS, key
from foveate.methods.vicrop import ViCrop, window_search
from foveate.vlm.chat import Chat
from foveate.vlm.look import GENERAL, SHORT, read

ROOT = Path(__file__).resolve().parent.parent
PLAIN = "vanilla"
METHODS = (  # with the published settings, with better ones, and what a crop can do at best
    PLAIN,
    "vicrop",
    "vicrop(final_input=crop)",
    "vicrop(layers=(4,))",
    "carve",
    "carve(time=start,keep=0.2,regions=1,layers=(3,4,5,6))",
    "laser",
    "oracle",
    "oracle(final_input=crop)",
    "oracle(final_input=crop,black=True)",
    "oracle(final_input=crop,window=168)",
    "oracle(final_input=crop,window=672)",
)
MAPS = tuple(m + s for s in ("", ", no suffix") for m in ("question / general", "question"))
WHOLE = (0, 0, SIZE, SIZE)
SEEN = 0.7  # of a thing's box
EXAMPLES = 5
TENTHS = 10  # parts of the pictures that a run is made of


# -- asking ----------------------------------------------------------------------------------------


def ask(
    vlm: VLM, bench: FinePrint, methods: dict[str, Stack], run: Path, tenths: int, console: Console
) -> tuple[dict[str, list[EvalRecord]], dict[str, Any]]:
    """Records per method, and the environment of the last run."""
    records: dict[str, list[EvalRecord]] = {name: [] for name in methods}
    environment: dict[str, Any] = {}
    pictures = {s.image_name: s for s in bench.samples()}
    with Progress(console=console) as progress:
        for number in range(tenths):
            part = list(pictures.values())[number::TENTHS]
            if not part:
                break
            bar = progress.add_task(f"part {number + 1}: drawing", total=len(part))
            for sample in part:
                if not bench.path(sample).exists():
                    sample.load()
                progress.advance(bar)
            for name, stack in methods.items():
                progress.update(bar, description=f"part {number + 1}: {name}", completed=0)
                folder = run / re.sub(r"[^\w.=-]+", "_", name).strip("_")

                def watch(done: int, total: int, what: str, bar: TaskID = bar) -> None:
                    progress.update(bar, completed=done, total=total)

                shard = (number, TENTHS)
                results = evaluate(Plan([bench], [stack], folder, shard=shard), vlm, watch=watch)
                path = folder / f"shard-{number}-of-{TENTHS}" / RECORDS
                with contextlib.closing(Journal(path, key)) as journal:
                    records[name] += journal.rows.values()
                environment = results["environment"]
                failed = [r["error"] for r in records[name] if r["error"] is not None]
                if failed:
                    raise FoveateError(f"{name}: {len(failed)} failed, the first: {failed[0]}")
            progress.remove_task(bar)
    return records, environment


# -- layers ----------------------------------------------------------------------------------------


def by_layer(vlm: VLM, bench: FinePrint, console: Console) -> dict[str, Any]:
    """Per kind of map and layer, the share of the questions whose crop would hold the thing."""
    method = ViCrop()
    scenes: dict[str, list[Sample]] = {}
    for sample in bench.samples():
        scenes.setdefault(str(sample.image_name), []).append(sample)
    hits: dict[str, list[list[bool]]] = {kind: [] for kind in MAPS}
    with Progress(console=console) as progress:
        for samples in progress.track(scenes.values(), description="layers"):
            image = samples[0].load()
            assert image is not None
            images = [image]
            for suffix, names in ((SHORT, list(MAPS)[:2]), ("", list(MAPS)[2:])):
                texts = [s.prompt + suffix for s in samples] + [GENERAL + suffix]
                readings = read(vlm, [Chat(images, text) for text in texts], None)
                *asked, general = (r.map(r.weights[0]).double().numpy() for r in readings)
                for sample, heat in zip(samples, asked, strict=True):
                    for name, maps in zip(names, (heat / general, heat), strict=True):
                        crops = [window_search(m, image.size, 336, method.ratios) for m in maps]
                        hits[name].append([held(sample.meta["boxes"], c) >= SEEN for c in crops])
    return {
        "questions": len(hits["question / general"]),
        "published": list(method.resolve(anatomy(vlm.model)).layers or ()),
        "held": {name: (100 * np.mean(rows, 0)).tolist() for name, rows in hits.items()},
    }


def layer_markdown(report: dict[str, Any]) -> str:
    """Rows are layers, columns kinds of maps."""
    rows = []
    for layer, shares in enumerate(zip(*report["held"].values(), strict=True)):
        mark = ", the published depth" * (layer in report["published"])
        rows.append([f"{layer}{mark}", *(f"{share:.0f} %" for share in shares)])
    about = (
        f"n = {report['questions']:,} questions, half of them against the habit, about other "
        f"scenes than those above (seed {report['seed']})."
    )
    lines = [about, "", *grid(["layer", *MAPS], rows), "", f"Command: `{report['command']}`."]
    return "\n".join(lines)


# -- figures ---------------------------------------------------------------------------------------


def held(boxes: list[list[int]], crop: Sequence[int]) -> float:
    """The share of the asked thing's box that lies in the crop."""
    (box,) = boxes
    width = min(box[2], crop[2]) - max(box[0], crop[0])
    height = min(box[3], crop[3]) - max(box[1], crop[1])
    return max(0, width) * max(0, height) / ((box[2] - box[0]) * (box[3] - box[1]))


def figures(bench: FinePrint, records: list[EvalRecord], plain: list[EvalRecord]) -> dict[str, Any]:
    """What one method's records say, beside the plain answers to the same questions."""

    def right(rows: list[EvalRecord]) -> dict[str, Any]:
        share = 100 * fmean(bench.correct(r) or 0 for r in rows) if rows else None
        return {"n": len(rows), "right": share}

    figure = {habit: right([r for r in records if r["meta"]["habit"] == habit]) for habit in HABITS}
    figure["all"] = right(records)
    figure["seconds"] = fmean(r["ms"] for r in records) / 1000
    if all("crop" in r["notes"] for r in records):
        parts: dict[str, list[EvalRecord]] = {"whole": [], "holds": [], "misses": []}
        areas = []
        for record in records:
            crop = record["notes"]["crop"]
            if tuple(crop) == WHOLE:
                parts["whole"].append(record)
                continue
            holds = held(record["meta"]["boxes"], crop) >= SEEN
            parts["holds" if holds else "misses"].append(record)
            areas.append((crop[2] - crop[0]) * (crop[3] - crop[1]) / SIZE**2)
        figure["crop"] = {
            **{part: right(rows) for part, rows in parts.items()},
            "area": fmean(areas) if areas else None,
        }
    if records is not plain:
        before = {key(r)[1:3]: bench.correct(r) or 0 for r in plain}  # type: ignore[index]
        pairs = [(bench.correct(r) or 0, before[r["split"], r["line"]]) for r in records]
        differences = [now - then for now, then in pairs]
        ends = interval(differences, [r["image"] for r in records])
        gained, lost = (sum(d == sign for d in differences) for sign in (1, -1))
        figure["versus"] = {
            "difference": 100 * fmean(differences),
            "interval": None if ends is None else [100 * end for end in ends],
            "gained": gained,
            "lost": lost,
            "p": mcnemar(gained, lost),
        }
    return figure


def compared(bench: FinePrint, records: dict[str, list[EvalRecord]]) -> dict[str, Any]:
    """`figures` of every method, p-values corrected for their number."""
    plain = records[PLAIN]
    entries = {name: figures(bench, rows, plain) for name, rows in records.items()}
    others = [entry["versus"] for entry in entries.values() if "versus" in entry]
    for entry, p in zip(others, holm([entry["p"] for entry in others]), strict=True):
        entry["holm"] = p
    return entries


HEADS = [
    *("method", "with the habit", "against it", "all", "against plain", "p", "crop holds it"),
    *("right where it does", "right where not", "whole image", "crop area", "s / question"),
]


def cells(name: str, entry: dict[str, Any]) -> list[str]:
    """A row of the table."""

    def percent(value: float | None, form: str = ".1f", mark: str = "") -> str:
        return "" if value is None else f"{value:{form}}{mark}"

    row = [name, *(percent(entry[part]["right"]) for part in (*HABITS, "all"))]
    versus, crop = entry.get("versus"), entry.get("crop")
    if versus:
        low, high = versus["interval"] or (float("nan"),) * 2
        row.append(f"{versus['difference']:+.1f} ({low:+.1f} to {high:+.1f})")
        row.append("< 0.0001" if versus["holm"] < 1e-4 else f"{versus['holm']:.4f}")
    if crop:
        row += [""] * (6 - len(row))
        share = 100 / entry["all"]["n"]
        row.append(percent(crop["holds"]["n"] * share, mark=" %"))
        row += [percent(crop[part]["right"]) for part in ("holds", "misses")]
        row.append(percent(crop["whole"]["n"] * share, mark=" %"))
        row.append(percent(crop["area"] and 100 * crop["area"], ".0f", " %"))
    return [*row, *[""] * (11 - len(row)), f"{entry['seconds']:.2f}"]


def markdown(report: dict[str, Any]) -> str:
    """The table with what it was measured on."""
    rows = [cells(f"`{name}`", entry) for name, entry in report["figures"].items()]
    about = report["environment"]
    head = (
        f"n = {report['questions']:,} questions about {report['scenes']:,} scenes, the same "
        f"for every method; {report['parts']}."
    )
    end = (
        f"Command: `{report['command']}`. {about['hardware']}, {about['threads']} threads, "
        f"shared with other work, so that seconds are rough; torch {about['torch']}, "
        f"transformers {about['transformers']}."
    )
    return "\n".join([head, "", *grid(HEADS, rows), "", end])


# -- pictures --------------------------------------------------------------------------------------


def examples(
    bench: FinePrint, records: list[EvalRecord], plain: list[EvalRecord]
) -> tuple[list[EvalRecord], list[EvalRecord]]:
    """The first wins (plain wrong, method right) and the first failures, both habits in turn."""
    before = {(r["split"], r["line"]): bench.correct(r) for r in plain}
    ordered = sorted(records, key=lambda r: (r["line"], r["split"]))
    won = [r for r in ordered if bench.correct(r) and not before[r["split"], r["line"]]]
    lost = [r for r in ordered if not bench.correct(r)]
    return won[:EXAMPLES], lost[:EXAMPLES]


def draw(
    vlm: VLM,
    bench: FinePrint,
    name: str,
    records: list[EvalRecord],
    plain: list[EvalRecord],
    path: Path,
) -> Path:
    """Wins on the left, failures on the right: the scene with its frames, what the model saw."""
    from foveate.insight.plots.style import BLUE, GAP, PAD, PAPER, QUIET, RED, Page, bare, wrapped

    side, words, between = 2.0, 0.66, 0.6
    half = 2 * side + GAP
    samples = {(s.split, s.line): s for s in bench.samples()}
    said = {(r["split"], r["line"]): r["answer"] for r in plain}
    wide = 2 * (PAD + half) + between
    notes = (
        "The first five questions of each kind, in the order of the benchmark. Of each, the scene "
        "with the asked thing (orange) and the crop (blue, dashed), and beside it the last picture "
        "that the model was shown before it answered."
    )
    page = Page(wide, wrapped(name, wide, 8.3), EXAMPLES, side + words, notes)
    heads = ("plain is wrong, now it is right", "now it is wrong")
    for column, rows in enumerate(examples(bench, records, plain)):
        left = PAD + column * (half + between)
        page.write(left, page.top(0) - 0.32, heads[column], size=11, weight="bold")
        for number, record in enumerate(rows):
            place, top = (record["split"], record["line"]), page.top(number)
            image = samples[place].load()
            assert image is not None
            chat = vlm.chat([image], samples[place].prompt, None)
            shown = vlm.rewrite([chat], stack(name))[0].images[-1]
            scene, again = (page.axes(left + i * (side + GAP), top, side, side) for i in range(2))
            scene.imshow(image)
            scene.add_patch(_frame(record["meta"]["boxes"][0], ec=RED, lw=2))
            scene.add_patch(_frame(record["notes"]["crop"], ec=PAPER, lw=3.5))
            scene.add_patch(_frame(record["notes"]["crop"], ec=BLUE, lw=2, ls=(0, (4, 2))))
            again.imshow(shown)
            for panel in (scene, again):
                bare(panel)
            answers = f"label {record['label']}, plain {said[place]}, now {record['answer']}"
            page.write(left, top + side + 0.07, record["question"], size=9.5)
            page.write(left, top + side + 0.26, answers, size=9.5, color=QUIET)
    page.write(PAD, page.bottom + 0.1, page.notes, size=8.5, color=QUIET, linespacing=1.35)
    page.figure.savefig(path, facecolor=PAPER)
    return path


def _frame(box: list[int], **style: Any) -> Any:
    from matplotlib.patches import Rectangle

    left, top, right, bottom = box
    return Rectangle((left, top), right - left, bottom - top, fill=False, **style)


# -- the command -----------------------------------------------------------------------------------


def write(folder: Path, mark: str, report: dict[str, Any], table: str) -> None:
    """``mark``.json, and the table between its marks in the folder's README.md."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / f"{mark}.json", report)
    page = folder / "README.md"
    old = page.read_text("utf-8") if page.exists() else ""
    if f"<!-- {mark} -->" not in old:
        old += f"<!-- {mark} -->\n\n<!-- end of {mark} -->\n"
    page.write_text(between(old, mark, table), "utf-8")


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Fine print, asked plainly and by looking again.")
    parser.add_argument("--layers", action="store_true", help="where each layer looks, instead")
    parser.add_argument("--questions", type=int, help="per habit, even; 500, or 60 for --layers")
    parser.add_argument("--tenths", type=int, default=TENTHS, help="only so many of ten parts")
    parser.add_argument("--method", action="append", help="text form; repeatable; also oracle(...)")
    parser.add_argument("--run", type=Path, default=ROOT / "runs" / "crops", help="records")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's")
    parser.add_argument(
        "--out", type=Path, help="folder for tables (README.md, JSON) and pictures; default: none"
    )
    args, console = parser.parse_args(given), Console()
    if not console.is_terminal:
        console = Console(width=200)
    if args.threads:
        torch.set_num_threads(args.threads)
    command = shlex.join(["python", "benchmarks/crops.py", *(given or sys.argv[1:])])
    vlm, scenes = VLM.load("pocket", device="cpu"), str(args.run / "scenes")
    if args.layers:
        bench = FinePrint(questions=args.questions or 60, scenes=scenes, seed=1)
        report = by_layer(vlm, bench, console) | {"seed": bench.seed, "command": command}
        console.print(layer_markdown(report))
        if args.out:
            write(args.out, "layers", report, layer_markdown(report))
        return 0
    try:
        chosen = [stack(m) for m in args.method or METHODS]
        methods = {PLAIN: ()} | {text(s): s for s in chosen}
        bench = FinePrint(questions=args.questions or 500, scenes=scenes)
        run = args.run / f"{bench.questions}-per-habit"
        records, environment = ask(vlm, bench, methods, run, args.tenths, console)
    except FoveateError as error:
        console.print(str(error))
        return 2
    entries = compared(bench, records)
    table = Table(*HEADS, title=f"{len(records[PLAIN]):,} questions")
    for name, entry in entries.items():
        table.add_row(*cells(name, entry))
    console.print(table)
    if args.out is None:
        return 0
    plain = records[PLAIN]
    report = {
        "questions": len(plain),
        "scenes": len({r["image"] for r in plain}),
        "parts": ", ".join(f"{entries[PLAIN][h]['n']} {h} the habit" for h in HABITS),
        "command": command,
        "environment": environment,
        "figures": entries,
    }
    write(args.out, "crops", report, markdown(report))
    for name, rows in records.items():
        if name.isidentifier() and name not in (PLAIN, Oracle.name):
            draw(vlm, bench, name, rows, plain, args.out / f"{name}.png")
    console.print(f"written: {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
