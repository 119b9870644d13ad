"""`ray job submit --working-dir . --runtime-env jobs/runtime_env.yaml -- python jobs/train.py --help` tells more."""

from rayscale.cli import run_one
from rayscale.cli.train import train

if __name__ == "__main__":
    run_one(train)
