"""How far every family is from transformers: the table in this folder's README.

    python experiments/parity/run.py --out experiments/parity/results.json
    python experiments/parity/run.py --small --out /tmp/parity.json    # CI: one family

It runs tests/unit/test_families.py, which compares and says by how much numbers differ.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[2]
COLUMNS = ("logits", "log-probs", "gradients", "sampler's log-probs")
TESTS = ("logits", "log_probs_and_gradients", "greedy_text", "export_is_equal_to_the_bit")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="results.json")
    parser.add_argument("--small", action="store_true", help="one family")
    options = parser.parse_args()
    wanted = " or ".join(f"test_{name}" for name in TESTS)
    if options.small:
        wanted = f"({wanted}) and granite"
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder, "results.xml")
        tests = ["tests/unit/test_families.py", "-k", wanted, f"--junitxml={results}"]
        plain = ["-o", "addopts=-q --strict-markers", "-p", "no:cacheprovider"]
        subprocess.run([sys.executable, "-m", "pytest", *tests, *plain], check=True, cwd=ROOT)
        cases = list(ElementTree.parse(results).getroot().iter("testcase"))
    families: dict[str, dict[str, float]] = {}
    for case in cases:
        family = families.setdefault(case.attrib["name"].partition("[")[2].rstrip("]"), {})
        family |= {p.attrib["name"]: float(p.attrib["value"]) for p in case.iter("property")}
    names = ("jax", "transformers", "torch")
    report = {
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "versions": {name: importlib.metadata.version(name) for name in names},
        "tests": len(cases),
        "families": families,
    }
    options.out.write_text(json.dumps(report, indent=2) + "\n")
    print("| `model_type` |", " | ".join(COLUMNS), "|")
    print("|---" * (len(COLUMNS) + 1) + "|")
    for name, family in families.items():
        print(f"| `{name}` |", " | ".join(f"{family[column]:.0e}" for column in COLUMNS), "|")


if __name__ == "__main__":
    main()
