"""The files compat*.py know what transformers keeps private or has renamed, and no others do."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import foveate

SOURCE = Path(foveate.__file__).parent
FILES = sorted(path for path in SOURCE.rglob("*.py") if not path.name.startswith("compat"))
RENAMED = (  # names that some release from 5.0 on has changed, deprecated or may not have
    "past_key_values",
    "cache_params",
    "cache_position",
    "rope_deltas",
    "get_max_length",
    "get_max_cache_shape",
    "gradient_checkpointing_enable",
    "is_gradient_checkpointing",
    "activation_checkpointing",
    "mm_encoder_outputs",
    "image_processing_pil",
    "ALL_ATTENTION_FUNCTIONS",
    "AttentionInterface.register",
    "AttentionMaskInterface",
    "DynamicCache",
    "StaticCache",
    "QuantizedCache",
    "rotary_emb",
    "multi_modal_projector",
    "vision_tower",
    "num_items_in_batch",
    "transformers.__version__",
)


def problems(text: str, own: frozenset[str]) -> Iterator[str]:
    """What of a module belongs into compat.py; `own` are private names that foveate defines."""
    yield from (name for name in RENAMED if name in text)
    for node in ast.walk(ast.parse(text)):
        relative = isinstance(node, ast.ImportFrom) and node.level
        if relative:  # of our own folder of that name
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("transformers."):
            yield f"from {node.module} import"
        elif isinstance(node, ast.Import):
            yield from (f"import {a.name}" for a in node.names if a.name[:13] == "transformers.")
        elif isinstance(node, ast.Attribute) and _private(node.attr) and node.attr not in own:
            yield f".{node.attr}"


def _private(name: str) -> bool:
    python = ("_getframe", "_exit")
    return name.startswith("_") and not name.endswith("__") and name not in python


def _defined(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if isinstance(node.value, ast.Name) and node.value.id == "self":
                yield node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value  # __slots__


@pytest.fixture(scope="module")
def own() -> frozenset[str]:
    names = (name for path in FILES for name in _defined(ast.parse(path.read_text("utf-8"))))
    return frozenset(name for name in names if _private(name))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_no_other_file_names_them(path: Path, own: frozenset[str]) -> None:
    assert not sorted(set(problems(path.read_text("utf-8"), own)))


@pytest.mark.parametrize(
    "line",
    [
        "out.past_key_values",
        "model(**x, past_key_values=cache)",
        "config._attn_implementation",
        "from transformers.cache_utils import Cache",
        "import transformers.models.llava",
        "model._supports_mm_encoder_outputs()",
        "getattr(model, 'rope_deltas', None)",
    ],
)
def test_what_belongs_there_is_found(line: str, own: frozenset[str]) -> None:
    assert list(problems(line, own))
