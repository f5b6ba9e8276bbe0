"""Arithmetic on adapters' files, without their base: sums, other ranks, other forms, and extraction from models."""

from __future__ import annotations

from .combination import combine_adapters, resize_adapter
from .extraction import extract_lora
from .formats import convert_file

__all__ = ["combine_adapters", "convert_file", "extract_lora", "resize_adapter"]
