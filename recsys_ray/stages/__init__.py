"""The stages of a run, in one chain; the runner; the evaluation."""
