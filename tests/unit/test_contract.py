"""The OpenAPI is what the server does: schemathesis asks what the document allows and what it forbids."""

from __future__ import annotations

from collections import Counter

import pytest
import schemathesis
from late_world import make_late
from replica import Replica
from schemathesis.config import SchemathesisConfig
from schemathesis.engine import events, from_schema

from serve.app import create_app
from serve.security import SCOPES, make_key
from serve.settings import Settings


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("late")
    key = make_key(folder / "keys.jsonl", "schemathesis", SCOPES)
    replica = Replica(make_late(folder / "run").bundle, f"sqlite://{folder}/live.db", examples=True)
    return create_app(replica, Settings(keys=str(folder / "keys.jsonl"), rate=None)), key


_NOT_OURS = [
    "positive_data_acceptance",  # whether an item, a type or an event exists the bundle knows, not the schema
    # An id may hold slashes, so that the path of /similar is also one of an item, with its methods.
    "unsupported_method",
    "allow_header_conformance",
]


def cases_of(served, examples: int) -> Counter[str]:
    """Runs every phase with up to ``examples`` cases each, and asserts that no check fails; answers by status."""
    app, key = served
    config = {
        "auth": {"openapi": {"key": {"api_key": key}}},
        "continue-on-failure": True,
        "generation": {"max-examples": examples, "deterministic": True, "database": "none"},
        "checks": {name: {"enabled": False} for name in _NOT_OURS},
    }
    schema = schemathesis.openapi.from_asgi("/openapi.json", app, config=SchemathesisConfig.from_dict(config))
    answers, failures, phases = Counter[str](), [], set()
    for event in from_schema(schema).execute():
        assert not isinstance(event, events.NonFatalError | events.FatalError), event
        if isinstance(event, events.ScenarioFinished):
            phases.add(str(event.phase))
            answers.update(str(i.response.status_code) for i in event.recorder.interactions.values() if i.response)
            for case_id, checks in event.recorder.checks.items():
                case = event.recorder.cases[case_id].value
                failures += [
                    f"{case.method} {case.formatted_path} {case.query} {case.body!r}"[:500]
                    + f"\n  {check.failure_info.failure}"
                    for check in checks
                    if check.failure_info is not None
                ]
    assert not failures, "\n".join([f"{len(failures)} failures", *failures[:10]])
    assert {"examples", "coverage", "fuzzing"} <= phases
    return answers


def test_answers_are_as_documented(served):
    answers = cases_of(served, 15)
    assert answers["200"] > 30 and answers["422"] > 100 and answers.total() > 300


@pytest.mark.slow
def test_thousands_of_answers_are_as_documented(served):
    answers = cases_of(served, 300)
    assert answers["200"] > 300 and answers.total() > 3000
