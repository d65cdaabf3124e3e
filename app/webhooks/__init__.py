"""Webhooks (Standard Webhooks 1.0): which URLs may be called, and how one message is delivered."""

from typing import Any


def __getattr__(name: str) -> Any:
    """`app.webhooks.deliver`, by which jobs in Redis name the delivery. Loaded late: few who import this need it."""
    if name == "deliver":
        from app.webhooks.delivery import deliver

        return deliver
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
