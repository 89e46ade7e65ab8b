"""benchmarks/stages.py: one device, ours against stock."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import stages
import torch
from serving_models import model_path
from serving_workloads import WORKLOADS


def test_ours_and_stock_make_one_picture_and_all_figures_are_there(tmp_path: Path) -> None:
    workload = replace(WORKLOADS["tiny-flux"], steps=2)
    bench = stages.Bench(workload, model_path(workload, tmp_path), torch.device("cpu"), rounds=2)
    with torch.no_grad():
        bench.run(["eager", "offloaded"])
    figures = json.loads(json.dumps(bench.figures))
    for name in ("eager", "offloaded"):
        seen = figures["denoise"][name]
        assert seen["difference"]["max"] <= 1
        assert seen["ours"]["runs"] == 2 and 0 < seen["ours"]["min"] <= seen["ours"]["step"]
    assert figures["denoise"]["eager"]["stock"]["step"] > 0
    assert figures["encode"]["ms"] > 0 and figures["decode"]["ms"] > 0
    assert figures["bytes"]["conditioning"] > figures["bytes"]["latents"] > 0
    assert [row[0] for row in stages.rows(figures)] == ["stock, eager", "ours, eager", "ours, offloaded"]


def test_a_dit_ranks_memory_is_set_against_weights_activations_and_windows() -> None:
    bare = 20 * stages.GIB
    figures: dict[str, Any] = {
        "workload": {"name": "w"},
        "denoise": {"eager": {"peak": bare}},
        "bytes": {"conditioning": 4_000_000, "latents": 1_000_000},
    }
    dit, other = {"role": "dit", "peak": int(1.04 * bare)}, {"role": "non_dit", "peak": 40 * stages.GIB}
    served = {"systems": [{"name": "async 2+2", "sp": 1, "non_dit": 2, "memory": [dit, other]}]}
    (line,) = stages._memory(figures, served)
    assert "async 2+2" in line and "peaked at 20.80 GiB: +3.9%" in line and "20 MB" in line
