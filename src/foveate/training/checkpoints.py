"""Checkpoints of a training: tensors in safetensors, everything else in JSON, nothing that runs.

    save_checkpoint(folder, name, clock, accelerator, lesson, optimizers)     # in all processes
    clock = load_checkpoint(latest(folder, name), accelerator, lesson, optimizers)

``NAME.step-00000120/`` has two files per process: ``rank-0.safetensors`` (trained weights and the
optimizers' state from the first process, under FSDP its shards from every one; torch's random
state) and ``rank-0.json`` (the clock, the other random states, the scale of fp16). Accelerate's own
checkpoints hold pickles, which run code when they are read.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..base.errors import FoveateError
from ..base.files import disk_error, install, refusal, write_text

FORMAT = 1  # of checkpoints; others are refused


@dataclass
class Clock:
    """Where a run stands; part of every checkpoint."""

    step: int = 0
    seconds: float = 0.0


def save_checkpoint(
    folder: Path,
    name: str,
    clock: Clock,
    accelerator: Any,
    lesson: nn.Module,
    optimizers: list[Any],
) -> None:
    """Write beside the older checkpoint, put it in place whole, then drop the older one.

    Args:
        lesson, optimizers: as Accelerate prepared them. All processes must call this.

    Raises:
        FoveateError: in every process, if the disk of one refuses; the older checkpoint is kept.
    """
    target = folder / f"{name}.step-{clock.step:08d}"
    part = folder / f".{target.name}.part"
    if accelerator.is_main_process:
        shutil.rmtree(part, ignore_errors=True)
    accelerator.wait_for_everyone()
    failure: Exception | None = None
    try:
        part.mkdir(exist_ok=True)
        rank = part / f"rank-{accelerator.process_index}"
        save_file(_tensors(accelerator, lesson, optimizers), rank.with_suffix(".safetensors"))
        write_text(rank.with_suffix(".json"), json.dumps(_about(accelerator, clock)))
    except Exception as error:
        if disk_error(error) is None and not isinstance(error, FoveateError):
            raise
        failure = error
    failed = torch.tensor(float(failure is not None), device=accelerator.device)
    if accelerator.reduce(failed, "sum").item():
        if accelerator.is_main_process:
            shutil.rmtree(part, ignore_errors=True)
        raise _unwritten(folder, name, clock, target, failure) from failure
    if accelerator.is_main_process:
        try:
            install(part, target)
        except OSError as error:
            shutil.rmtree(part, ignore_errors=True)
            raise _unwritten(folder, name, clock, target, error) from error
        for old in folder.glob(f"{name}.step-*"):
            if old != target:
                shutil.rmtree(old)
    accelerator.wait_for_everyone()


def _unwritten(
    folder: Path, name: str, clock: Clock, target: Path, failure: Exception | None
) -> FoveateError:
    safe = what_is_safe(folder, name)
    if failure is None:
        return FoveateError(
            f"Another process could not write its part of the checkpoint {target}: {safe}; see "
            "what that process says."
        )
    if isinstance(failure, FoveateError):  # from `write_text`
        failure = failure.__cause__ if isinstance(failure.__cause__, Exception) else failure
    return refusal(target, failure, safe)


def load_checkpoint(
    path: Path, accelerator: Any, lesson: nn.Module, optimizers: list[Any]
) -> Clock:
    """Put a checkpoint's state into the lesson, the optimizers and the random generators.

    Raises:
        FoveateError: it is damaged, or not of this training.
    """
    rank = path / f"rank-{accelerator.process_index}"
    shared = _keeper(path, accelerator)
    try:
        about = json.loads(rank.with_suffix(".json").read_text("utf-8"))
        if about["format"] != FORMAT or about["processes"] != accelerator.num_processes:
            raise ValueError("it was made by another version, or with other processes")
        tensors = load_file(shared.with_suffix(".safetensors"))
        own = tensors if rank == shared else load_file(rank.with_suffix(".safetensors"))
        _put_weights(accelerator.unwrap_model(lesson), tensors)
        for number, optimizer in enumerate(optimizers):
            _put_optimizer(optimizer, _below(tensors, f"optimizer.{number}."))
        if accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(about["scaler"])
        kind, numbers, gauss = about["python"]
        random.setstate((kind, tuple(numbers), gauss))
        np.random.set_state(about["numpy"])
        torch.set_rng_state(own["random.cpu"])
        if accelerator.device.type != "cpu":
            device = torch.get_device_module(accelerator.device)
            device.set_rng_state(own["random.device"])
        return Clock(int(about["step"]), float(about["seconds"]))
    except Exception as error:  # damaged files raise nearly anything
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise FoveateError(
            f"The checkpoint {path} cannot be read ({reason[:120]}): delete it, and the same "
            "command begins anew."
        ) from error


def latest(folder: Path, name: str) -> Path | None:
    """The newest checkpoint of a stage."""
    return max(folder.glob(f"{name}.step-*"), default=None)


def what_is_safe(folder: Path, name: str) -> str:
    """What a disk error does not take from a stage, as a part of a sentence."""
    last = latest(folder, name)
    return f"the checkpoint {last.name} is safe" if last else "there is no checkpoint yet"


def drop_checkpoints(folder: Path, name: str) -> None:
    for old in folder.glob(f"{name}.step-*"):
        shutil.rmtree(old)


# -- what is in the files --------------------------------------------------------------------------


def _keeper(path: Path, accelerator: Any) -> Path:
    """The process that has this one's weights: under FSDP itself, else the first."""
    return path / f"rank-{accelerator.process_index if accelerator.is_fsdp2 else 0}"


def _tensors(accelerator: Any, lesson: nn.Module, optimizers: list[Any]) -> dict[str, Tensor]:
    """What this process keeps, on the CPU."""
    tensors: dict[str, Tensor] = {}
    if accelerator.is_main_process or accelerator.is_fsdp2:
        weights = accelerator.unwrap_model(lesson).state_dict()
        tensors |= {f"model.{name}": value for name, value in weights.items()}
        for number, optimizer in enumerate(optimizers):
            for index, state in optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer.{number}.{index}.{k}": v for k, v in state.items()}
    tensors["random.cpu"] = torch.get_rng_state()
    if accelerator.device.type != "cpu":
        tensors["random.device"] = torch.get_device_module(accelerator.device).get_rng_state()
    return own_memory({name: _local(value) for name, value in tensors.items()})


def own_memory(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU that share no memory, as safetensors wants them."""
    whole = torch.contiguous_format
    return {k: v.detach().cpu().clone(memory_format=whole) for k, v in tensors.items()}


def _about(accelerator: Any, clock: Clock) -> dict[str, Any]:
    kind, keys, *rest = np.random.get_state(legacy=True)
    return {
        "format": FORMAT,
        **asdict(clock),
        "processes": accelerator.num_processes,
        "scaler": None if accelerator.scaler is None else accelerator.scaler.state_dict(),
        "python": random.getstate(),
        "numpy": [kind, np.asarray(keys).tolist(), *rest],
    }


def _local(tensor: Tensor) -> Tensor:
    """This process's shard of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _put_weights(lesson: nn.Module, tensors: dict[str, Tensor]) -> None:
    kept, places = _below(tensors, "model."), lesson.state_dict()
    if kept.keys() != places.keys():
        raise ValueError(f"its weights are of another model: {sorted(kept.keys() ^ places)[0]}")
    for name, place in places.items():
        mine, own = _local(place), kept[name]
        if (mine.shape, mine.dtype) != (own.shape, own.dtype):
            raise ValueError(f"its weights are of another model: {name} is {tuple(own.shape)}")
    for name, place in places.items():
        _local(place).copy_(kept[name])


def _put_optimizer(optimizer: Any, tensors: dict[str, Tensor]) -> None:
    """The state of every parameter; rates and the like are those of this training."""
    now = optimizer.state_dict()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        parameter = parameters[int(index)]
        if value.ndim and value.shape != _local(parameter).shape:
            raise ValueError(f"its optimizer is of another model: {key} is {tuple(value.shape)}")
        if isinstance(parameter, DTensor) and value.ndim:
            value = DTensor.from_local(
                value.to(parameter.device),
                parameter.device_mesh,
                parameter.placements,
                shape=parameter.size(),
                stride=parameter.stride(),
            )
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": now["param_groups"]})
