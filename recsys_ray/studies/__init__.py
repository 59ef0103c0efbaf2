"""The papers' claims as experiments that anyone can repeat: ``recsys-ray study NAME``."""

EMBEDDING = "embedding"  # examines a finished run; the other studies run variants of a configuration
NAMES = (  # here, so that the command line can name them without importing torch
    "paper", "parts", "sampler-cost", "cold-users", "long-tail", "incumbent-type", "cadence", "window",
    "foundation-type", "amount", "permutation", EMBEDDING,
)  # fmt: skip
