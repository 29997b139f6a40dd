"""The same requests through transformers and through vLLM, each in a process of its own.

    python -m tests.vllm.answers transformers JOB.json
    python -m tests.vllm.answers vllm JOB.json
    python -m tests.vllm.answers storm JOB.json

A job names a model's folder, requests (method, pictures, prompt text), the engine's options and the
file that gets, per turn and request, the prompt's ids, the greedy tokens and the whole
vocabulary's log-probabilities (steps, V). With "in order" vLLM answers one request after the other;
"ids" stands for a prompt's text, "fresh" empties the prefix cache before the request.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

STEPS = 10
SETTINGS: dict[str, dict[str, Any]] = {
    "eager": {},
    "chunks, small blocks, prefix cache": {
        "options": {
            "enable_chunked_prefill": True,
            "max_num_batched_tokens": 64,
            "block_size": 32,
        },
        "turns": 2,
    },
    "compiled": {"options": {"enforce_eager": False}},
    "two ranks": {"options": {"tensor_parallel_size": 2}},
    "preempted": {"options": {"kv_cache_memory_bytes": 9 * 2**20, "block_size": 32}},
}
"""How vLLM is started, and how often it is asked: what a job says beside its requests."""


def pocket(folder: Path) -> Path:
    """The pocket model as vLLM loads it."""
    from foveate.vlm.loading import pocket_for_vllm

    return pocket_for_vllm(folder)


def tower_renamed(folder: Path) -> Path:
    """Write a CLIP or SigLIP tower's weights under the names that vLLM knows."""
    from safetensors.torch import load_file, save_file

    from foveate.backends.vllm import compat

    file = folder / "model.safetensors"
    save_file(compat.tower_renamed(load_file(file)), file, {"format": "pt"})
    return folder


def requests(folder: Path, methods: Sequence[str]) -> list[dict[str, Any]]:
    """One request per method, each about a drawn scene of its own."""
    from foveate.scenes.questions import FIRST_HELD_OUT, exam
    from foveate.scenes.world import draw, sample

    out = []
    for n, method in enumerate(methods):
        scene = sample(FIRST_HELD_OUT + n)
        picture = folder / f"{n}.png"
        draw(scene, 96).save(picture)  # the model's size, so that no resampling enters
        question = random.Random(n).choice(exam(scene, random.Random(n))).text
        prompt = f"USER: <image>\n{question} ASSISTANT:"
        out.append({"method": method, "images": [str(picture)], "prompt": prompt})
    return out


def job(folder: Path, methods: Sequence[str]) -> dict[str, Any]:
    """The pocket model asked with each method, without options."""
    model, asked = pocket(folder / "pocket"), requests(folder, methods)
    return {"model": str(model), "requests": asked, "out": str(folder / "answers")}


def run(engine: str, job: dict[str, Any], **environment: str) -> Any:
    """What an engine answers, in a process of its own: per turn and request; or a storm."""
    import torch

    file = Path(job["out"]).with_suffix(".json")
    file.write_text(json.dumps(job))
    given = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | environment
    done = subprocess.run(
        [sys.executable, "-m", "tests.vllm.answers", engine, str(file)],
        env=given,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return torch.load(job["out"])


def _transformers(job: dict[str, Any]) -> list[list[dict[str, Any]]]:
    import torch
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from foveate import enhance
    from foveate.backends.transformers.compat import cache_of, passing

    torch.set_num_threads(1)
    model = AutoModelForImageTextToText.from_pretrained(job["model"], dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(job["model"])
    answers = []
    for asked in job["requests"]:
        pictures = [Image.open(file).convert("RGB") for file in asked["images"]]
        inputs = processor(images=pictures, text=asked["prompt"], return_tensors="pt")
        for name in job.get("leaves out", ()):
            inputs.pop(name, None)
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        tokens, rows = [], []
        with torch.no_grad(), enhance(model, *filter(None, [asked["method"]])):
            out = model(**inputs, use_cache=True)
            for _ in range(asked.get("steps", STEPS)):
                rows.append(out.logits[0, -1].float().log_softmax(-1))
                tokens.append(int(rows[-1].argmax()))
                mask = torch.nn.functional.pad(mask, (0, 1), value=1)
                given = passing(model, cache_of(out))
                deltas = getattr(model.model, "rope_deltas", None)
                if deltas is not None:  # three rows of positions
                    place = torch.tensor([[mask.shape[1] - 1]]) + deltas
                    given["position_ids"] = place[None].expand(3, -1, -1)
                given |= {"input_ids": torch.tensor([tokens[-1:]]), "attention_mask": mask}
                out = model(**given, use_cache=True)
        answers.append({"ids": ids[0].tolist(), "tokens": tokens, "rows": torch.stack(rows)})
    return [answers]


def _vllm(job: dict[str, Any]) -> list[list[dict[str, Any]]]:
    import torch
    from PIL import Image
    from vllm import LLM, SamplingParams

    sizes = {"max_model_len": 512, "max_num_seqs": 16, "kv_cache_memory_bytes": 2**28}
    sizes |= {"limit_mm_per_prompt": {"image": 2}, "max_logprobs": -1}
    options = sizes | {"enforce_eager": True, "dtype": "float32"} | job.get("options", {})
    llm = LLM(job["model"], **options)
    prompts, params = [], []
    for asked in job["requests"]:
        pictures = [Image.open(file).convert("RGB") for file in asked["images"]]
        given = {"image": pictures if len(pictures) > 1 else pictures[0]} if pictures else {}
        text = {"prompt_token_ids": asked["ids"]} if "ids" in asked else {"prompt": asked["prompt"]}
        prompts.append(text | {"multi_modal_data": given})
        method = {"foveate": asked["method"]} if asked["method"] else None
        params.append(
            SamplingParams(
                temperature=0,
                max_tokens=asked.get("steps", STEPS),
                ignore_eos=True,
                logprobs=-1,
                detokenize=False,
                extra_args=method,
            )
        )
    turns = []
    for _ in range(job.get("turns", 1)):
        answers, done = [], []
        if job.get("in order"):
            for asked, prompt, how in zip(job["requests"], prompts, params, strict=True):
                if asked.get("fresh"):
                    llm.reset_prefix_cache()
                done += llm.generate(prompt, how, use_tqdm=False)
        else:
            done = llm.generate(prompts, params, use_tqdm=False)
        for out in done:
            steps = out.outputs[0].logprobs
            rows = [[step[t].logprob for t in range(len(step))] for step in steps]
            answers.append(
                {
                    "ids": list(out.prompt_token_ids),
                    "tokens": list(out.outputs[0].token_ids),
                    "rows": torch.tensor(rows),
                    "cached": out.num_cached_tokens,
                    "edited": (out.kv_transfer_params or {}).get("foveate"),
                }
            )
        turns.append(answers)
    return turns


def _storm(job: dict[str, Any]) -> dict[str, Any]:
    from tests.vllm.storm import storm

    return storm(job)


def main() -> None:
    import torch

    engine, file = sys.argv[1:]
    job = json.loads(Path(file).read_text())
    answers = {"transformers": _transformers, "vllm": _vllm, "storm": _storm}[engine](job)
    torch.save(answers, job["out"])


if __name__ == "__main__":
    main()
