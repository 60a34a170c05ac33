"""What tests share: operands, toy models, libraries built for tests, helpers that run in processes of their own."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]  # of the checkout
