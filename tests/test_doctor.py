"""`doctor` on this machine: every check with what is fine and what is not. `reach_cases.py` has a cluster of two nodes."""

import importlib.metadata
import json
import time

import pytest

from cosmos_ray.commands.cli import main
from cosmos_ray.diagnosis import checks
from cosmos_ray.diagnosis.nodes import Examiner


def only(findings):
    (finding,) = findings
    return finding


def test_a_machine_that_runs_these_tests_is_fine(tmp_path, capsys):
    assert main(["doctor", "--root", str(tmp_path / "runs"), "--json", str(tmp_path / "found.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "this machine" and lines[-1] == "all 9 checks on 1 node are fine"
    found = json.loads((tmp_path / "found.json").read_text())["this machine"]
    assert [one["check"] for one in found] == [
        "python", "packages", "rendering", "memory", "disk of Ray", "disk of the runs", "/dev/shm", "GPU", "runs"]
    assert all(one["good"] and not one["todo"] for one in found)
    assert list(tmp_path.iterdir()) == [tmp_path / "found.json"]  # it leaves nothing behind


def test_what_is_wrong_is_named_with_what_to_do_and_the_exit_code_says_so(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MUJOCO_GL", "teletype")
    monkeypatch.setattr(checks, "DISK_GB", 1e9)
    monkeypatch.setattr(checks, "SHM_GB", 1e9)
    monkeypatch.setattr(checks, "MEMORY_GB", 1e9)
    monkeypatch.setattr(checks, "PYTHONS", ((3, 5),))
    assert main(["doctor", "--root", str(tmp_path / "file" / "runs")]) == 1
    text = capsys.readouterr().out
    for line in ("-> take Python 3.5", "BAD  rendering        MUJOCO_GL=teletype is no backend of MuJoCo", "-> free 1e+09 GB: a small run",
                 "or give another $RAY_TMPDIR", "or give another --root", "docker run --shm-size=8g",
                 f"BAD  runs             cannot write to {tmp_path}/file/runs", "7 of 9 checks on 1 node found something to do"):
        assert line in text, line


def test_packages_that_are_missing_or_of_another_version_are_named():
    installed = importlib.metadata.version("numpy")
    asked = [f"numpy=={installed}", "numpy<0.1", "no-such-package==1.0", "nothing==1.0; extra == 'dev'"]
    finding = only(checks.pins(lambda: asked))
    assert not finding.good and finding.said == f"numpy {installed} is not <0.1; no-such-package is missing"
    assert "cluster/setup.sh" in finding.todo
    assert only(checks.pins(lambda: asked[:1])).said == "1 as pinned"


def test_without_an_installation_the_pins_of_the_checkout_count():
    def missing():
        raise importlib.metadata.PackageNotFoundError("cosmos-ray")

    finding = only(checks.pins(missing))
    assert finding.good and int(finding.said.split()[0]) > 15


def test_a_bucket_that_does_not_answer_is_one_line():
    nowhere = "s3://bucket/runs?scheme=http&endpoint_override=127.0.0.1:9&region=us-east-1"
    finding = only(checks.writes(nowhere))
    assert not finding.good and "credentials" in finding.todo and "\n" not in finding.said
    assert not list(checks.disk(nowhere))[1:]  # the runs take no room here


def test_rendering_that_is_off_is_named(monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "off")
    assert not only(checks.rendering()).good


def test_a_port_that_is_closed_is_named():
    here, there = Examiner(), Examiner()
    port = here.listen()
    assert there.knock([("127.0.0.1", port)]) == []
    here._ear.close()
    assert there.knock([("127.0.0.1", port)]) == [("127.0.0.1", port)]
    assert abs(there.clock() - time.time()) < 5


def test_a_cluster_that_does_not_answer_is_one_clear_line(capsys):
    assert main(["doctor", "--address", "127.0.0.1:9"]) == 2
    assert "no Ray cluster answers at 127.0.0.1:9" in capsys.readouterr().err


@pytest.mark.parametrize("command, line", [("docter", "doctor"), ("wy", "why")])
def test_a_mistyped_tool_is_suggested(command, line, capsys):
    assert main([command]) == 2
    assert line in capsys.readouterr().err
