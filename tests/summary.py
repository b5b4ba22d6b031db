#!/usr/bin/env python3
"""Closing line of tests/run.sh: sums the results of its steps (RESULTS/steps) and of ctest (RESULTS/*.xml).

A program of ctest counts by its cases, as GoogleTest and pytest tell them, so that a skipped case can't hide in a
program that passed.
"""

from __future__ import annotations

import re
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import NamedTuple


class Counts(NamedTuple):
    passed: int = 0
    failed: int = 0
    skipped: int = 0

    def plus(self, other: Counts) -> Counts:
        return Counts(self.passed + other.passed, self.failed + other.failed, self.skipped + other.skipped)


def number(pattern: str, text: str) -> int:
    return sum(int(found) for found in re.findall(pattern, text))


def cases(output: str) -> Counts:
    """Cases of one program, all 0 when it told none."""
    if re.search(r"^\[={10}\] ", output, re.M):  # GoogleTest
        passed = number(r"(?m)^\[  PASSED  \] (\d+) tests?\.", output)
        failed = number(r"(?m)^\[  FAILED  \] (\d+) tests?, listed below", output)
        return Counts(passed, failed, number(r"(?m)^\[  SKIPPED \] (\d+) tests?, listed below", output))
    last = re.findall(r"(?m)^(?:=+ )?(\d+ (?:passed|failed|skipped|error).* in [\d.]+s.*)$", output)
    if not last:
        return Counts()
    found = {word: number(rf"(\d+) {word}", last[-1]) for word in ("passed", "failed", "skipped", "error")}
    return Counts(found["passed"], found["failed"] + found["error"], found["skipped"])


def program(case: ET.Element) -> Counts:
    counts = cases(case.findtext("system-out") or "")
    status = case.get("status")
    reason = case.find("skipped")
    asked = reason is not None and (reason.get("message") or "").startswith("SKIP_")  # SKIP_RETURN_CODE and friends
    if status == "disabled" or (status == "notrun" and asked):
        return Counts(skipped=1)
    if status in ("fail", "notrun"):  # notrun: its program is not there
        return counts if counts.failed else counts.plus(Counts(failed=1))  # it crashed or ran out of time
    return counts if any(counts) else Counts(passed=1)


def main() -> int:
    folder, seconds = Path(sys.argv[1]), int(sys.argv[2])
    total = Counts()
    failures: list[str] = []
    for line in (folder / "steps").read_text().splitlines():
        name, code = line.split()
        total = total.plus(Counts(failed=1) if int(code) else Counts(passed=1))
        failures += [name] if int(code) else []
    for path in sorted(folder.glob("*.xml")):
        for case in ET.parse(path).getroot().iter("testcase"):  # noqa: S314 - written by ctest just now
            counts = program(case)
            total = total.plus(counts)
            failures += [f"{path.stem}: {case.get('name')}"] if counts.failed else []
    for name in failures:
        print(f"failed: {name}")
    minutes = f"{seconds // 60} min" if seconds >= 60 else f"{seconds} s"
    print(f"kvshrink tests: {total.passed} passed, {total.failed} failed, {total.skipped} skipped in {minutes}")
    return 1 if total.failed or total.passed == 0 else 0


if __name__ == "__main__":
    sys.exit(main())
