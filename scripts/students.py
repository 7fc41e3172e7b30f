"""Put the exported students of finished runs into the package, in float16: python scripts/students.py runs/sid runs/dmd ...

Writes `distill/assets/digits/RECIPE/` for each run: the model, and `made.json`, which says how it was made and what was
measured of what is stored: 2,000 class-balanced samples from the noise of the evaluation. Runs are of recipes as they are,
trained on the embedded digits with seed 0; one with a gate that did not hold is refused.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from distill.data.digits import Digits  # noqa: E402
from distill.evaluation.measure import Reference, measure  # noqa: E402
from distill.files import make_folder, read_json, sha256_file, write_json, write_safetensors  # noqa: E402
from distill.models.description import DESCRIPTION  # noqa: E402
from distill.models.features import load_digits64  # noqa: E402
from distill.models.native import load_model  # noqa: E402
from distill.models.shipped import MADE  # noqa: E402
from distill.models.weights import WEIGHTS  # noqa: E402

COUNT = 2000
KEPT = ("fd", "recall", "coverage", "class_std", "class_accuracy")


def measured(folder: Path) -> dict[str, float]:
    """Numbers of the samples of a model folder, as in the evaluation of a run."""
    torch.set_num_threads(1)
    generator, digits = load_model(folder), Digits()
    ids = torch.arange(COUNT)
    samples = torch.cat([generator.sample_ids(part, seed=0, stream="evaluate") for part in ids.split(500)])
    labels = generator.conditions.of(ids).get("label")
    reference = Reference(digits.images, digits.labels, load_digits64(), k=5)
    row = measure(samples, labels, reference, load_digits64())
    return {name: round(float(row[name]), 4) for name in KEPT}


def ship(run: Path, target: Path) -> None:
    """Write the student of a run. Raises ValueError for one whose gates did not all hold."""
    plan, found = read_json(run / "plan.json"), read_json(run / "metrics.json")
    if failed := [gate["name"] for gate in found["gates"] if not gate["passed"]]:
        raise ValueError(f"{run}: gates: found {failed} not held, expected a run that passes all")
    export = run / "export"
    described: dict[str, Any] = read_json(export / DESCRIPTION)
    folder = target / plan["recipe"]
    make_folder(folder)
    weights = {name: tensor.half() for name, tensor in load_file(export / WEIGHTS).items()}
    write_safetensors(folder / WEIGHTS, weights)
    stored = {"file": WEIGHTS, "sha256": sha256_file(folder / WEIGHTS), "dtype": "float16"}
    write_json(folder / DESCRIPTION, described | {"weights": stored})
    loaded = plan["stages"]["teacher"]["_target_"].endswith(".Load")
    more = " teacher=pretrained teacher.path=runs/instaflow/teacher" if loaded else ""
    made = {
        "recipe": plan["recipe"],
        "seed": plan["seed"],
        "command": f"python -m distill.train recipe={plan['recipe']}{more}",
        "gates": len(found["gates"]),
        "code": read_json(export / "artifact.json")["code"],
        "data": "the digits of scikit-learn (UCI, Optical Recognition of Handwritten Digits, CC BY 4.0)",
        "trained_weights": described["weights"]["sha256"],
        "stored": "float16",
        "samples": COUNT,
        "digits64": read_json(ROOT / "distill" / "assets" / "digits64.json")["sha256"],
        "measured": measured(folder),
    }
    write_json(folder / MADE, made)
    print(folder, made["measured"])


def main() -> None:
    """Ship the students of all given runs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of finished runs")
    parser.add_argument("--target", type=Path, default=ROOT / "distill" / "assets" / "digits")
    options = parser.parse_args()
    for run in options.runs:
        ship(run, options.target)


if __name__ == "__main__":
    main()
