"""``python -m prequant_ext.cli``: the command ``prequant``."""

from prequant_ext.cli import main

main()
