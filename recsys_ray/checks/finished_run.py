"""What the checks read of a finished run: its stages, and names for ids and times in messages."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import SupportsInt

from recsys_ray.config import Config, EventsConfig, GraphConfig
from recsys_ray.core.clock import is_leave_one_out
from recsys_ray.data.tables import Tables
from recsys_ray.data.validate import utc
from recsys_ray.graph.snapshots import Snapshot, snapshots_of
from recsys_ray.storage.artifacts import Artifact
from recsys_ray.two_tower.examples import HistoryRules


@dataclass(frozen=True)
class FinishedRun:
    """The stages of a run. What decided their output is read from their manifests, not from the configuration."""

    ingest: Artifact
    featurize: Artifact
    graph: Artifact
    hgnn: Artifact | None
    two_tower: Artifact | None
    config: Config

    @cached_property
    def snapshots(self) -> list[Snapshot]:
        return snapshots_of(self.graph.counts)

    @cached_property
    def graph_config(self) -> GraphConfig:
        return GraphConfig.model_validate(self.graph.manifest["config"]["graph"])

    @cached_property
    def tables(self) -> Tables:
        return Tables(self.ingest.path)

    @cached_property
    def positives(self) -> list[int]:
        """Codes of the positive events."""
        events = EventsConfig.model_validate(self.ingest.manifest["config"]["events"])
        return self.tables.codes(events.positives)

    @property
    def rules(self) -> HistoryRules:
        made = self.two_tower.manifest["config"]["two_tower"]["history"] if self.two_tower else None
        length = made or self.config.two_tower.history
        return HistoryRules(length, self.graph_config.window_days, self.graph_config.features_as_of)


class Words:
    """Ids and times as a sentence has them."""

    def __init__(self, ingest: Artifact) -> None:
        self._tables, self._events = Tables(ingest.path), ingest.counts["events"]
        self._logical = is_leave_one_out(ingest.counts)

    def item(self, gid: SupportsInt) -> str:
        return f'item "{self._tables.item_ids[int(gid)]}"'

    def user(self, uid: SupportsInt) -> str:
        return f'user "{self._tables.user_ids[int(uid)]}"'

    def event(self, code: SupportsInt) -> str:
        return str(self._events[int(code)])

    def time(self, moment: SupportsInt) -> str:
        return f"logical time {int(moment)}" if self._logical else utc(int(moment))
