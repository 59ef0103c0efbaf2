"""The embedding study of a finished run, from the command line."""

from __future__ import annotations

import json

from pipeline_world import call, output


def test_a_finished_run_is_examined(small_run, tmp_path):
    done = call("study", "embedding", "--config", small_run.config, "--out", tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    figures = json.loads((tmp_path / "embedding.json").read_text(encoding="utf-8"))
    checks = {(check["what"], check["where"], check["of"]): check for check in figures["checks"]}
    metrics = json.loads((output(small_run.folder, "evaluation") / "metrics.json").read_text(encoding="utf-8"))
    rows = {(row["model"], row["item_type"], row["segment"]): row["hr_at_10"] for row in metrics}
    for kind in ("audiobook", "music", "podcast"):
        text, cosine = checks["HR@10", kind, "LLM-kNN"], checks["HR@10", kind, "cosine kNN"]
        assert text["reached"] == cosine["reached"] == rows["hgnn", kind, "warm"]
        assert text["target"] == rows["llm_knn", kind, "warm"]
        assert cosine["target"] > 0
    # The style that the world hides is in who has what, and not in the text.
    style = figures["style"]
    many = [style[name][1] for name in ("svd", "pmi_svd", "ials", "item2vec")]
    assert min(many) > max(style["text"][1], 0) + 0.05
    assert {row["vectors"] for row in figures["similar"]} == {"hgnn", "text", "svd", "pmi_svd", "ials", "item2vec"}
    assert "target" in done.stdout and "holds" in done.stdout
    assert not list((small_run.folder / "cache").glob("tmp*"))  # it leaves nothing behind
