"""`ray job submit --working-dir . --runtime-env jobs/runtime_env.yaml -- python jobs/ingest.py --help` tells more."""

from rayscale.cli import run_one
from rayscale.cli.data import pack

if __name__ == "__main__":
    run_one(pack)
