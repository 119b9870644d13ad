"""`ray job submit --working-dir . --runtime-env jobs/runtime_env.yaml -- python jobs/models.py --help` tells more."""

import sys

from rayscale.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "models")
    main()
