"""What a method costs inside vLLM: CPU time of prompts and of tokens, over the plain model's.

    python benchmarks/vllm_speed.py                                  # in the environment of vLLM
    python benchmarks/vllm_speed.py --sizes pocket --method clvs --pairs 3

(The file is not called ``vllm.py``: it would hide the package of that name.)

One vLLM per size, on CPUs, with all requests in one batch. Every pair answers the same requests
plainly and with a method, back to back, after a run to warm up. What counts is the CPU time of the
process, all threads together, and the median of the ratios with its quartiles.

* prefill: the steps of the engine until every request has its first token, pictures included, with
  an empty prefix cache; of `prompts` requests at once.
* decode: the steps after that, each of which writes a token of every request. Their prompts come
  from the prefix cache.
* half: every second request asks for the first method, the others are plain beside it. Where they
  cost what they cost among themselves, the ratio lies half way between 1 and the method's own.
* plain requests: the same in two processes side by side, one with the plug-in and one with
  ``FOVEATE_VLLM=off``. The vLLM of the other rows is the first of the two.
* pocket: the shipped model, every request about a picture of its own. 0.5b: a random LLaVA with a
  language model of that size and 576 visual tokens behind a tiny tower; the same, and 0.5b-shared
  with all requests about one picture. AD-HH cuts 20 heads over all layers, as random weights have
  none that were found.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))  # where tests/ lies

import report  # beside this file
import torch
from report import RESULTS, Kind, Say, Table, ratio, spread

from foveate import FoveateError
from foveate.core.method import parse
from tests.vllm.answers import pocket

METHODS = (
    "clvs(stop_threshold=0)",
    "clvs",
    "pai(gamma=1)",
    "vaf",
    "tarac",
    "devils",
    "scalingvis",
    "spin",
    "adhh",
)
HEADS = 20  # that adhh cuts
OFF = "plain, plug-in loaded / off"  # the row of plain requests
HALF = "half plain, half "  # the row of two kinds in one batch, with a method


@dataclass(frozen=True)
class Size:
    """A model, and how it is asked.

    Attributes:
        make: writes it into a folder. side: of a picture in pixels.
        requests: at once. tokens: of an answer. prompts: requests whose prefill is measured.
        pictures: how many different ones the requests are about.
    """

    make: Callable[[Path], Path]
    side: int
    requests: int
    tokens: int
    prompts: int
    pictures: int


def half_b(folder: Path) -> Path:
    """A LLaVA with a language model of 0.5B and the pocket model's words; vLLM draws weights."""
    from subjects import QWEN, TOWER
    from transformers import LlavaConfig

    pocket(folder)
    (folder / "model.safetensors").unlink()
    processor = folder / "processor_config.json"
    processor.write_text(processor.read_text().replace(": 96", ": 192"))
    tower = {"hidden_size": 64, "num_attention_heads": 2, "image_size": 192, "patch_size": 8}
    text = {"model_type": "llama", "head_dim": 64, "vocab_size": 32_064, "bos_token_id": 2}
    config = LlavaConfig(
        architectures=["LlavaForConditionalGeneration"],
        text_config=QWEN | text | {"eos_token_id": 3, "pad_token_id": 0},
        vision_config=TOWER | tower,
        image_token_index=4,
        image_seq_length=576,
        vision_feature_layer=-1,
        tie_word_embeddings=True,
    )
    config.save_pretrained(folder)
    return folder


SIZES = {
    "pocket": Size(pocket, 96, 16, 24, 16, 16),
    "0.5b": Size(half_b, 192, 8, 12, 1, 8),
    "0.5b-shared": Size(half_b, 192, 8, 12, 1, 1),
}


# -- a vLLM in a process of its own ----------------------------------------------------------------


def engine(pipe: Any, folder: Path, size: Size) -> None:
    """Answers (method, every, requests, tokens) with CPU seconds of prefill and decode step.

    One of `every` requests asks for the method. Tokens are 1 for the prefill alone, from an empty
    prefix cache. None ends it.
    """
    from vllm import LLM, SamplingParams
    from vllm.exceptions import VLLMValidationError

    from foveate.scenes import world

    llm = LLM(
        str(folder),
        load_format="auto" if list(folder.glob("*.safetensors")) else "dummy",
        dtype="float32",
        enforce_eager=True,
        max_model_len=1024,
        max_num_seqs=size.requests,
        max_num_batched_tokens=1024 * size.requests,
        kv_cache_memory_bytes=2**30,
        limit_mm_per_prompt={"image": 1},
    )
    pictures = [world.draw(world.sample(n), size.side) for n in range(size.pictures)]
    question = "USER: <image>\nIs there a red car in the image, or a blue one? ASSISTANT:"
    inside = llm.llm_engine
    made = 0

    def how(method: str, tokens: int) -> SamplingParams:
        asked = None
        if method:
            asked = {"foveate": named(method, inside.model_config.hf_config.text_config)}
        return SamplingParams(
            temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False, extra_args=asked
        )

    def answer(method: str, every: int, requests: int, tokens: int) -> tuple[float, float]:
        nonlocal made
        if tokens == 1:
            llm.reset_prefix_cache()
        for n in range(requests):
            made += 1
            picture = pictures[n % len(pictures)]
            prompt = {"prompt": question, "multi_modal_data": {"image": picture}}
            asks = method if n % every == 0 else ""
            inside.add_request(str(made), prompt, how(asks, tokens))
        prefill, decode, waiting = 0.0, 0.0, requests
        while inside.has_unfinished_requests():
            start = time.process_time()
            out = inside.step()
            spent = time.process_time() - start
            if waiting:
                prefill += spent
                waiting -= sum(len(one.outputs[0].token_ids) == 1 for one in out)
            else:
                decode += spent
        return prefill, decode / max(tokens - 1, 1)

    pipe.send(torch.get_num_threads())
    for given in iter(pipe.recv, None):
        try:
            pipe.send(answer(*given))
        except (ValueError, VLLMValidationError) as error:  # what vLLM refuses
            pipe.send(str(error))


def named(method: str, config: Any) -> str:
    """The text of a method; adhh's heads are named."""
    if method != "adhh":
        return method
    depth, across = config.num_hidden_layers, config.num_attention_heads
    return f"adhh(heads={tuple((i * depth // HEADS, i % across) for i in range(HEADS))})"


class Engine:
    """The other end of `engine`."""

    def __init__(self, folder: Path, size: Size, plug_in: bool) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        given = theirs, folder, size
        self.process = context.Process(target=engine, args=given, daemon=False)
        environment = {
            "FOVEATE_VLLM": "on" if plug_in else "off",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the model runs where the time is read
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "VLLM_LOGGING_LEVEL": "ERROR",
        }
        before = os.environ | {}
        os.environ |= environment
        try:
            self.process.start()
        finally:
            os.environ.clear()
            os.environ |= before
        theirs.close()
        self.threads = self.receive()

    def receive(self) -> Any:
        try:
            found = self.pipe.recv()
        except EOFError:
            raise FoveateError("vLLM stopped; what it said stands above.") from None
        if isinstance(found, str):
            raise FoveateError(found)
        return found

    def __call__(self, method: str, every: int, requests: int, tokens: int) -> tuple[float, float]:
        self.pipe.send((method, every, requests, tokens))
        return self.receive()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.pipe.send(None)
        self.process.join(60)
        if self.process.is_alive():
            self.process.kill()


# -- measuring -------------------------------------------------------------------------------------


def measure(
    folder: Path, size: Size, methods: list[str], pairs: dict[str, int], tokens: int, say: Say
) -> dict[str, Any]:
    """Per row and phase, pairs of CPU seconds: plain, and the row's."""
    on = Engine(folder, size, plug_in=True)
    rows: dict[str, Any] = {}
    try:
        for method in methods:
            rows[method] = paired((on, "", 1), (on, method, 1), size, pairs, tokens)
            say(f"  {method}: {_middle(rows[method])}")
        half, decodes = HALF + methods[0], {"decode": pairs["decode"]}
        rows[half] = paired((on, "", 1), (on, methods[0], 2), size, decodes, tokens)
        say(f"  {half}: {_middle(rows[half])}")
        off = Engine(folder, size, plug_in=False)
        try:
            rows[OFF] = paired((off, "", 1), (on, "", 1), size, pairs, tokens)
        finally:
            off.close()
        say(f"  {OFF}: {_middle(rows[OFF])}")
    finally:
        on.close()
    return {"threads": on.threads, "rows": rows}


def paired(
    plain: tuple[Engine, str, int],
    own: tuple[Engine, str, int],
    size: Size,
    pairs: dict[str, int],
    tokens: int,
) -> dict[str, list[tuple[float, float]]]:
    """Of each phase so many pairs of the two, in turn one or the other first."""
    out: dict[str, list[tuple[float, float]]] = {phase: [] for phase, n in pairs.items() if n}
    for phase, requests, count in (
        ("prefill", size.prompts, 1),
        ("decode", size.requests, tokens),  # the prompts stay in the cache from pair to pair
    ):
        if phase not in out:
            continue
        for run, *asked in (plain, own):
            run(*asked, requests, min(count, 3))
        for n in range(pairs[phase]):
            order = (plain, own) if n % 2 else (own, plain)
            spent = {who: who[0](*who[1:], requests, count)[phase == "decode"] for who in order}
            out[phase].append((spent[plain], spent[own]))
    return out


def _middle(phases: dict[str, Any]) -> str:
    return ", ".join(
        f"{phase} {statistics.median(own / plain for plain, own in pairs):.2f}"
        for phase, pairs in phases.items()
    )


def figures(rows: dict[str, Any]) -> dict[str, Any]:
    """Medians, and of the ratios within pairs, per row."""
    return {
        name: {
            phase: {
                "plain": statistics.median(plain for plain, _ in pairs),
                "own": statistics.median(own for _, own in pairs),
                "ratio": spread([own / plain for plain, own in pairs]),
            }
            for phase, pairs in phases.items()
        }
        for name, phases in rows.items()
    }


COLUMNS = ["", "prefill, CPU s", "/ plain", "decode step, CPU ms", "/ plain"]


def tables(sizes: dict[str, Any]) -> Iterator[Table]:
    """A table per size."""
    for size, part in sizes.items():
        cells = []
        for name, entry in part["figures"].items():
            line = [name]
            for phase, scale, form in (("prefill", 1, ".3f"), ("decode", 1e3, ".2f")):
                if phase not in entry:
                    line += ["", ""]
                    continue
                line.append(format(entry[phase]["own"] * scale, form))
                line.append(ratio(entry[phase]["ratio"]))
            cells.append(line)
        yield f"{size}: {part['note']}", COLUMNS, cells


ABOUT = str(__doc__)[str(__doc__).index("One vLLM") :]
KIND = Kind("vllm", ABOUT, tables)


# -- the command -----------------------------------------------------------------------------------


def arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Methods inside vLLM, beside the plain model.")
    parser.add_argument("--sizes", default=",".join(SIZES), help=f"of {', '.join(SIZES)}")
    parser.add_argument("--method", action="append", help="text form of a method; repeatable")
    parser.add_argument("--pairs", type=int, default=7, help="of answers, per method")
    parser.add_argument("--prefills", type=int, default=3, help="pairs of prefills; 0 for none")
    parser.add_argument("--tokens", type=int, help="of an answer, 2 or more; default by size")
    parser.add_argument(
        "--out", type=Path, default=RESULTS / "vllm-cpu", help="of the results, without extension"
    )
    args = parser.parse_args(given)
    args.sizes, args.method = args.sizes.split(","), args.method or list(METHODS)
    for name in args.sizes:
        if name not in SIZES:
            parser.error(f"there is no size {name!r}; there are {', '.join(SIZES)}")
    if args.prefills < 0 or args.pairs < 1 or (args.tokens is not None and args.tokens < 2):
        parser.error("--pairs must be 1 or more, --prefills 0 or more, and --tokens 2 or more")
    for method in args.method:
        try:
            parse(method)
        except FoveateError as error:
            parser.error(str(error))
    return args


def measured(args: argparse.Namespace, name: str, say: Say) -> dict[str, Any]:
    """The rows of a size, for the report."""
    from importlib.metadata import version

    size = SIZES[name]
    tokens = args.tokens or size.tokens
    folder = Path(tempfile.mkdtemp(prefix="foveate-vllm-"))
    try:
        size.make(folder)
        say(f"{name}: {size.requests} requests of {tokens} tokens ...")
        pairs = {"prefill": args.prefills, "decode": args.pairs}
        found = measure(folder, size, args.method, pairs, tokens, say)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    note = f"{size.requests} requests at once, {tokens} tokens each, float32, "
    note += f"{found['threads']} thread(s), vllm-cpu {version('vllm-cpu')}"
    return {"note": note, "figures": figures(found["rows"]), "samples": found["rows"]}


def main(given: list[str] | None = None) -> int:
    args = arguments(given)
    known = functools.partial(measured, args)
    return report.run(KIND, args.sizes, known, torch.device("cpu"), args.out)


if __name__ == "__main__":
    sys.exit(main())
