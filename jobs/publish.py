"""`ray job submit --working-dir . --runtime-env jobs/runtime_env.yaml -- python jobs/publish.py --help` tells more."""

from rayscale.cli import run_one
from rayscale.cli.publish import publish

if __name__ == "__main__":
    run_one(publish)
