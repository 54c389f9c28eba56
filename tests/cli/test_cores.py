"""When threads that wait sleep."""

from __future__ import annotations

import pytest
from upo_cli import cores


@pytest.mark.parametrize(
    ("loads", "given", "expected"),
    [
        ("0.10 0.20 0.30 1/80 99\n", {}, {}),
        ("0.10 0.20 0.30 2/80 99\n", {}, {"OMP_WAIT_POLICY": "PASSIVE"}),
        ("0.10 0.20 0.30 2/80 99\n", {"OMP_WAIT_POLICY": "ACTIVE"}, {"OMP_WAIT_POLICY": "ACTIVE"}),
        ("0.10 0.20 0.30 2/80 99\n", {"GOMP_SPINCOUNT": "5"}, {"GOMP_SPINCOUNT": "5"}),
        ("nothing\n", {}, {"OMP_WAIT_POLICY": "PASSIVE"}),
        (None, {}, {"OMP_WAIT_POLICY": "PASSIVE"}),
    ],
)
def test_threads_sleep_where_others_run_or_that_is_not_known(tmp_path, loads, given, expected):
    file = tmp_path / "loadavg"
    if loads is not None:
        file.write_text(loads)
    environment = dict(given)
    cores.choose_waiting(environment, file)
    assert environment == expected


def test_one_quiet_look_is_enough(tmp_path, monkeypatch):
    """What runs for a moment only does not count."""
    file = tmp_path / "loadavg"
    file.write_text("0 0 0 3/80 99\n")
    looks = []

    def sleep(seconds):
        looks.append(seconds)
        if len(looks) == 3:
            file.write_text("0 0 0 1/80 99\n")

    monkeypatch.setattr(cores.time, "sleep", sleep)
    environment: dict[str, str] = {}
    cores.choose_waiting(environment, file)
    assert environment == {} and looks == [0, cores.APART, cores.APART]
