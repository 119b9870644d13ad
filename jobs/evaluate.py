"""`ray job submit --working-dir . --runtime-env jobs/runtime_env.yaml -- python jobs/evaluate.py --help` tells more."""

from rayscale.cli import run_one
from rayscale.cli.evaluate import evaluate

if __name__ == "__main__":
    run_one(evaluate)
