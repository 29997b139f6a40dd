"""The front door: a model and its processor by name, chats, answers, a second look."""

from .vlm import VLM

__all__ = ["VLM"]
