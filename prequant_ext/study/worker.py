"""One training in a process of its own: settings as JSON in, the result as one JSON line on standard output.

python -m prequant_ext.study.worker SETTINGS
torchrun --nproc-per-node 2 -m prequant_ext.study.worker SETTINGS       data-parallel; the first process speaks
"""

import json
import os
import sys

from prequant_ext.glue.train import Settings, fine_tune

if __name__ == "__main__":
    result = fine_tune(Settings(**json.loads(sys.argv[1])))[2]
    if os.environ.get("RANK", "0") == "0":
        print(result.to_json())
