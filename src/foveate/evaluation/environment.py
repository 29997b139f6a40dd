"""What answered: versions, hardware, the command. A reader needs it to repeat a run."""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..backends.transformers import compat
from ..base import __version__


def versions() -> dict[str, str]:
    """Whose answers a run's records are."""
    return {"foveate": __version__, "transformers": compat.VERSION}


def told(several: Iterable[Mapping[str, str]]) -> str:
    """Versions in words."""
    return ", ".join(" with ".join(f"{k} {v}" for k, v in each.items()) for each in several)


def environment(device: Any) -> dict[str, Any]:
    """What a reader needs to repeat a run on this `torch.device`."""
    import numpy
    import torch

    return {
        "foveate": __version__,
        "git": _git(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": compat.VERSION,
        "numpy": numpy.__version__,
        "device": str(device),
        "hardware": hardware(device),
        "threads": torch.get_num_threads(),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def hardware(device: Any) -> str:
    """The name of a `torch.device`'s card, or of the processor."""
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_name(device)
    cpus = Path("/proc/cpuinfo")
    if cpus.exists():
        for line in cpus.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _git() -> str | None:
    """The commit of this package's own checkout, with ``-dirty`` where it has been changed."""

    def ask(*words: str) -> str | None:
        try:
            said = subprocess.run(
                ["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True
            )
        except OSError:  # there is no git
            return None
        return said.stdout.strip() if said.returncode == 0 else None

    if ask("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    return ask("describe", "--always", "--dirty", "--abbrev=40", "--exclude", "*")
