"""The self-check under torchrun, as the guide runs it, and that it fails when something is wrong."""

from __future__ import annotations

from self_check import FILE, MODULE, NAMES, passed, torchrun


def test_four_processes_pass_and_print_what_the_guide_shows() -> None:
    result = torchrun(4, FILE)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[:4] == ["=" * 60, "Running Async Communication Tests", "Rank: 0/4", "=" * 60]
    assert tuple(passed(result)) == NAMES
    assert "[Rank 0] Async send initiated" in lines and "All tests passed! ✓" in lines


def test_a_wrong_byte_on_a_rank_that_does_not_print_fails_the_check() -> None:
    result = torchrun(2, *MODULE, "--corrupt-on", "1")
    assert result.returncode != 0
    assert "  ✗ FAILED: Async Batch Transfer" in result.stdout and "Disagg Topology" in passed(result)
    assert "[Rank 1] TransferCorrupt" in result.stdout
    assert "All tests passed" not in result.stdout
