"""``python -m prequant_ext``: the doctor."""

import sys

from prequant_ext.doctor import main

sys.exit(main())
