"""Coverage by package, out of what `make coverage` has measured: statements, those no test runs, and the share run."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from coverage import Coverage

PACKAGE = Path(__file__).parents[1] / "lit_safety"


def package_of(file: Path) -> str:
    """`data.reading` of `lit_safety/data/reading/order.py`; what stands at the top is of `lit_safety`."""
    return ".".join(file.relative_to(PACKAGE).parts[:-1]) or PACKAGE.name


def main() -> None:
    measured = Coverage()
    measured.load()
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for file in sorted(PACKAGE.rglob("*.py")):
        _, statements, _, missed, _ = measured.analysis2(str(file))
        for name in (package_of(file), "all"):
            counts[name][0] += len(statements)
            counts[name][1] += len(missed)
    print(f"{'package':28} {'statements':>10} {'missed':>7} {'run':>7}")
    for name, (statements, missed) in sorted(counts.items(), key=lambda one: (one[0] == "all", one[0])):
        share = 1 - missed / statements if statements else 1.0
        print(f"{name:28} {statements:10} {missed:7} {share:7.1%}")


if __name__ == "__main__":
    main()
