"""Second streams in vLLM's scheduler: a request and its twin, both or neither in a step.

A method with a second stream makes a twin of its request, which reads another prompt and then the
same answer. The last token that either has is computed only in a step that computes that of both,
for there the next one is chosen: `logits` gives the twin's logits to the method, and the twin gets
the token that the request got.

While a step is planned, a request that must wait hides its last token. So it may read its prompt up
to there, in whatever pieces, and then has nothing left to do. Pairs that may go on are planned
first and have their blocks before others ask for some, so neither of them can be preempted in that
step. At other times one may be: then the other waits until it is back.

The twin is born in the engine's process and ends with its request. No client sees it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.request import Request, RequestStatus

from ...base.errors import FoveateError
from .admission import checked, shape
from .asked import AHEAD, BESIDE, PAIR, TWIN, asked, visual
from .second import second


class Coupled(Request):
    """A request that has a twin, or is one.

    Attributes:
        waits: whether its last token is hidden. pair: the two of them.
    """

    waits = False
    pair: Pair

    @property
    def num_tokens(self) -> int:
        return super().num_tokens - self.waits

    @property
    def num_tokens_with_spec(self) -> int:
        return super().num_tokens_with_spec - self.waits

    @property
    def leads(self) -> bool:
        """Whether it is the one that has a twin."""
        return self is self.pair.main

    @property
    def left(self) -> int:
        """How many of its tokens no step was planned for."""
        return self.num_tokens_with_spec + self.num_output_placeholders - self.num_computed_tokens


@dataclass(eq=False)
class Pair:
    """A request and its twin.

    Attributes:
        ahead: whether the twin is only read before the answer begins. over: whether it was planned.
    """

    main: Coupled
    twin: Coupled
    ahead: bool = False
    over: bool = False

    @property
    def both(self) -> tuple[Coupled, Coupled]:
        return self.main, self.twin

    def may_go_on(self) -> bool:
        """Whether each is at its last token, and that of the same place of the answer."""
        said = [x.num_output_tokens + x.num_output_placeholders for x in self.both]
        return [x.left for x in self.both] == [1, 1] and said[0] == said[1]


@dataclass
class Pairs:
    """The pairs of a scheduler.

    Attributes:
        alive: id of the request -> its pair. twins: ids of the twins.
    """

    alive: dict[str, Pair] = field(default_factory=dict)
    twins: set[str] = field(default_factory=set)

    def of(self, request_id: str) -> Pair | None:
        return self.alive.get(request_id.removesuffix(_SUFFIX))


_SUFFIX = " (twin)"


def pairs_of(scheduler: Any) -> Pairs:
    found: Pairs = scheduler.__dict__.setdefault("foveate_pairs", Pairs())
    return found


# -- a twin is born --------------------------------------------------------------------------------


def couple(core: Any, request: Any, hasher: Any) -> None:
    """Give a request that asks for a second stream its twin.

    Args:
        core: vLLM's `EngineCore`. request: its `Request`; changed in place. hasher: what makes the
            keys of its blocks.

    Raises:
        FoveateError: the two do not fit into the cache.
    """
    params, config = request.sampling_params, core.vllm_config.model_config.hf_config
    text = asked(params) if params is not None else ""
    stack = checked(text, shape(config)) if text else None
    if stack is None or stack.owner is None:
        return
    ids = list(request.prompt_token_ids)
    read = second(stack, config, ids, visual(params, len(ids)), request.mm_features)
    room = _room(core.scheduler, len(ids), len(read.ids))
    longest = core.vllm_config.model_config.max_model_len - max(len(ids), len(read.ids))
    if min(room, longest) < 1:
        raise FoveateError(
            f"{text} reads two prompts of {len(ids)} and {len(read.ids)} tokens, which do not fit "
            "into vLLM's cache together: give it more memory, or send a shorter prompt."
        )
    if not read.ahead:
        request.max_tokens = min(request.max_tokens, room, longest)
    # answers to one prompt (n > 1) share their parameters in this process
    request.sampling_params = copy.copy(params)
    request.sampling_params.extra_args = params.extra_args | {PAIR: request.request_id}
    twin = Coupled(
        request_id=request.request_id + _SUFFIX,
        prompt_token_ids=read.ids,
        sampling_params=SamplingParams(
            temperature=0,
            max_tokens=1 if read.ahead else request.max_tokens,
            ignore_eos=True,
            detokenize=False,
            extra_args={PAIR: request.request_id, TWIN: AHEAD if read.ahead else BESIDE},
        ),
        pooling_params=None,
        client_index=request.client_index,
        arrival_time=request.arrival_time,
        mm_features=read.features,
        lora_request=request.lora_request,
        cache_salt=request.cache_salt,
        priority=request.priority,
        block_hasher=hasher,
    )
    request.__class__ = Coupled
    request.pair = twin.pair = Pair(request, twin, read.ahead)


def _room(scheduler: Any, main: int, twin: int) -> int:
    """How many tokens an answer may have that both hold in the cache, where nothing else does."""
    manager = scheduler.kv_cache_manager
    blocks = manager.block_pool.num_gpu_blocks - 1 - manager.watermark_blocks
    sizes = [one.block_size for one in manager.coordinator.single_type_managers]

    def fits(answer: int) -> bool:
        return sum(-(-(n + answer) // size) for n in (main, twin) for size in sizes) <= blocks

    low, high = 0, blocks * max(sizes) + 1  # fits, does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def add(plain: Callable[..., Any], scheduler: Any, request: Any) -> None:
    """`Scheduler.add_request`: with its twin behind it."""
    plain(scheduler, request)
    if isinstance(request, Coupled):
        plain(scheduler, request.pair.twin)
        pairs = pairs_of(scheduler)
        pairs.alive[request.request_id] = request.pair
        pairs.twins.add(request.pair.twin.request_id)


# -- a step is planned -----------------------------------------------------------------------------


def schedule(
    plain: Callable[..., Any],
    preempt: Callable[[Any], None],
    scheduler: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """`Scheduler.schedule`: with both or neither of every pair; `preempt` takes one's blocks."""
    pairs = pairs_of(scheduler).alive
    if not pairs:
        return plain(scheduler, *args, **kwargs)
    _call_back(scheduler)
    going = _going_on(scheduler)
    first = [x for pair in going for x in pair.both]
    ahead = [pair for pair in pairs.values() if pair.ahead]
    reading = {x.request_id for x in scheduler.running if isinstance(x, Coupled) and x.left == 1}
    for pair in pairs.values():
        pair.main.waits = not (pair in going or pair.over)
        pair.twin.waits = not (pair in going or (pair.ahead and pair.main.request_id in reading))
    place = {x.request_id: n for n, x in enumerate(scheduler.running)}
    chosen = {x.request_id for x in first}
    scheduler.running = [*first, *(x for x in scheduler.running if x.request_id not in chosen)]
    planned = plain(scheduler, *args, **kwargs)
    scheduler.running.sort(key=lambda x: place.get(x.request_id, len(place)))
    for pair in going:
        if len({x.request_id in planned.num_scheduled_tokens for x in pair.both}) > 1:
            raise RuntimeError(
                f"foveate: vLLM planned a step with one of the two streams of "
                f"{asked(pair.main.sampling_params)}, and its next token would be wrong. The "
                "engine stops: use a version of vLLM that foveate's documentation names."
            )
    for pair in ahead:
        planned_here = pair.twin.request_id in planned.num_scheduled_tokens
        pair.over |= planned_here and pair.twin.num_computed_tokens >= pair.twin.num_prompt_tokens
    if not planned.total_num_scheduled_tokens:
        _make_way(scheduler, preempt)
    return planned


def release(scheduler: Any) -> None:
    """A step was planned: nobody hides a token any more."""
    for pair in pairs_of(scheduler).alive.values():
        pair.main.waits = pair.twin.waits = False


def _going_on(scheduler: Any) -> list[Pair]:
    """The running pairs that choose a token in the next step: those that the cache has room for."""
    manager = scheduler.kv_cache_manager
    running = {x.request_id for x in scheduler.running}
    free, going = manager.block_pool.get_num_free_blocks(), []
    for pair in [x.pair for x in scheduler.running if isinstance(x, Coupled) and x.leads]:
        if pair.ahead or pair.twin.request_id not in running or not pair.may_go_on():
            continue
        needed = sum(
            len(one.req_to_blocks[x.request_id]) * one.block_size <= x.num_computed_tokens
            for x in pair.both
            for one in manager.coordinator.single_type_managers
        )
        if needed <= free:
            free -= needed
            going.append(pair)
    return going


def _call_back(scheduler: Any) -> None:
    """Put those whose other half is running in front of the waiting ones."""
    for pair in [x.pair for x in scheduler.running if isinstance(x, Coupled)][::-1]:
        for one in pair.both:
            if one.status in (RequestStatus.WAITING, RequestStatus.PREEMPTED):
                scheduler.waiting.remove_requests([one])
                scheduler.waiting.prepend_request(one)


def _make_way(scheduler: Any, preempt: Callable[[Any], None]) -> None:
    """Nothing could be planned: where pairs wait for room, the last of the running leaves."""
    running = scheduler.running
    idle = scheduler.pause_state == PauseState.UNPAUSED and len(running) > 1
    if not idle or any(x.num_in_flight_tokens for x in running):
        return
    names = {x.request_id for x in running}
    halves = [x.pair for x in running if isinstance(x, Coupled)]
    missing = [
        x
        for pair in halves
        for x in pair.both
        if x.request_id not in names and x.request_id in scheduler.requests
    ]
    held = any(pair.may_go_on() for pair in halves if not pair.ahead)
    if held or any(x not in scheduler.deferred_waiting for x in missing):
        preempt(running.pop())


# -- a pair ends -----------------------------------------------------------------------------------


def finish(
    plain: Callable[..., Any], scheduler: Any, request_ids: str | Iterable[str] | None, status: Any
) -> Any:
    """`Scheduler.finish_requests`: both of every pair; returns what clients know of."""
    pairs = pairs_of(scheduler)
    if not pairs.alive:
        return plain(scheduler, request_ids, status)
    if request_ids is not None:
        asked_for = [request_ids] if isinstance(request_ids, str) else list(request_ids)
        request_ids = set(asked_for)
        for name in asked_for:
            pair = pairs.of(name)
            request_ids |= {x.request_id for x in pair.both} if pair else set()
    done = plain(scheduler, request_ids, status)
    known = [one for one in done if one.request_id not in pairs.twins]
    _forget(scheduler, pairs)
    return known


def after(scheduler: Any, outputs: dict[int, Any]) -> None:
    """A step was taken in: twins leave no output, and end where their request has ended."""
    pairs = pairs_of(scheduler)
    if not pairs.alive:
        return
    for group in outputs.values():
        group.outputs = [x for x in group.outputs if x.request_id not in pairs.twins]
    over = [name for name in pairs.alive if name not in scheduler.requests]
    if over:
        scheduler.finish_requests(over, RequestStatus.FINISHED_ABORTED)


def _forget(scheduler: Any, pairs: Pairs) -> None:
    for name, pair in list(pairs.alive.items()):
        if not {name, pair.twin.request_id} & set(scheduler.requests):
            del pairs.alive[name]
            pairs.twins.discard(pair.twin.request_id)
