"""The HGNN: one of two encoders over the same graph, with the same layers' interface.

``first(source, block)`` makes the state that an item keeps and sends, ``second(states, block)`` the embedding; an item
that comes after the training is embedded by both, over its own neighbourhood (recsys_ray/hgnn/inductive.py).
"""

from __future__ import annotations

from recsys_ray.config import HgnnConfig
from recsys_ray.hgnn.blocks import ItemTypes
from recsys_ray.hgnn.graphsage import GraphSage
from recsys_ray.hgnn.propagation import PropagationEncoder

Hgnn = PropagationEncoder | GraphSage


def make_hgnn(text_dim: int, config: HgnnConfig, types: ItemTypes) -> Hgnn:
    """The encoder that ``hgnn.encoder`` names, untrained."""
    made = PropagationEncoder if config.encoder == "propagation" else GraphSage
    return made(text_dim, config, types)
