"""The stages of a run: one thin module each, the runner, and the chain of all."""
