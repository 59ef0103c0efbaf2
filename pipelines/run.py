"""All stages, as ``recsys-ray run`` runs them: ``python -m pipelines.run --config configs/demo.yaml``.

``ray job submit -- python -m pipelines.run ...`` runs it on a cluster.
"""

from __future__ import annotations

import sys

from pipelines.cli import main

if __name__ == "__main__":
    main(["run", *sys.argv[1:]])
