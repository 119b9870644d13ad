"""`ray job submit --working-dir . --runtime-env jobs/runtime_env.yaml -- python jobs/upscale.py --help` tells more."""

from rayscale.cli import run_one
from rayscale.cli.upscale import upscale

if __name__ == "__main__":
    run_one(upscale)
