"""The socket under the application."""

from __future__ import annotations

import math
from typing import Any

from ..errors import MissingExtra

__all__ = ["run"]


def run(app: Any, host: str, port: int, grace: float) -> None:
    """Serve until interrupted; open requests then have `grace` seconds to end."""
    try:
        import uvicorn
    except ImportError as error:
        raise MissingExtra("serving needs FastAPI and uvicorn: pip install 'veneer[serve]'") from error
    uvicorn.run(app, host=host, port=port, log_level="warning", timeout_graceful_shutdown=math.ceil(grace))
