"""One training in a process of its own: settings as JSON in, the result as one JSON line on standard output.    python -m prequant_ext.glue.worker SETTINGS"""

import json
import sys

from prequant_ext.glue.train import Settings, fine_tune

if __name__ == "__main__":
    print(fine_tune(Settings(**json.loads(sys.argv[1])))[2].to_json())
