"""Rotary position embedding: the frequencies, cos/sin, the rotation, and the rope types that checkpoints declare."""

from posenc.rope.rotary import Arithmetic, Rotary, Style, fault_of, same_frequencies

__all__ = ["Arithmetic", "Rotary", "Style", "fault_of", "same_frequencies"]
