"""All studies by name."""

from __future__ import annotations

from recsys_ray.studies.amount import AMOUNT
from recsys_ray.studies.audiences import COLD_USERS, FOUNDATION_TYPE, INCUMBENT_TYPE, LONG_TAIL
from recsys_ray.studies.paper import PAPER
from recsys_ray.studies.parts import CADENCE, PARTS, SAMPLER_COST, WINDOW
from recsys_ray.studies.permutation import PERMUTATION
from recsys_ray.studies.study import Study

STUDIES: dict[str, Study] = {
    study.name: study
    for study in (
        PAPER, PARTS, SAMPLER_COST, COLD_USERS, LONG_TAIL, INCUMBENT_TYPE, CADENCE, WINDOW, FOUNDATION_TYPE,
        AMOUNT, PERMUTATION,
    )
}  # fmt: skip
