"""Model and processor from a name: the pocket model, a folder or the hub; or one clear sentence."""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ..backends.transformers import compat, compat_parts
from ..backends.vllm.compat import tower_renamed
from ..base.errors import FoveateError

WEIGHTS = Path(__file__).parents[1] / "pocket" / "weights"
"""The folder of the pocket model."""
MODELS: Any = transformers.AutoModelForImageTextToText
HINT = "use 'pocket', a saved model's folder, or a hub name such as 'llava-hf/llava-1.5-7b-hf'"


def load(
    name: str,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    device_map: Any = None,
    attn: str | None = None,
    revision: str | None = None,
    quantization: str | None = None,
) -> tuple[Any, Any]:
    """The model, in eval mode on its device, and its processor; see `VLM.load`.

    Raises:
        FoveateError: an unknown name, an incomplete folder, a revision that the hub does not have,
            a model without vision or with remote code, an unknown device, dtype, attention or
            quantization.
    """
    if device is not None and device_map is not None:
        raise FoveateError("Give either device or device_map, not both.")
    place = _device(device)
    quantized = _quantized(quantization)
    if quantized and device_map is None:
        device_map = {"": place}  # such weights cannot be moved later
    source, offline = _locate(name, revision)
    common = _options(offline, revision)
    with _one_sentence(name):
        _config(name, source, common)
        processor = _processor(name, source, common)
        model, info = MODELS.from_pretrained(
            source,
            dtype=as_dtype(dtype, place),
            device_map=device_map,
            attn_implementation=attn,
            output_loading_info=True,
            **quantized,
            **(compat_parts.pocket_weights() if name == "pocket" else {}),
            **common,
        )
        if device_map is None:
            model = model.to(place)
    if missing := sorted(info["missing_keys"]):
        warnings.warn(
            f"The weights of {name} lack {len(missing)} tensors ({missing[0]}, ...), which are now "
            "random: its answers mean nothing.",
            stacklevel=3,
        )
    return model, processor


@dataclass(frozen=True)
class Parts:
    """What is known of a model before its weights are loaded.

    Attributes:
        source: a folder, or the hub's name. config, generation: as transformers reads them.
    """

    source: str
    config: Any
    generation: Any
    processor: Any


def parts(name: str, revision: str | None = None) -> Parts:
    """A model without its weights, for an engine that loads them. Raises as `load`."""
    source, offline = _locate(name, revision)
    common = _options(offline, revision)
    with _one_sentence(name):
        config = _config(name, source, common)
        try:
            generation = transformers.GenerationConfig.from_pretrained(source, **common)
        except OSError:  # the model comes without such a file
            generation = transformers.GenerationConfig.from_model_config(config)
        return Parts(source, config, generation, _processor(name, source, common))


def outline(name: str, revision: str | None = None) -> Any:
    """The model's modules without any weights (on the meta device), to see how it is built."""
    source, offline = _locate(name, revision, weights=False)
    with _one_sentence(name), torch.device("meta"):
        return MODELS.from_config(_config(name, source, _options(offline, revision)))


def pocket_for_vllm(folder: Path) -> Path:
    """Write the pocket model, its tower's weights under the names that vLLM knows."""
    from safetensors.torch import load_file, save_file

    folder.mkdir(parents=True, exist_ok=True)
    for file in WEIGHTS.iterdir():
        if file.suffix in (".json", ".jinja"):
            shutil.copy(file, folder)
    weights = tower_renamed(load_file(WEIGHTS / "model.safetensors"))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def commit(name: str, revision: str | None = None) -> str | None:
    """The commit of a hub model, read from its place in the cache (transformers no longer keeps it
    on the configuration); None for a model from elsewhere."""
    if _is_local(name):
        return None
    file = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(file).parent.name if isinstance(file, str) else None


def at_hand(name: str, revision: str | None = None) -> bool:
    """Whether the weights are on this machine: a folder, or in the hub's cache."""
    files = ("model.safetensors", "model.safetensors.index.json")
    return _is_local(name) or any(
        isinstance(try_to_load_from_cache(name, file, revision=revision), str) for file in files
    )


def _options(offline: bool, revision: str | None) -> dict[str, Any]:
    """The options of every `from_pretrained`."""
    options: dict[str, Any] = {"local_files_only": offline, "trust_remote_code": False}
    return options if revision is None else options | {"revision": revision}


def _config(name: str, source: str, options: dict[str, Any]) -> Any:
    config = transformers.AutoConfig.from_pretrained(source, **options)
    if not compat_parts.is_vision_language(config):
        raise FoveateError(f"{name} ({config.model_type}) is not a vision-language model: {HINT}.")
    return config


def _processor(name: str, source: str, options: dict[str, Any]) -> Any:
    processor = transformers.AutoProcessor.from_pretrained(source, **options)
    if not hasattr(processor, "image_processor") or not hasattr(processor, "tokenizer"):
        raise FoveateError(
            f"{name} comes without a processor for images: save the model's processor with it."
        )
    return processor


def _locate(name: str, revision: str | None = None, weights: bool = True) -> tuple[str, bool]:
    """What to give to `from_pretrained`, and whether to leave the network alone.

    Args:
        weights: whether a folder must hold them.
    """
    if revision is not None and _is_local(name):
        raise FoveateError(
            f"{name} does not come from the hub, so it has no revision {revision!r}: leave out the "
            "revision."
        )
    if name == "pocket":
        if not _has_weights(WEIGHTS):
            raise FoveateError(
                "The pocket model's weights are missing from this installation: install foveate "
                "again, or make them with `foveate train pocket`."
            )
        return str(WEIGHTS), True
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise FoveateError(f"The folder {name} has no config.json: it is not a saved model.")
        if weights and not _has_weights(folder):
            raise FoveateError(f"The folder {name} has no weights (*.safetensors or *.bin).")
        return str(folder), True
    if folder.exists():
        raise FoveateError(f"{name} is a file: give the folder of the saved model.")
    if name.count("/") != 1 or name[0] in "./~":
        near = difflib.get_close_matches(name, ["pocket"])
        hint = f"did you mean '{near[0]}'" if near else HINT
        raise FoveateError(f"There is no model or folder {name!r}: {hint}.")
    return name, _offline(name, revision)


def _is_local(name: str) -> bool:
    return name == "pocket" or Path(name).expanduser().exists()


def _has_weights(folder: Path) -> bool:
    return any(folder.glob("*.safetensors")) or any(folder.glob("*.bin"))


def _offline(name: str, revision: str | None) -> bool:
    """Ask the hub once whether it has the model. True: it cannot be reached, but the cache has it.

    transformers itself retries every file for half a minute before it gives up.
    """
    try:
        HfApi().model_info(name, revision=revision, timeout=10)
        return False
    except RepositoryNotFoundError as error:
        raise FoveateError(f"The hub has no model {name!r} that you may see: {HINT}.") from error
    except RevisionNotFoundError as error:
        raise FoveateError(
            f"The hub's {name} has no revision {revision!r}: give a branch, a tag or a commit."
        ) from error
    except HFValidationError as error:
        raise FoveateError(f"{name!r} is not the name of a model: {HINT}.") from error
    except HfHubHTTPError:  # it answered, if oddly, as some mirrors do: let transformers try
        return False
    except Exception as error:  # no network, a proxy, a time-out, HF_HUB_OFFLINE: kinds vary
        if isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str):
            return True
        if revision is not None:
            raise FoveateError(
                f"{name!r} in the revision {revision!r} is not in the local cache, and the hub "
                "cannot be reached: check the name, the revision or the network."
            ) from error
        raise FoveateError(
            f"{name!r} is neither a folder nor in the local cache, and the hub cannot be reached: "
            "check the name or the network."
        ) from error


def _device(device: torch.device | str | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise FoveateError(f"There is no device {str(device)!r} on this machine.") from error
    return place


def _quantized(bits: str | None) -> dict[str, Any]:
    """Options of `from_pretrained` for weights of 4 or 8 bits."""
    if bits is None:
        return {}
    if bits not in ("4bit", "8bit"):
        raise FoveateError(f"There is no quantization {bits!r}: use 4bit or 8bit.")
    for package in ("bitsandbytes", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise FoveateError(
                f"Weights of {bits[0]} bits need {package}: pip install bitsandbytes accelerate."
            )
    return {"quantization_config": transformers.BitsAndBytesConfig(**{f"load_in_{bits}": True})}


def as_dtype(dtype: torch.dtype | str | None, place: torch.device) -> torch.dtype | str:
    """A dtype, or "auto" for the checkpoint's; without one, that of a device."""
    if dtype is None:
        return torch.bfloat16 if place.type == "cuda" else torch.float32
    if isinstance(dtype, torch.dtype) or dtype == "auto":
        return dtype
    short = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
    value = getattr(torch, short.get(dtype, dtype), None)
    if not isinstance(value, torch.dtype) or not value.is_floating_point:
        raise FoveateError(
            f"There is no dtype {dtype!r}: use float32, bfloat16, float16 or 'auto'."
        )
    return value


@contextlib.contextmanager
def _one_sentence(name: str) -> Iterator[None]:
    """Turn what transformers raises on loading into one sentence; the rest stays in the cause."""
    try:
        yield
    except FoveateError:
        raise
    except Exception as error:  # damaged files and missing packages raise nearly anything
        text = str(error)
        if "trust_remote_code" in text or "custom code" in text:
            reason = "it needs code of its own: load it yourself and pass VLM(model, processor)"
        elif "torchvision" in text.lower():  # missing, or of another torch
            release = torch.__version__.partition("+")[0]
            reason = (
                "its processor needs the torchvision that belongs to your torch: "
                f"pip install torchvision torch=={release}, from the index your torch came from"
            )
        elif "does not recognize this architecture" in text:
            reason = f"transformers {compat.VERSION} does not know its architecture: upgrade it"
        else:
            reason = " ".join(text.split("\n\n")[0].split()).rstrip(".") or type(error).__name__
        raise FoveateError(f"{name} could not be loaded: {reason}.") from error
