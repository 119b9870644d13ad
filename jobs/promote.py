"""`ray job submit --working-dir . --runtime-env jobs/runtime_env.yaml -- python jobs/promote.py --help` tells more."""

from rayscale.cli import run_one
from rayscale.cli.promote import promote

if __name__ == "__main__":
    run_one(promote)
