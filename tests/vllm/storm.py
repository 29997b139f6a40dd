"""An engine in bad weather: few cache blocks, requests left out of steps, and clients that leave.

`answers` runs it, in a process of its own. A job has "storms" besides: how often every request is
asked.
"""

from __future__ import annotations

import gc
import random
from collections import Counter
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler

PUT_ASIDE, LEAVES = 0.2, 0.08
WEATHER: Counter[str] = Counter()
SCHEDULERS: list[Any] = []


class Storm(AsyncScheduler):
    """Leaves out some of the running requests, as a scheduler may where a budget is used up."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.draw, self.weather = random.Random(0), WEATHER
        SCHEDULERS[:] = [self]

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        aside = [one for one in self.running if self.draw.random() < PUT_ASIDE]
        self.running = [one for one in self.running if one not in aside]
        planned = super().schedule(*args, **kwargs)
        self.running += [one for one in aside if one.request_id in self.requests]
        self.weather["put aside"] += len(aside)
        return planned

    def _preempt_request(self, *args: Any, **kwargs: Any) -> None:
        self.weather["preempted"] += 1
        super()._preempt_request(*args, **kwargs)


def storm(job: dict[str, Any]) -> dict[str, Any]:
    """Per answer its request, its greedy tokens and whether it is whole; what is held afterwards.

    Also, what the weather was: how often a request was put aside or preempted.
    """
    from PIL import Image
    from vllm import LLM, SamplingParams
    from vllm.sampling_params import RequestOutputKind

    from foveate.backends.vllm.hidden import served
    from foveate.backends.vllm.logits import TWINS
    from foveate.backends.vllm.plan import Live
    from foveate.backends.vllm.requests import ROWS
    from foveate.backends.vllm.twins import pairs_of

    sizes = {"max_model_len": 512, "max_num_seqs": 16, "max_num_batched_tokens": 192}
    sizes |= {"enforce_eager": True, "dtype": "float32", "scheduler_cls": Storm}
    engine = LLM(job["model"], **sizes | job["options"]).llm_engine
    draw, asked, answers = random.Random(1), {}, []
    waiting = list(range(len(job["requests"]))) * job["storms"]
    draw.shuffle(waiting)
    tokens: dict[str, list[int]] = {}
    while waiting or engine.has_unfinished_requests():
        while waiting and len(asked) < 40:
            number = waiting.pop()
            one = job["requests"][number]
            pictures = [Image.open(picture).convert("RGB") for picture in one["images"]]
            prompt = {"prompt": one["prompt"], "multi_modal_data": {"image": pictures}}
            method = {"foveate": one["method"]} if one["method"] else None
            params = SamplingParams(
                temperature=0,
                max_tokens=one["steps"],
                ignore_eos=True,
                detokenize=False,
                extra_args=method,
                output_kind=RequestOutputKind.CUMULATIVE,
            )
            name = f"{len(answers) + len(asked)}-{len(waiting)}"
            engine.add_request(name, prompt, params)
            asked[name], tokens[name] = number, []
        for out in engine.step():
            tokens[out.request_id] = list(out.outputs[0].token_ids)
            if out.finished:
                number = asked.pop(out.request_id)
                answers.append((number, tokens.pop(out.request_id), True))
        if asked and draw.random() < LEAVES:
            name = draw.choice(list(asked))
            engine.abort_request([name])
            answers.append((asked.pop(name), tokens.pop(name), False))
    for _ in range(3):  # the worker hears of the last ones
        engine.engine_core.get_output()
    gc.collect()
    held = {
        "rows": len(ROWS),
        "twins": len(TWINS),
        "pairs": len(pairs_of(SCHEDULERS[0]).alive),
        "lives": sum(isinstance(one, Live) for one in gc.get_objects()),
        "stacks": len(served().stacks),
    }
    return {"answers": answers, "held": held, "weather": WEATHER}
