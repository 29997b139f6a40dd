"""inspect-ai runs its tasks on any model and method of foveate.

    inspect eval task.py --model foveate/pocket -M method=clvs

inspect-ai imports this at every start, for any model, so the provider lies in a file of its own.
"""

from __future__ import annotations

from inspect_ai._util.error import PrerequisiteError
from inspect_ai.model import ModelAPI, modelapi


@modelapi(name="foveate")
def foveate() -> type[ModelAPI]:
    try:
        from .inspect_provider import Foveate
    except ImportError as error:
        raise PrerequisiteError(
            f"The provider foveate needs {error.name}: pip install 'foveate[serve]' brings it."
        ) from error
    return Foveate
