"""Serving a base model and its adapters over HTTP: one continuous batch in which rows use different adapters."""

from __future__ import annotations
