"""The model card, and the way to the Hub. Delete this folder, and the lines that name it, if nothing is published."""

from .hub import Hub
from .model_card import write_card

__all__ = ["Hub", "write_card"]
