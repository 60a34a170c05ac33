"""One training in a process of its own: RunSettings as JSON in, its RunResult as one JSON line on standard output.

python -m prequant_ext.study.worker SETTINGS
torchrun --nproc-per-node 2 -m prequant_ext.study.worker SETTINGS       data-parallel; the first process speaks
"""

import json
import os
import sys

from prequant_ext.glue.run import RunSettings
from prequant_ext.glue.train import fine_tune

if __name__ == "__main__":
    result = fine_tune(RunSettings(**json.loads(sys.argv[1])))[2]
    if os.environ.get("RANK", "0") == "0":
        print(result.to_json())
