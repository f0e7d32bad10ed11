"""Proves the laws of multifd for any number of channels: `python3 proof`, with z3-solver from PyPI.

For each law: every condition is proved; every step, and every state that is named as a witness, is possible in the invariant; each
variant with a part left out fails a condition, or is proved where it is said to be harmless. Exits with 1 where one of these
is not so. Rows for `cargo xtask proof` go to the file `proof` below the directory `MULTIFD_REPORTS`, where that is set.
"""

import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

from z3 import get_version_string

from device_state_law import DEVICE_STATE_LAW
from device_state_law_variants import VARIANTS as DEVICE_STATE_VARIANTS
from hand_over_law import HAND_OVER_LAW
from hand_over_law_variants import VARIANTS as HAND_OVER_VARIANTS
from machine import Machine, Variant
from membership import MEMBERSHIP
from membership_variants import VARIANTS as MEMBERSHIP_VARIANTS
from round_law import ROUND_LAW
from round_law_variants import VARIANTS as ROUND_VARIANTS


LAWS = [
    (ROUND_LAW, ROUND_VARIANTS),
    (HAND_OVER_LAW, HAND_OVER_VARIANTS),
    (DEVICE_STATE_LAW, DEVICE_STATE_VARIANTS),
    (MEMBERSHIP, MEMBERSHIP_VARIANTS),
]


def prove(law: Machine, variants: list[Variant]) -> tuple[bool, str]:
    """Whether all of it holds, and a row for the report."""
    started = time.monotonic()
    missing, conditions = law.not_proved()
    proved = f"{conditions - len(missing)} of {conditions} conditions proved"
    print(f"{law.name}: {proved}, for any number of connections and pages")
    missing = [f"not proved: {name}" for name in missing]

    wanted = {step.name: step.guard(law.state) for step in law.steps}
    wanted |= {name: witness(law.state) for name, witness in law.witnesses.items()}
    impossible = [name for name, formula in wanted.items() if not law.is_possible(formula)]
    missing += [f"the invariant has no state for: {name}" for name in impossible]
    print(f"{law.name}: {len(wanted) - len(impossible)} of {len(wanted)} steps and witnesses are possible in the invariant")

    caught, harmless = 0, 0
    for variant in variants:
        if variant.harmless:
            not_proved, _ = variant.machine.not_proved(law)
            harmless += not not_proved
            missing += [f"{variant.row}: is said to be harmless, and is not proved: {name}" for name in not_proved[:1]]
            print(f"    harmless  {variant.row}: {variant.harmless}")
            continue
        failure = variant.machine.first_failure(law)
        caught += failure is not None
        missing += [] if failure else [f"{variant.row}: is not caught"]
        print(f"    caught    {variant.row}\n              {failure}")
    print(*missing, sep="\n")

    took = time.monotonic() - started
    row = (
        f"any-n | {law.name}, any number of channels and pages | {proved} | "
        f"{caught} of {len(variants) - harmless}, {harmless} harmless | {took:.0f} s"
    )
    return not missing, row


def prove_aside(index: int) -> tuple[bool, str, str]:
    """The same of the law with this index, and what it has printed."""
    with redirect_stdout(StringIO()) as said:
        holds, row = prove(*LAWS[index])
    return holds, row, said.getvalue()


def report(row: str) -> None:
    print(row)
    if directory := os.environ.get("MULTIFD_REPORTS"):
        with (Path(directory) / "proof").open("a") as file:
            file.write(row + "\n")


def main() -> int:
    print(f"Z3 {get_version_string()}")
    everything = True
    # Each in a process of its own, which has the formulas that were made so far. One that dies ends all.
    fork = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(mp_context=fork) as processes:
        for holds, row, said in processes.map(prove_aside, range(len(LAWS))):
            print(said, end="")
            report(row)
            everything &= holds
    return 0 if everything else 1


if __name__ == "__main__":
    sys.exit(main())
