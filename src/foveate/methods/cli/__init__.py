"""CLI, cross-layer injection: what is trained (`module`) and the method that applies it."""

from .method import CLI

__all__ = ["CLI"]
