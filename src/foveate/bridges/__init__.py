"""foveate inside other harnesses and engines. Each file is imported only by its harness."""

from typing import Any


def lmms_eval_models() -> Any:
    """lmms-eval's `ModelManifest` of `foveate`: the entry point ``lmms_eval.models``.

    lmms-eval calls it at every start, for any model, so nothing heavy is imported.
    """
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("foveate", simple_class_path=f"{__name__}.lmms.Foveate")
