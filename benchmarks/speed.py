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
* peak: weights plus the most memory that tensors hold at once during a prefill and two decode
  steps. On CUDA ``max_memory_allocated``. On CPU every allocation and release of PyTorch's
  allocator, as its profiler records them: exact, but without scratch space that BLAS takes for
  itself, equal in all rows. "working" is the part beyond the weights: KV cache and activations.
* stop test: rows that call the output embeddings on earlier layers (CLVS's uncertainty, DoLa) are
  also compared with "one plain token + tested layers x one product with the output embeddings".
* trained: methods with weights of their own (CLI) are measured with fresh ones, which cost what
  trained ones do. They read the vision tower: take a size whose tower is real (0.5b-clip, pocket).
* ``--method all`` is every method with its default parameters, but CLVS without its stop test, and
  AD-HH and VAR with heads and dimensions named, as random weights have neither heads that were
  found to hallucinate nor sinks: 20 heads over all layers, and sinks at a threshold of 1.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import looks  # beside this file
import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import linear
from transformers.initialization import no_init_weights

import foveate
from foveate import VLM, FoveateError
from foveate.backends.transformers.anatomy import anatomy
from foveate.backends.transformers.compat import cache_of, passing
from foveate.core.method import methods, parse, text
from foveate.evaluation.run import hardware
from foveate.vlm.prefix import ask_together, prepare

METHODS = ("clvs(stop_threshold=0)", "clvs")
STAND_INS = {  # of `all`, where defaults need something that random weights do not have
    "adhh": "adhh (20 heads)",
    "cli": "cli(seed=0)",
    "clvs": "clvs(stop_threshold=0.0)",
    "var": "var(sink_threshold=1.0, sink_dims=(0, 1))",
}
PLAIN, EAGER = "sdpa", "eager"
STRETCHES = 5  # decode pairs per prefill pair, on the caches that this pair filled
MIB = 2**20


# -- models ----------------------------------------------------------------------------------------


@dataclass
class Subject:
    """A model with one prompt, and what to know about them."""

    model: Any
    inputs: dict[str, Tensor]
    note: str


QWEN = {
    "model_type": "qwen2",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 152_000,
    "tie_word_embeddings": True,
}
LLAMA = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32_064,
}
CLIP_L = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
TINY = QWEN | {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "vocab_size": 500,
}


def llava(
    text_config: dict[str, Any],
    device: torch.device,
    dtype: torch.dtype,
    side: int = 24,
    tower: dict[str, Any] | None = None,
) -> Subject:
    """A random LLaVA-1.5 shape: side x side visual tokens and 64 of text."""
    tower = tower or _tower(side)
    config = transformers.LlavaConfig(
        text_config=text_config,
        vision_config=tower,
        image_token_index=3,
        image_seq_length=side**2,
        vision_feature_layer=-1 if tower["num_hidden_layers"] == 1 else -2,
    )
    model = _random(config, device, dtype)
    pixels = torch.randn(1, 3, tower["image_size"], tower["image_size"])
    return _prompt(model, {"pixel_values": pixels.to(device, dtype)}, side**2 + 64)


def llava_next(
    text_config: dict[str, Any], device: torch.device, dtype: torch.dtype, length: int = 2900
) -> Subject:
    """A random LLaVA-NeXT shape: a whole picture and its 2 x 2 tiles, `length` tokens in all."""
    tower = _tower(24)
    size = tower["image_size"]
    config = transformers.LlavaNextConfig(
        text_config=text_config,
        vision_config=tower,
        image_token_index=3,
        image_grid_pinpoints=[[2 * size, 2 * size]],
        vision_feature_layer=-1,
    )
    model = _random(config, device, dtype)
    picture = {
        "pixel_values": torch.randn(1, 5, 3, size, size).to(device, dtype),
        "image_sizes": torch.tensor([[2 * size - 8, 2 * size]], device=device),
    }
    return _prompt(model, picture, length)


def pocket(device: torch.device, dtype: torch.dtype) -> Subject:
    """The shipped model, on a drawn scene and a question."""
    from foveate.pocket.build import WEIGHTS, load_pocket
    from foveate.scenes import world

    if not list(WEIGHTS.glob("*.safetensors")):
        raise FileNotFoundError("the pocket model's weights are not there (foveate train pocket)")
    model, processor = load_pocket()
    content = [{"type": "image"}, {"type": "text", "text": "Is there a car in the image?"}]
    chat = [{"role": "user", "content": content}]
    prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
    picture = world.draw(world.sample(0))
    inputs = dict(processor(images=[picture], text=[prompt], return_tensors="pt").to(device))
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    return Subject(model.to(device, dtype), inputs, _note(model, inputs))


SIZES: dict[str, Callable[[torch.device, torch.dtype], Subject]] = {
    "pocket": pocket,
    "0.5b": lambda device, dtype: llava(QWEN, device, dtype),
    "0.5b-clip": lambda device, dtype: llava(QWEN, device, dtype, tower=CLIP_L),
    "0.5b-32k": lambda device, dtype: llava(QWEN | {"vocab_size": 32_064}, device, dtype),
    "next": lambda device, dtype: llava_next(QWEN, device, dtype),
    "7b": lambda device, dtype: llava(LLAMA, device, dtype),
    "tiny": lambda device, dtype: llava(TINY, device, dtype, side=6),  # to try the script out
}


def _tower(side: int) -> dict[str, Any]:
    return {
        "model_type": "clip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "image_size": 4 * side,
        "patch_size": 4,
    }


def _random(config: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """A model of this configuration with unit-variance random maps, filled in seconds."""
    torch.manual_seed(0)
    with no_init_weights(), device:
        kind = transformers.AutoModelForImageTextToText
        model = kind.from_config(config, dtype=dtype, attn_implementation=PLAIN)
    model.tie_weights()
    for p in model.parameters():
        if p.dim() < 2:
            p.data.fill_(1.0)  # gains; where it is a bias, one that changes nothing of the cost
        else:
            width = (3 / p[0].numel()) ** 0.5
            p.data.uniform_(-width, width)
    return model.eval()


def _prompt(model: Any, picture: dict[str, Tensor], length: int) -> Subject:
    """BOS and system text, the picture, a question: `length` tokens."""
    with torch.no_grad():
        features = model.model.get_image_features(**picture, return_dict=True).pooler_output
    visual = sum(f.shape[:-1].numel() for f in features)
    ids = torch.randint(10, 400, (1, length), device=model.device)
    start = min(35, length - visual - 1)
    ids[:, start : start + visual] = model.config.image_token_id
    inputs = {"input_ids": ids, **picture}
    return Subject(model, inputs, _note(model, inputs))


def _note(model: Any, inputs: dict[str, Tensor]) -> str:
    ids, config = inputs["input_ids"], model.get_decoder().config
    visual = int((ids == model.config.image_token_id).sum())
    return (
        f"{model.num_parameters() / 1e6:,.0f} M parameters, {config.num_hidden_layers} layers, "
        f"vocabulary {config.vocab_size:,}, prompt of {ids.shape[1]:,} tokens, {visual:,} visual, "
        f"{str(model.dtype).removeprefix('torch.')}"
    )


# -- measuring -------------------------------------------------------------------------------------


@contextlib.contextmanager
def row(model: Any, name: str) -> Iterator[None]:
    """The model as row `name` runs it."""
    if name == "adhh (20 heads)":
        depth, heads = model.config.text_config.num_hidden_layers, 20
        across = model.config.text_config.num_attention_heads
        pairs = tuple((i * depth // heads, i % across) for i in range(heads))
        name = f"adhh(heads={pairs})"
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
        with foveate.enhance(model, name):
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


def timed(model: Any, call: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of a call, and what it returned."""
    wait = torch.cuda.synchronize if model.device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    result = call()
    wait()
    return time.perf_counter() - start, result


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
    calls = 0
    early = {name for name in names if name not in (EAGER, *STAND_INS.values()) and _early(name)}

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    def trial() -> None:
        decode(model, *prefill(model, inputs), 2)

    stored = {
        p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()
    }
    memory: dict[str, int] = {}
    for name in (PLAIN, *names):  # this is the warm-up, too
        gc.collect()
        with row(model, name):
            memory[name] = peak(model, trial)
    rows: dict[str, Any] = {
        name: {"prefill": [], "decode": [], "head": [], "tested": []} for name in names
    }
    hidden = torch.randn(1, 1, head.weight.shape[1], dtype=model.dtype, device=model.device)
    handle = head.register_forward_hook(count)
    try:
        for _ in range(repetitions):
            for name in names:
                pair, states = [], {}
                for each in (PLAIN, name):
                    with row(model, each):
                        seconds, states[each] = timed(model, lambda: prefill(model, inputs))
                    pair.append(seconds)
                rows[name]["prefill"].append(pair)
                for _ in range(STRETCHES):
                    pair = []
                    for each in (PLAIN, name):
                        cache, token = states[each]
                        with row(model, each):
                            calls = 0
                            run = lambda: decode(model, cache, token, tokens)  # noqa: B023, E731
                            pair.append(timed(model, run)[0] / tokens)
                    rows[name]["decode"].append(pair)
                    rows[name]["tested"].append(calls / tokens - 1 if name in early else 0)
                    product = timed(model, lambda: linear(hidden, head.weight))[0]
                    rows[name]["head"].append(product)
    finally:
        handle.remove()
    for name in names:
        rows[name]["trained"] = trained(model, name)
    return {"note": subject.note, "weights": sum(stored.values()), "memory": memory, "rows": rows}


def trained(model: Any, name: str) -> int:
    """Parameters that a row's methods add to the model."""
    stack = () if name in (EAGER, STAND_INS["adhh"]) else parse(name)
    plans = [method.resolve(anatomy(model)).setup(anatomy(model)) for method in stack]
    modules = [plan for plan in plans if isinstance(plan, torch.nn.Module)]
    return sum(p.numel() for module in modules for p in module.parameters())


def _early(name: str) -> bool:
    """Whether a method may unembed earlier layers, and not only a second stream's last one."""
    return any(method.wants("before") for method in parse(name))


# -- questions per second --------------------------------------------------------------------------

EVALUATION = """\
Questions per second of an evaluation: 14 questions of 20 tokens per image, one answer token.

* loop: what published code does, question by question: processor, `generate`, decoding.
* shared: the image's processor, vision tower and prefix once, the questions as one batch on forks
  of its KV cache (`foveate.vlm.prefix`), as `foveate eval` asks.

Both are measured in turn on the same new picture, with the method active in both; the ratio is the
median over these pairs, with its quartiles. "same" counts equal answers. Nothing is prepared in the
background here, which `foveate eval` does.
"""
ASKED = ("vanilla", "clvs", "vcd", "pai")
QUESTIONS, LENGTH = 14, 20
WORDS = (
    "is there a red blue green yellow car tree house left right above below the small large cat dog"
)


def clip_vlm(device: torch.device, dtype: torch.dtype) -> VLM:
    """The random 0.5B shape behind a random CLIP-L/336, with the pocket model's words."""
    from foveate.pocket.build import load_pocket

    processor = load_pocket()[1]
    config = transformers.LlavaConfig(
        text_config=QWEN,
        vision_config=CLIP_L,
        image_token_index=processor.image_token_id,
        image_seq_length=576,
    )
    side = {"height": 336, "width": 336}
    processor.image_processor = type(processor.image_processor)(size=side, crop_size=side)
    processor.patch_size = 14
    model = _random(config, device, dtype)
    model.generation_config.eos_token_id = None
    return VLM(model, processor, "0.5b")


def pocket_vlm(device: torch.device, dtype: torch.dtype) -> VLM:
    """The shipped model."""
    return VLM.load("pocket", device=device, dtype=dtype)


SUBJECTS: dict[str, Callable[[torch.device, torch.dtype], VLM]] = {
    "pocket": pocket_vlm,
    "0.5b": clip_vlm,
}


def measure_questions(vlm: VLM, names: list[str], repetitions: int) -> dict[str, Any]:
    """Seconds per image of the loop and of the shared prefix, per method and repetition."""
    from foveate.scenes import world

    rows: dict[str, Any] = {name: {"pairs": [], "same": 0} for name in names}
    words = WORDS.split()[: LENGTH - 2]  # the mark and the answer's opening are tokens, too
    texts = [" ".join(words[i:] + words[:i]) + "?" for i in range(QUESTIONS)]
    for repetition in range(-1, repetitions):  # the first one warms up
        for name in names:
            images = [world.draw(world.sample(max(0, repetition)))]
            chats = [
                vlm.chat(images, text, None) for text in texts[: None if repetition + 1 else 2]
            ]
            for chat in chats:
                chat.images = images
            stack = parse(name)
            loop, apart = timed(vlm.model, lambda: one_by_one(vlm, chats, stack))  # noqa: B023
            shared, found = timed(vlm.model, lambda: together(vlm, chats, stack))  # noqa: B023
            if repetition >= 0:
                rows[name]["pairs"].append((loop, shared))
                rows[name]["same"] += sum(a == b for a, b in zip(apart, found, strict=True))
    return rows


def one_by_one(vlm: VLM, chats: list[Any], stack: Any) -> list[str]:
    """The loop of published code: one question, one generate."""
    answers = []
    with vlm.using(stack):
        for chat in chats:
            inputs = vlm.inputs([chat])
            ids = vlm.model.generate(
                **inputs, do_sample=False, max_new_tokens=1, pad_token_id=vlm.tokenizer.pad_token_id
            )
            new = ids[:, inputs["input_ids"].shape[1] :]
            answers += vlm.tokenizer.batch_decode(new, skip_special_tokens=True)
    return answers


def together(vlm: VLM, chats: list[Any], stack: Any) -> list[str]:
    """The same questions on a shared prefix."""
    prompts = prepare(vlm, chats)
    assert prompts is not None
    assert {len(suffix) for suffix in prompts.suffixes} == {LENGTH}
    return [answer.text for answer in ask_together(vlm, prompts, stack, 1)]


def question_figures(rows: dict[str, Any]) -> dict[str, Any]:
    """Questions per second of both ways, and the ratio within pairs."""
    found = {}
    for name, samples in rows.items():
        loop, shared = zip(*samples["pairs"], strict=True)
        found[name] = {
            "loop": QUESTIONS / statistics.median(loop),
            "shared": QUESTIONS / statistics.median(shared),
            "ratio": spread([a / b for a, b in samples["pairs"]]),
            "same": samples["same"] / (QUESTIONS * len(loop)),
        }
    return found


def question_tables(sizes: dict[str, Any]) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """(title, columns, cells) of every table of the report on questions."""
    for size, found in sizes.items():
        yield (
            f"{size}: {found['note']}",
            ["", "loop, questions/s", "shared, questions/s", "shared / loop", "same"],
            [
                [
                    name,
                    f"{entry['loop']:.3g}",
                    f"{entry['shared']:.3g}",
                    _ratio(entry["ratio"]),
                    f"{entry['same']:.0%}",
                ]
                for name, entry in found["figures"].items()
            ],
        )


# -- figures ---------------------------------------------------------------------------------------


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = (
        statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    )
    return {"median": middle, "low": low, "high": high}


def figures(found: dict[str, Any]) -> dict[str, Any]:
    """Medians of the samples, and of the ratios within pairs, per row."""
    out: dict[str, Any] = {}
    for name, samples in found["rows"].items():
        entry: dict[str, Any] = {}
        for phase in ("prefill", "decode"):
            plain, own = zip(*samples[phase], strict=True)
            entry[phase] = {
                "plain": statistics.median(plain),
                "own": statistics.median(own),
                "ratio": spread([b / a for a, b in samples[phase]]),
            }
        before = found["memory"][PLAIN] + found["weights"]
        now = found["memory"][name] + found["weights"]
        entry["peak"] = {"plain": before, "own": now, "ratio": now / before}
        entry["working"] = {
            "plain": found["memory"][PLAIN],
            "own": found["memory"][name],
            "ratio": found["memory"][name] / found["memory"][PLAIN],
        }
        if any(samples["tested"]):
            triples = list(zip(samples["decode"], samples["head"], samples["tested"], strict=True))
            entry["test"] = {
                "layers": statistics.mean(samples["tested"]),
                "product": statistics.median(samples["head"]),
                "share": spread([head / plain for (plain, _), head, _ in triples]),
                "ratio": spread([own / (plain + n * head) for (plain, own), head, n in triples]),
            }
        entry["trained"] = samples["trained"]
        out[name] = entry
    if EAGER in out:
        eager = found["rows"][EAGER]["prefill"]
        for name in found["rows"]:
            if name == EAGER:
                continue
            own = found["rows"][name]["prefill"]
            gains = [(e / p) / (b / a) for (p, e), (a, b) in zip(eager, own, strict=True)]
            out[name]["faster_than_eager"] = spread(gains)
    return out


def tables(sizes: dict[str, Any]) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """(title, columns, cells) of every table of the report."""
    tests: list[list[str]] = []
    trained: list[list[str]] = []
    for size, found in sizes.items():
        result = found["figures"]
        trained += [
            [size, name, f"{entry['trained'] / 1e6:.2f}"]
            for name, entry in result.items()
            if entry["trained"]
        ]
        columns = [
            "",
            "prefill s",
            "/ sdpa",
            "decode ms",
            "/ sdpa",
            "peak MiB",
            "/ sdpa",
            "working",
        ]
        cells = [[PLAIN, *_cells(next(iter(result.values())), "plain")]]
        cells += [[name, *_cells(entry, "own")] for name, entry in result.items()]
        if any("faster_than_eager" in entry for entry in result.values()):
            columns.append("prefill: eager /")
            cells[0].append("")
            for line, entry in zip(cells[1:], result.values(), strict=True):
                gain = entry.get("faster_than_eager")
                line.append(_ratio(gain) if gain else "")
        yield f"{size}: {found['note']}", columns, cells
        for name, entry in result.items():
            if test := entry.get("test"):
                figures = [f"{test['product'] * 1e3:.2f}", _ratio(test["share"])]
                tested = [f"{test['layers']:.1f}", _ratio(test["ratio"])]
                tests.append([size, name, *figures, *tested])
    if trained:
        yield "parameters added by training", ["", "", "million"], trained
    if tests:
        columns = ["", "", "product ms", "/ plain token", "tested layers"]
        columns.append("decode / (sdpa + layers x product)")
        yield "stop test: products with the output embeddings", columns, tests


def _cells(entry: dict[str, Any], whose: str) -> list[str]:
    def ratio(part: str) -> str:
        found = 1.0 if whose == "plain" else entry[part]["ratio"]
        return f"{found:.3f}" if isinstance(found, float) else _ratio(found)

    return [
        f"{entry['prefill'][whose]:.3f}",
        ratio("prefill"),
        f"{entry['decode'][whose] * 1e3:.2f}",
        ratio("decode"),
        f"{entry['peak'][whose] / MIB:,.1f}",
        ratio("peak"),
        f"{entry['working'][whose] / MIB:,.1f}",
    ]


def look_tables(sizes: dict[str, Any]) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """(title, columns, cells) of every table of the report on looking again."""
    return looks.tables(sizes, _ratio)


TABLES = {"forwards": tables, "questions": question_tables, "looks": look_tables}
ABOUT = {"questions": EVALUATION, "looks": looks.LOOKING}


def _ratio(found: dict[str, float]) -> str:
    return f"{found['median']:.3f} ({found['low']:.3f}-{found['high']:.3f})"


def markdown(report: dict[str, Any]) -> str:
    """The whole report, as the Markdown file holds it."""
    about = report["about"]
    parts = [f"# Speed on {about['machine']}", ""]
    parts += [f"* {key}: {value}" for key, value in about.items()]
    if report["kind"] in ABOUT:
        parts += ["", ABOUT[report["kind"]]]
    else:
        parts += ["", "Ratios are medians over pairs measured back to back, with quartiles.", ""]
        parts += [str(__doc__)[str(__doc__).index("* prefill") :]]
    for title, columns, cells in TABLES[report["kind"]](report["sizes"]):
        parts += [f"## {title}", ""]
        parts += [f"| {' | '.join(line)} |" for line in (columns, ["---"] * len(columns), *cells)]
        parts.append("")
    return "\n".join(parts)


def environment(device: torch.device, started: str) -> dict[str, Any]:
    """Where and when this was measured."""
    load = [round(x, 1) for x in os.getloadavg()] if hasattr(os, "getloadavg") else None
    return {
        "machine": hardware(device),
        "command": shlex.join(["python", *sys.argv]),
        "started": started,
        "device": device.type,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "load average at the end (1, 5, 15 minutes)": load,
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, foveate {foveate.__version__}",
    }


def save(report: dict[str, Any], out: Path) -> None:
    """Write `out`.json, with every sample, and `out`.md."""
    out.parent.mkdir(parents=True, exist_ok=True)
    for suffix, content in ((".json", json.dumps(report, indent=1)), (".md", markdown(report))):
        out.with_name(out.name + suffix).write_text(content + "\n")


def arguments(given: list[str] | None) -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description="Plain SDPA, foveate and eager, in one run.")
    default = "pocket,0.5b,0.5b-32k,next" + (",7b" if cuda else "")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--eval", action="store_true", help="questions per second, shared prefix")
    kind.add_argument("--look", action="store_true", help="seconds of methods that look again")
    parser.add_argument(
        "--sizes", help=f"of {', '.join(SIZES)}; with --eval or --look of {', '.join(SUBJECTS)}"
    )
    parser.add_argument("--method", action="append", help="text form of a method; repeatable")
    parser.add_argument("--repetitions", type=int, default=5, help="prefill pairs per row")
    parser.add_argument("--tokens", type=int, default=4, help="decoded tokens per measurement")
    parser.add_argument("--device", type=torch.device, default="cuda" if cuda else "cpu")
    parser.add_argument("--dtype", help="default: float32 on CPU, bfloat16 elsewhere")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's")
    parser.add_argument("--out", type=Path, help="path of the results, without extension")
    args = parser.parse_args(given)
    args.kind = "questions" if args.eval else "looks" if args.look else "forwards"
    known = list(SIZES if args.kind == "forwards" else SUBJECTS)
    args.sizes = args.sizes or (default if args.kind == "forwards" else ",".join(known))
    for size in args.sizes.split(","):
        if size not in known:
            parser.error(f"there is no size {size!r}; there are {', '.join(known)}")
    if args.repetitions < 1 or args.tokens < 1:
        parser.error("--repetitions and --tokens must be 1 or more")
    name = args.dtype or ("float32" if args.device.type == "cpu" else "bfloat16")
    args.dtype = getattr(torch, name, None)
    if not (isinstance(args.dtype, torch.dtype) and args.dtype.is_floating_point):
        parser.error(f"there is no dtype {name!r}; use float32, bfloat16 or float16")
    try:
        usual = {"forwards": METHODS, "questions": ASKED, "looks": looks.CHOSEN}
        chosen = args.method or usual[args.kind]
        args.method = [row for method in chosen for row in _rows(method)]
    except FoveateError as error:
        parser.error(str(error))
    name = {"forwards": "speed", "questions": "eval", "looks": "look"}[args.kind]
    file = f"{name}-{args.device.type}"
    args.out = args.out or Path(__file__).parent / "results" / file
    return args


def _rows(method: str) -> list[str]:
    if method != "all":
        return [text(parse(method))]
    known = [name for name, cls in methods().items() if "rewrite" not in cls.stages]
    return [STAND_INS.get(name, name) for name in known]


def measured(size: str, args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """What a model of this size costs, for the report."""
    rows = [*dict.fromkeys(m for m in args.method if m != "vanilla"), EAGER]
    subject = SIZES[size](args.device, args.dtype)
    console.print(f"{size}: {subject.note} ...")
    with torch.no_grad():
        samples = measure(subject, rows, args.repetitions, args.tokens)
    return {"note": samples.pop("note"), "figures": figures(samples), "samples": samples}


def measured_answers(size: str, args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """How fast a model of this size answers questions, for the report."""
    vlm = SUBJECTS[size](args.device, args.dtype)
    tower = vlm.model.config.vision_config.num_hidden_layers
    note = (
        f"{vlm.model.num_parameters() / 1e6:,.0f} M parameters, "
        f"{vlm.model.get_decoder().config.num_hidden_layers} layers behind a tower of {tower}, "
        f"{str(vlm.model.dtype).removeprefix('torch.')}"
    )
    console.print(f"{size}: {note} ...")
    chosen = list(dict.fromkeys(args.method))
    if args.kind == "looks":
        rows = looks.measure(vlm, chosen, args.repetitions, timed)
        return {"note": note, "figures": looks.figures(rows, spread), "samples": rows}
    rows = measure_questions(vlm, chosen, args.repetitions)
    return {"note": note, "figures": question_figures(rows), "samples": rows}


def main(given: list[str] | None = None) -> int:
    args, console = arguments(given), Console()
    if not console.is_terminal:
        console = Console(width=150)
    if args.threads:
        torch.set_num_threads(args.threads)
    started = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    report: dict[str, Any] = {"kind": args.kind, "about": {}, "sizes": {}}
    for size in args.sizes.split(","):
        try:
            found = (measured if args.kind == "forwards" else measured_answers)(size, args, console)
        except FileNotFoundError as missing:
            console.print(f"{size} is left out: {missing}.")
            continue
        except FoveateError as error:
            console.print(str(error))
            return 2
        report["sizes"][size] = found
        report["about"] = environment(args.device, started)
        save(report, args.out)  # after every size: a long run may be stopped
    for title, columns, cells in TABLES[report["kind"]](report["sizes"]):
        table = Table(*columns, title=title)
        for line in cells:
            table.add_row(*line)
        console.print(table)
    if report["sizes"]:
        console.print(f"written: {args.out}.json and .md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
