"""What `gpu.sh` runs on one GPU: is foveate right in half precision, and what does it cost?

    benchmarks/gpu.sh
    benchmarks/gpu.sh --tiny --device cpu           # to try it out

Models have random weights made on the device: a LLaVA-1.5 and a Qwen2.5-VL of 7B. Every part is a
process with a time limit of its own; all limits together are eight minutes. A part that fails, or
takes longer, leaves a sentence and the others their tables. The files are written after each part.

* right: four layers as wide as the whole model. The log-probabilities of the prompt's last row and
  of four tokens after it, in bfloat16 against float32 with the same weights (without TF32), with
  each attention kernel. "of plain" is a method's difference over the plain model's own: about 1
  where a method adds no error. "acts" is what the method changes in float32.
* speed: as `speed.py` measures it: prefill, decode, peak memory and the stop test, over plain SDPA.
* graphs: tokens of `generate` with a static cache, compiled with CUDA graphs.
* throughput: tokens per second of all requests together, with the most memory that was held.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import functools
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import report  # beside this file, as are the next two
import speed
import torch
from report import RESULTS, Table, spread, timed
from subjects import LLAMA, QWEN_VL, SIZES, Subject, llava, qwen_vl
from torch import Tensor
from transformers.utils import is_flash_attn_2_available

METHODS = (
    "clvs(stop_threshold=0)",
    "clvs",
    "pai(gamma=1)",
    "vaf",
    "tarac",
    "devils",
    "scalingvis(weight=0.5)",
    "spin",
)
FEW = METHODS[:3]
STEPS = 4  # tokens after the prompt whose log-probabilities are compared
Found = tuple[list[Table], Any]  # tables, and the samples behind them


def subject(args: argparse.Namespace, family: str, layers: int | None = None) -> Subject:
    """A model of 7B, or its first layers."""
    if args.tiny:
        return SIZES[{"llava": "tiny", "qwen": "qwen-tiny"}[family]](args.device, args.dtype)
    make, shape = {"llava": (llava, LLAMA), "qwen": (qwen_vl, QWEN_VL)}[family]
    if layers:
        shape = shape | {"num_hidden_layers": layers}
    return make(shape, args.device, args.dtype)


# -- the parts -------------------------------------------------------------------------------------


def right(args: argparse.Namespace, family: str) -> Found:
    """Half precision against float32."""
    half = subject(args, family, layers=4)
    exact = copy.deepcopy(half.model).float()
    pixels = {"pixel_values": half.inputs["pixel_values"].float()}
    reference = {name: rows(exact, half.inputs | pixels, name) for name in (speed.PLAIN, *METHODS)}
    acts = {name: apart(reference[name], reference[speed.PLAIN]) for name in METHODS}
    kernels = ["sdpa", *["flash_attention_2"] * (args.flash and is_flash_attn_2_available())]
    cells, samples = [], {}
    for kernel in kernels:
        half.model.get_decoder().set_attn_implementation(kernel)
        plain = 0.0
        for name, wanted in reference.items():
            error = apart(rows(half.model, half.inputs, name), wanted)
            plain = plain or max(error, 1e-9)
            samples[f"{kernel} {name}"] = error
            changed = f"{acts[name]:.3f}" if name in acts else ""
            cells.append([kernel, name, f"{error:.2e}", f"{error / plain:.2f}", changed])
    title = f"right, {family}: worst difference of a log-probability, {half.note}"
    return [(title, ["", "", "to float32", "of plain", "acts"], cells)], samples


@torch.no_grad()
def rows(model: Any, inputs: dict[str, Tensor], name: str) -> Tensor:
    """(STEPS + 1, V) log-probabilities of the same tokens, whatever the model writes."""
    with speed.row(model, name):
        out = model(**inputs, use_cache=True, logits_to_keep=1)
        found = [out.logits[:, -1]]
        for step in range(STEPS):
            token = torch.full_like(inputs["input_ids"][:, :1], 10 + step)
            given = speed.passing(model, speed.cache_of(out))
            out = model(input_ids=token, **given, use_cache=True)
            found.append(out.logits[:, -1])
    return torch.cat(found).float().log_softmax(-1)


def apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


@torch.no_grad()
def costs(args: argparse.Namespace, family: str) -> Found:
    """Prefill, decode, peak memory and the stop test."""
    given = subject(args, family)
    samples = speed.measure(given, list(FEW), args.repetitions, args.tokens)
    part = {"note": given.note, "figures": speed.figures(samples)}
    return list(speed.tables({f"speed, {family}": part})), samples


@torch.no_grad()
def graphs(args: argparse.Namespace) -> Found:
    """Decoding in CUDA graphs."""
    given = subject(args, "llava")
    model = given.model
    model.generation_config.eos_token_id = None

    def answer(tokens: int) -> None:
        model.generate(
            **given.inputs,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            cache_implementation="static",
        )

    def token() -> float:
        few, many = 4, 4 + 4 * args.tokens
        return sum(
            sign * timed(model, functools.partial(answer, count))[0] / (many - few)
            for sign, count in ((-1, few), (1, many))
        )

    samples: dict[str, list[float]] = {}
    for name in (speed.PLAIN, *FEW):
        torch._dynamo.reset()
        with speed.row(model, name):
            answer(4 + 4 * args.tokens)  # compiles
            samples[name] = [token() for _ in range(args.repetitions)]
    plain = statistics.median(samples[speed.PLAIN])
    cells = []
    for name, seconds in samples.items():
        own = statistics.median(seconds)
        cells.append([name, f"{own * 1e3:.2f}", f"{own / plain:.3f}"])
    how = "CUDA graphs" if model.device.type == "cuda" else "no graphs, as this is no GPU"
    title = f"graphs: {how}, static cache, {given.note}"
    return [(title, ["", "token ms", "/ sdpa"], cells)], samples


@torch.no_grad()
def throughput(args: argparse.Namespace) -> Found:
    """Many requests at once."""
    given = subject(args, "llava")
    model, cells, samples = given.model, [], {}
    for count in args.requests:
        inputs = {key: x.repeat(count, *[1] * (x.dim() - 1)) for key, x in given.inputs.items()}
        for name in FEW:
            pairs = []
            try:
                for _ in range(args.repetitions):
                    pair = []
                    for each in (speed.PLAIN, name):
                        with speed.row(model, each):
                            cache, token = speed.prefill(model, inputs)
                            run = functools.partial(speed.decode, model, cache, token, args.tokens)
                            pair.append(timed(model, run)[0] / args.tokens)
                            del cache, run
                    pairs.append(pair)
            except torch.cuda.OutOfMemoryError:
                cells.append([str(count), name, "out of memory", ""])
                torch.cuda.empty_cache()
                continue
            samples[f"{count} {name}"] = pairs
            plain, own = (statistics.median(column) for column in zip(*pairs, strict=True))
            each = report.ratio(spread([b / a for a, b in pairs]))
            cells.append([str(count), name, f"{count / plain:,.1f}", f"{count / own:,.1f}", each])
    columns = ["requests", "", "sdpa, tokens/s", "tokens/s", "time over sdpa"]
    lines = [line + [""] * (len(columns) - len(line)) for line in cells]
    return [(f"throughput of decoding, {given.note}", columns, lines)], samples


def inside_vllm(args: argparse.Namespace) -> Found:
    """Methods inside vLLM: nothing is measured here yet."""
    if importlib.util.find_spec("vllm") is None:
        said = "vLLM is not installed here, so nothing was measured."
    else:
        said = "Nothing was measured: pytest tests/vllm/test_equality.py asks vLLM on this device."
    return [("vLLM", ["what was found"], [[said]])], said


PARTS: dict[str, tuple[int, Callable[[argparse.Namespace], Found]]] = {  # seconds, what it does
    "right-llava": (55, functools.partial(right, family="llava")),
    "right-qwen": (55, functools.partial(right, family="qwen")),
    "speed-llava": (80, functools.partial(costs, family="llava")),
    "speed-qwen": (80, functools.partial(costs, family="qwen")),
    "throughput": (75, throughput),
    "graphs": (115, graphs),
    "vllm": (20, inside_vllm),
}


# -- the command -----------------------------------------------------------------------------------


def arguments(given: list[str] | None) -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description="foveate on one GPU, within eight minutes.")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--tiny", action="store_true", help="tiny models, to try it out")
    parser.add_argument("--device", type=torch.device, default="cuda" if cuda else "cpu")
    parser.add_argument("--repetitions", type=int, default=2, help="pairs of every row")
    parser.add_argument("--tokens", type=int, default=8, help="per measurement")
    parser.add_argument(
        "--slower", type=float, default=1.0, help="what the limits are multiplied with"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu", help="without extension")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)  # this process is one
    args = parser.parse_args(given)
    args.parts = args.parts.split(",")
    for name in args.parts:
        if name not in PARTS:
            parser.error(f"there is no part {name!r}; there are {', '.join(PARTS)}")
    if args.repetitions < 1 or args.tokens < 1:
        parser.error("--repetitions and --tokens must be 1 or more")
    if args.device.type == "cpu" and not args.tiny:
        parser.error("there is no GPU here: try it out with --tiny --device cpu")
    args.dtype, args.flash = torch.bfloat16, args.device.type == "cuda"
    args.requests = (1, 3) if args.tiny else (1, 16, 128)
    return args


def one(args: argparse.Namespace) -> int:
    """This process is a part: what it found goes to `args.out`."""
    tables, samples = PARTS[args.part][1](args)
    args.out.write_text(json.dumps({"tables": tables, "samples": samples}))
    return 0


def run(args: argparse.Namespace, given: list[str], name: str) -> dict[str, Any]:
    """A part in a process of its own: its tables, or what went wrong."""
    limit = PARTS[name][0] * args.slower
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "found.json")
        command = [sys.executable, __file__, *given, "--part", name, "--out", str(file)]
        try:
            done = subprocess.run(command, timeout=limit, capture_output=True, text=True)
        except subprocess.TimeoutExpired:
            return {"failed": f"It took longer than {limit:.0f} s."}
        if done.returncode == 0 and file.exists():
            return json.loads(file.read_text())
        said = [line for line in done.stderr.splitlines() if line.strip()] or ["It said nothing."]
        return {"failed": said[-1], "said": done.stderr[-4000:]}


def tables(parts: dict[str, Any]) -> Iterator[Table]:
    """What the parts found, and which of them failed."""
    for part in parts.values():
        yield from part.get("tables", ())
    failed = [[name, part["failed"]] for name, part in parts.items() if "failed" in part]
    if failed:
        yield "what failed", ["part", "why"], failed


KIND = report.Kind("gpu", str(__doc__)[str(__doc__).index("Models have") :], tables)


def main(given: list[str] | None = None) -> int:
    args = arguments(given)
    if args.part:
        return one(args)
    given = sys.argv[1:] if given is None else given
    started = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    found: dict[str, Any] = {"kind": KIND.name, "about": {}, "sizes": {}}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for name in args.parts:
        print(f"{name} ...", flush=True)
        found["sizes"][name] = run(args, given, name)
        found["about"] = report.environment(args.device, started)
        args.out.with_name(args.out.name + ".json").write_text(json.dumps(found, indent=1) + "\n")
        text = report.markdown(found, KIND)
        args.out.with_name(args.out.name + ".md").write_text(text + "\n")
    print(text)
    return int(any("failed" in part for part in found["sizes"].values()))


if __name__ == "__main__":
    sys.exit(main())
