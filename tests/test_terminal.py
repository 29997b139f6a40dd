"""What a terminal is sent."""

from __future__ import annotations

import re

import pytest

from foveate.base.progress import Progress

COLOUR = re.compile(r"\x1b\[(?:\d+;)*(?:3[0-8]|4[0-8]|9[0-7])(?:;\d+)*m")


@pytest.mark.parametrize("asked", [False, True])
def test_no_color_is_obeyed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], asked: bool
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    if asked:
        monkeypatch.setenv("NO_COLOR", "1")
    with Progress() as watch:
        watch(1, 2, "vanilla")
    shown = capsys.readouterr().err
    assert "vanilla" in shown
    assert bool(COLOUR.search(shown)) is not asked
