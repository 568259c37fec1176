"""The picture of the studies, from the results that are in the repository."""

from __future__ import annotations

import json
import shutil

import numpy as np

from jobs.studies import arms
from tests.imports import ROOT

RESULTS = ROOT / "docs" / "results" / "learning.json"


def test_every_task_is_a_panel_and_every_arm_a_bar():
    results = json.loads(RESULTS.read_text())
    panels = arms.draw(results).axes
    assert [panel.get_title(loc="left") for panel in panels] == [arms.TITLES[task] for task in results]
    for panel, result in zip(panels, results.values(), strict=True):
        rates = [arm["successes"] / arm["episodes"] for arm in result["arms"].values()]
        assert np.allclose([bar.get_width() for bar in panel.patches], rates)
        assert [text.get_text() for text in panel.texts] == [f"{a['successes']}/{a['episodes']}" for a in result["arms"].values()]


def test_the_picture_is_written_beside_the_results(tmp_path, capsys):
    assert arms.main(["--to", str(tmp_path)]) == 1 and "run jobs/studies/learning.py first" in capsys.readouterr().err
    shutil.copy(RESULTS, tmp_path)
    assert arms.main(["--to", str(tmp_path)]) == 0
    assert (tmp_path / "arms.png").read_bytes().startswith(b"\x89PNG")
