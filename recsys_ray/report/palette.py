"""Colours of the plots that matplotlib draws."""

from __future__ import annotations

# Distinguishable with colour blindness, and on white as on near-black (after Okabe and Ito).
PALETTE = ("#8a8f98", "#d98a00", "#2f9fd8", "#00a37a", "#c46bae", "#7a6ff0", "#d1495b", "#4f7d75", "#a08a2e", "#5aa469")
