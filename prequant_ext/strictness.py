"""Warnings that PREQUANT_STRICT=1 turns into errors."""

import os
import warnings


class PreQuantWarning(UserWarning):
    """Something works, but probably not as intended."""


def warn(message: str) -> None:
    """Warn the caller's caller; with PREQUANT_STRICT=1 in the environment, raise :class:`PreQuantWarning` instead."""
    if os.environ.get("PREQUANT_STRICT", "0") not in ("", "0"):
        raise PreQuantWarning(message)
    warnings.warn(message, PreQuantWarning, stacklevel=3)
