"""Adapters and merged models in other programs' forms: matrices, ONNX."""

from __future__ import annotations
