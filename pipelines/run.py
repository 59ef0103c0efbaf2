"""Runs all stages, like ``recsys-ray run``: ``python -m pipelines.run --config configs/demo.yaml``.

Use it on a cluster: ``ray job submit -- python -m pipelines.run ...``.
"""

from __future__ import annotations

import sys

from pipelines.cli import main

if __name__ == "__main__":
    main(["run", *sys.argv[1:]])
