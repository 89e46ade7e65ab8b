"""Chosen workloads, all systems each, under one total time budget: what is run on a lent GPU machine.

    python benchmarks/gpu_session.py --workloads flux-schnell,wan2.1-1.3b-81f-4:2 --budget 530 --out $OUT

``NAME:SHARE`` gives a workload that share of the budget beside the others' 1. One JSON file a workload comes into the
folder, written after every system; tables and plots are made from them afterwards, elsewhere:
``python benchmarks/serving_report.py FILE...``.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from serving import LEAST_SECONDS, add_options, models_folder, options_of, run_workload
from serving_report import report
from serving_workloads import WORKLOADS


def parse_workloads(text: str) -> list[tuple[str, float]]:
    """``a,b:2`` -> ``[("a", 1.0), ("b", 2.0)]``.

    Raises:
        argparse.ArgumentTypeError: an unknown name, or a share that is no number above 0.
    """
    found = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, share = part.partition(":")
        if name not in WORKLOADS:
            raise argparse.ArgumentTypeError(f"there is no workload {name!r}; there are {', '.join(WORKLOADS)}")
        try:
            found.append((name, float(share or 1)))
        except ValueError:
            raise argparse.ArgumentTypeError(f"{share!r} is no share of the budget") from None
        if not found[-1][1] > 0:
            raise argparse.ArgumentTypeError(f"{share!r} is no share of the budget")
    return found


def share_of(workloads: Sequence[tuple[str, float]], number: int, left: float) -> float:
    """Seconds for workload ``number`` out of ``left``: what earlier ones did not use goes to the later ones."""
    return left * workloads[number][1] / sum(share for _, share in workloads[number:])


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--workloads", type=parse_workloads, required=True, metavar="NAME[:SHARE],...")
    arguments.add_argument("--budget", type=float, required=True, help="seconds for everything")
    arguments.add_argument("--out", type=Path, required=True, metavar="DIR")
    add_options(arguments)
    given = arguments.parse_args()
    began, served = time.monotonic(), 0
    with models_folder(given.models) as models:
        for number, (name, _) in enumerate(given.workloads):
            left = given.budget - (time.monotonic() - began)
            print(f"== {name}, {max(0.0, left):.0f} s left", flush=True)
            if left < LEAST_SECONDS:
                print(f"{name} is not run: no time left")
                continue
            options = options_of(given, share_of(given.workloads, number, left))
            try:
                result = run_workload(WORKLOADS[name], options, models, given.out / f"serving-{name}.json")
            except (RuntimeError, ValueError) as error:
                print(f"{name} failed: {error}", flush=True)
                continue
            served += any(record["status"] == "done" for record in result["systems"])
            print(report(result), flush=True)
    return 0 if served == len(given.workloads) else 1


if __name__ == "__main__":
    sys.exit(main())
