"""What a method costs: plain SDPA, foveate and eager attention, interleaved in one run.

    python benchmarks/speed.py                               # CLVS without and with its stop test
    python benchmarks/speed.py --sizes 0.5b --method clvs --method "clvs(unified_positions=False)"
    python benchmarks/speed.py --sizes pocket,0.5b --method all --out benchmarks/results/methods-cpu
    python benchmarks/speed.py --sizes 0.5b-clip --method "cli(seed=0)"     # CLI, with a real tower
    python benchmarks/speed.py --eval                        # questions per second instead
    python benchmarks/speed.py --look                        # methods that look again (looks.py)

Every repetition measures plain SDPA and one row back to back (A B A B ...), so that whatever else
the machine is doing hits both; what counts is the median of these ratios, with its quartiles. Eager
attention is the row that published implementations of such methods run on.

* prefill: seconds of one forward over the prompt. The random models have a vision tower 32 wide, so
  that the language model is all that is measured; on the pocket model the real tower is included,
  on 0.5b-clip a random CLIP-L/336.
* decode: milliseconds per token of single-token forwards on the filled cache (no tokenizer, no
  sampling; one lookup of the next token).
  On CPUs linear layers of one or two rows are computed as `VLM` does it, plain and with methods
  alike (`few_rows.py`): two streams would otherwise cost what the plain model wastes.
* peak: weights plus the most memory that tensors hold at once during a prefill and two decode
  steps. On CUDA ``max_memory_allocated``. On CPU every allocation and release of PyTorch's
  allocator, as its profiler records them: exact, but without scratch space that BLAS takes for
  itself, equal in all rows. "working" is the part beyond the weights: KV cache and activations.
* stop test: rows that call the output embeddings on earlier layers (CLVS's uncertainty, DoLa) are
  also compared with "one plain token + tested layers x one product with the output embeddings".
* trained: methods with weights of their own (CLI) are measured with fresh ones, which cost what
  trained ones do. They read the vision tower: take a size whose tower is real (0.5b-clip, pocket).
* ``--method all`` is every method that acts in a forward, with its default parameters, but CLVS
  without its stop test, ICD with token ids for its text (there is no tokenizer here), and AD-HH and
  VAR with heads and dimensions named, as random weights have neither heads that were found to
  hallucinate nor sinks: 20 heads over all layers, and sinks at a threshold of 1.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import asks  # beside this file, as are the next three
import looks
import report
import torch
from report import RESULTS, Kind, Say, Table, ratio, spread, timed
from safetensors.torch import save_file
from subjects import SIZES, VLMS, Subject
from torch import Tensor
from torch.nn.functional import linear

import foveate
from foveate import FoveateError, Method
from foveate.backends.transformers.anatomy import anatomy
from foveate.backends.transformers.compat import cache_of, passing
from foveate.backends.transformers.few_rows import fast_rows
from foveate.core.method import methods, parse, text

METHODS = ("clvs(stop_threshold=0)", "clvs")
STAND_INS = {  # of `all`, where defaults need something that random weights do not have
    "adhh": "adhh (20 heads)",
    "cli": "cli(seed=0)",
    "clvs": "clvs(stop_threshold=0.0)",
    "icd": f"icd(prefix={tuple(range(20, 42))}, where='question')",  # as long as the published text
    "vti": "vti (random directions)",
    "var": "var(sink_threshold=1.0, sink_dims=(0, 1))",
}
PLAIN, EAGER = "sdpa", "eager"
STRETCHES = 5  # decode pairs per prefill pair, on the caches that this pair filled
MIB = 2**20


# -- measuring -------------------------------------------------------------------------------------


def stack(model: Any, name: str) -> tuple[Method, ...]:
    """The methods of a row."""
    if name in (PLAIN, EAGER):
        return ()
    if name == STAND_INS["adhh"]:
        config, heads = model.config.text_config, 20
        depth, across = config.num_hidden_layers, config.num_attention_heads
        name = f"adhh(heads={tuple((i * depth // heads, i % across) for i in range(heads))})"
    if name == STAND_INS["vti"]:
        found = anatomy(model)
        file = Path(tempfile.gettempdir(), f"foveate-{os.getpid()}.safetensors")
        save_file({"text": torch.randn(found.depth, found.width)}, file)
        name = f"vti(path={str(file)!r})"
    return parse(name)


@contextlib.contextmanager
def row(model: Any, name: str) -> Iterator[None]:
    """The model as row `name` runs it, with small products as `VLM` computes them, plain or not."""
    with fast_rows(model), _row(model, name):
        yield


@contextlib.contextmanager
def _row(model: Any, name: str) -> Iterator[None]:
    if name == EAGER:
        decoder = model.get_decoder()
        decoder.set_attn_implementation(EAGER)
        try:
            yield
        finally:
            decoder.set_attn_implementation(PLAIN)
    elif name == PLAIN:
        yield
    else:
        with foveate.enhance(model, *stack(model, name)):
            yield


def prefill(model: Any, inputs: dict[str, Tensor]) -> tuple[Any, Tensor]:
    """One forward over the prompt: the cache and the next token (1, 1)."""
    out = model(**inputs, use_cache=True, logits_to_keep=1)
    return cache_of(out), out.logits[:, -1:].argmax(-1)


def decode(model: Any, cache: Any, token: Tensor, steps: int) -> None:
    """`steps` single-token forwards."""
    for _ in range(steps):
        out = model(input_ids=token, **passing(model, cache), use_cache=True)
        token = out.logits[:, -1:].argmax(-1)


def peak(model: Any, call: Callable[[], Any]) -> int:
    """Bytes that tensors hold at most during `call`, beyond those that they held before."""
    if model.device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        call()
    events = profile.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    held = most = 0
    for _, change in sorted(changes, key=lambda c: c[0]):
        held += change
        most = max(most, held)
    return most


def measure(subject: Subject, names: list[str], repetitions: int, tokens: int) -> dict[str, Any]:
    """Samples of every row beside plain SDPA: seconds, seconds per token, bytes."""
    model, inputs = subject.model, subject.inputs
    head = model.get_output_embeddings()
    early = {  # may unembed earlier layers, and not only a second stream's last one
        name
        for name in names
        if name not in STAND_INS.values() and any(m.wants("before") for m in stack(model, name))
    }
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    storages = (p.untyped_storage() for p in model.parameters())
    weights = sum({s.data_ptr(): s.nbytes() for s in storages}.values())
    memory: dict[str, int] = {}
    for name in (PLAIN, *names):  # this is the warm-up, too
        gc.collect()
        with row(model, name):
            memory[name] = peak(model, lambda: decode(model, *prefill(model, inputs), 2))
    rows: dict[str, Any] = {
        name: {"prefill": [], "decode": [], "head": [], "tested": [], "trained": 0}
        for name in names
    }
    hidden = torch.randn(1, 1, head.weight.shape[1], dtype=model.dtype, device=model.device)
    handle = head.register_forward_hook(count)
    try:
        for _ in range(repetitions):
            for name, samples in rows.items():
                pair, states = [], {}
                for each in (PLAIN, name):
                    with row(model, each):
                        seconds, states[each] = timed(model, lambda: prefill(model, inputs))
                    pair.append(seconds)
                samples["prefill"].append(pair)
                for _ in range(STRETCHES):
                    pair = []
                    for each in (PLAIN, name):
                        run = functools.partial(decode, model, *states[each], tokens)
                        with row(model, each):
                            calls = 0
                            pair.append(timed(model, run)[0] / tokens)
                    samples["decode"].append(pair)
                    samples["tested"].append(calls / tokens - 1 if name in early else 0)
                    samples["head"].append(timed(model, lambda: linear(hidden, head.weight))[0])
    finally:
        handle.remove()
    for name, samples in rows.items():
        samples["trained"] = trained(model, stack(model, name))
    return {"weights": weights, "memory": memory, "rows": rows}


def trained(model: Any, methods: tuple[Method, ...]) -> int:
    """Parameters that methods add to the model."""
    plans = [method.resolve(anatomy(model)).setup(anatomy(model)) for method in methods]
    modules = [plan for plan in plans if isinstance(plan, torch.nn.Module)]
    return sum(p.numel() for module in modules for p in module.parameters())


# -- figures ---------------------------------------------------------------------------------------


def figures(measured: dict[str, Any]) -> dict[str, Any]:
    """Medians of the samples, and of the ratios within pairs, per row."""
    out: dict[str, Any] = {}
    memory, rows = measured["memory"], measured["rows"]
    for name, samples in rows.items():
        entry: dict[str, Any] = {}
        for phase in ("prefill", "decode"):
            plain, ours = zip(*samples[phase], strict=True)
            entry[phase] = {
                "plain": statistics.median(plain),
                "own": statistics.median(ours),
                "ratio": spread([b / a for a, b in samples[phase]]),
            }
        for part, more in (("peak", measured["weights"]), ("working", 0)):
            before, now = memory[PLAIN] + more, memory[name] + more
            entry[part] = {"plain": before, "own": now, "ratio": now / before}
        if any(samples["tested"]):
            triples = list(zip(samples["decode"], samples["head"], samples["tested"], strict=True))
            entry["test"] = {
                "layers": statistics.mean(samples["tested"]),
                "product": statistics.median(samples["head"]),
                "share": spread([head / plain for (plain, _), head, _ in triples]),
                "ratio": spread([ours / (plain + n * head) for (plain, ours), head, n in triples]),
            }
        entry["trained"] = samples["trained"]
        if EAGER in rows and name != EAGER:
            pairs = zip(rows[EAGER]["prefill"], samples["prefill"], strict=True)
            entry["faster_than_eager"] = spread([(e / p) / (b / a) for (p, e), (a, b) in pairs])
        out[name] = entry
    return out


COLUMNS = [
    *("", "prefill s", "/ sdpa", "decode ms", "/ sdpa", "peak MiB", "/ sdpa", "working"),
    "prefill: eager /",
]


def tables(sizes: dict[str, Any]) -> Iterator[Table]:
    """A table per size, what training adds, and what the stop tests cost."""
    tests: list[list[str]] = []
    added: list[list[str]] = []
    for size, part in sizes.items():
        entries = part["figures"]
        cells = [[PLAIN, *_cells(next(iter(entries.values())), "plain")]]
        for name, entry in entries.items():
            cells.append([name, *_cells(entry, "own")])
            if entry.get("trained"):
                added.append([size, name, f"{entry['trained'] / 1e6:.2f}"])
            if test := entry.get("test"):
                share, whole = ratio(test["share"]), ratio(test["ratio"])
                product, layers = f"{test['product'] * 1e3:.2f}", f"{test['layers']:.1f}"
                tests.append([size, name, product, share, layers, whole])
        width = len(COLUMNS) if EAGER in entries and len(entries) > 1 else len(COLUMNS) - 1
        yield f"{size}: {part['note']}", COLUMNS[:width], [line[:width] for line in cells]
    if added:
        yield "parameters added by training", ["", "", "million"], added
    if tests:
        columns = ["", "", "product ms", "/ plain token", "tested layers"]
        columns.append("decode / (sdpa + layers x product)")
        yield "stop test: products with the output embeddings", columns, tests


def _cells(entry: dict[str, Any], whose: str) -> list[str]:
    cells = []
    for part, scale, form in (
        ("prefill", 1, ".3f"),
        ("decode", 1e3, ".2f"),
        ("peak", 1 / MIB, ",.1f"),
    ):
        against = 1.0 if whose == "plain" else entry[part]["ratio"]
        cells.append(format(entry[part][whose] * scale, form))
        cells.append(f"{against:.3f}" if isinstance(against, float) else ratio(against))
    cells.append(f"{entry['working'][whose] / MIB:,.1f}")
    gain = entry.get("faster_than_eager") if whose == "own" else None
    return [*cells, ratio(gain) if gain else ""]


# -- the command -----------------------------------------------------------------------------------

ABOUT = "Ratios are medians over pairs measured back to back, with quartiles.\n\n"
KINDS = {
    kind.name: kind
    for kind in (
        Kind("forwards", ABOUT + str(__doc__)[str(__doc__).index("* prefill") :], tables),
        asks.KIND,
        looks.KIND,
    )
}


def arguments(given: list[str] | None) -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description="Plain SDPA, foveate and eager, in one run.")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--eval", action="store_true", help="questions per second, shared prefix")
    kind.add_argument("--look", action="store_true", help="seconds of methods that look again")
    parser.add_argument(
        "--sizes", help=f"of {', '.join(SIZES)}; with --eval or --look of {', '.join(VLMS)}"
    )
    parser.add_argument("--method", action="append", help="text form of a method; repeatable")
    parser.add_argument("--repetitions", type=int, default=5, help="prefill pairs per row")
    parser.add_argument("--tokens", type=int, default=4, help="decoded tokens per measurement")
    args = report.parsed(parser, given)
    if args.eval or args.look:
        part, name, known = (asks, "eval", list(VLMS)) if args.eval else (looks, "look", list(VLMS))
        args.kind, usual, sizes = part.KIND, part.METHODS, known
    else:
        args.kind, usual, name, known = KINDS["forwards"], METHODS, "speed", list(SIZES)
        sizes = ["pocket", "0.5b", "0.5b-32k", "next", *["7b"] * cuda]
    args.sizes = args.sizes.split(",") if args.sizes else sizes
    for size in args.sizes:
        if size not in known:
            parser.error(f"there is no size {size!r}; there are {', '.join(known)}")
    if args.repetitions < 1 or args.tokens < 1:
        parser.error("--repetitions and --tokens must be 1 or more")
    try:
        chosen = [row for method in args.method or usual for row in _rows(method)]
    except FoveateError as error:
        parser.error(str(error))
    args.method = list(dict.fromkeys(chosen))
    args.out = args.out or RESULTS / f"{name}-{args.device.type}"
    return args


def _rows(method: str) -> list[str]:
    if method != "all":
        return [text(parse(method))]
    known = [
        name
        for name, cls in methods().items()
        if not (cls(**cls.example).wants("rewrite") or "search" in cls.stages)
    ]
    return [STAND_INS.get(name, name) for name in known]


def measured(args: argparse.Namespace, size: str, say: Say) -> dict[str, Any]:
    """What a model of this size costs, for the report."""
    if args.kind.name == "forwards":
        subject = SIZES[size](args.device, args.dtype)
        say(f"{size}: {subject.note} ...")
        rows = [*(name for name in args.method if name != "vanilla"), EAGER]
        with torch.no_grad():
            samples = measure(subject, rows, args.repetitions, args.tokens)
        return {"note": subject.note, "figures": figures(samples), "samples": samples}
    vlm = VLMS[size](args.device, args.dtype)
    depth = vlm.model.get_decoder().config.num_hidden_layers
    tower = vlm.model.config.vision_config.num_hidden_layers
    note = f"{report.size_of(vlm.model)}, {depth} layers behind a tower of {tower}"
    note += f", {report.dtype_of(vlm.model)}"
    say(f"{size}: {note} ...")
    part = asks if args.kind is asks.KIND else looks
    samples = part.measure(vlm, args.method, args.repetitions)
    return {"note": note, "figures": part.figures(samples), "samples": samples}


def main(given: list[str] | None = None) -> int:
    args = arguments(given)
    known = functools.partial(measured, args)
    return report.run(args.kind, args.sizes, known, args.device, args.out)


if __name__ == "__main__":
    sys.exit(main())
