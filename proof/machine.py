"""A state machine over sets of any size, and the conditions under which its invariant is one.

A state is a set of named functions of Z3. A step has parameters, guards and an effect. Each guard is a formula under a sentence
of English, so that a broken machine is named by the sentence that it lacks. The state after a step is not a second set of
functions: it is made of expressions over the state before it, so nothing has to be said of what stays as it is.

Z3 decides each condition alone: the hypotheses and the negated claim have no model. An answer of "unknown" counts as not
proved.
"""

from dataclasses import dataclass, replace
from typing import Callable

import z3

EFFORT = 60_000_000
"""What Z3 may do for one condition, far above what any of them takes. It is counted in steps: a slow machine proves the same."""
LITTLE_EFFORT = 3_000_000


class State:
    """The functions of a state, or expressions in their place."""

    def __init__(self, fields: dict):
        self.__dict__.update(fields)

    def after(self, effect: dict) -> "State":
        return State({**self.__dict__, **effect})


@dataclass(frozen=True)
class Step:
    """One thing that one thread does, or one thing that goes wrong."""

    name: str
    parameters: tuple
    guards: dict[str, Callable[[State], z3.BoolRef]]
    effect: Callable[[State], dict]
    is_fault: bool = False
    """It may happen, and nothing may depend on it."""

    def guard(self, state: State):
        return z3.And([guard(state) for guard in self.guards.values()])

    def possible(self, state: State):
        """The step can be made, with some values of its parameters."""
        guard = self.guard(state)
        return z3.Exists(list(self.parameters), guard) if self.parameters else guard


@dataclass(frozen=True)
class Machine:
    """What there is, what may happen, and what is claimed of it."""

    name: str
    state: State
    axioms: list
    initial: Callable[[State], list]
    steps: list[Step]
    invariant: dict[str, Callable[[State], z3.BoolRef]]
    theorems: dict[str, Callable[["Machine"], tuple]]
    """Each gives hypotheses beside the invariant, and the claim."""
    small: list
    """Formulas that leave some connections and pages only, where a state is to be found and not to be excluded."""
    witnesses: dict[str, Callable[[State], z3.BoolRef]]
    """What the invariant has to allow, beside each step: a proof about states that there are not would be worth nothing."""
    small_first: bool = False
    """Where sums or many sorts make it hard to find a counterexample, only small ones are looked for."""

    def step(self, name: str) -> Step:
        """The step whose name begins with this word."""
        return next(step for step in self.steps if step.name == name or step.name.startswith(name + ":"))

    def with_step(self, changed: Step) -> "Machine":
        return replace(self, steps=[changed if step.name == changed.name else step for step in self.steps])

    def without(self, step: str, *sentences: str) -> "Machine":
        """This machine, without guards of a step."""
        old = self.step(step)
        unknown = set(sentences) - set(old.guards)
        assert not unknown, f"{step} has no guard {unknown}"
        kept = {sentence: guard for sentence, guard in old.guards.items() if sentence not in sentences}
        return self.with_step(replace(old, guards=kept))

    def with_guard(self, step: str, sentence: str, guard: Callable) -> "Machine":
        """This machine, with a guard of a step in place of the one of this sentence, or beside the others."""
        old = self.step(step)
        return self.with_step(replace(old, guards={**old.guards, sentence: guard}))

    def with_effect(self, step: str, change: Callable[[State, dict], dict]) -> "Machine":
        """This machine, with another effect of a step."""
        old = self.step(step)
        return self.with_step(replace(old, effect=lambda state: change(state, old.effect(state))))

    def invariants(self, state: State) -> list:
        return [claim(state) for claim in self.invariant.values()]

    def conditions(self, base: "Machine | None" = None):
        """All that has to be proved, or what has to be proved again where `base` was: a name, the hypotheses, the claim."""
        state = self.state
        for sentence, claim in self.invariant.items() if base is None else ():
            yield f"at the beginning: {sentence}", self.initial(state), claim(state)
        for step in self.steps:
            if base is not None and any(step is proved for proved in base.steps):
                continue
            hypotheses = [*self.invariants(state), step.guard(state)]
            after = state.after(step.effect(state))
            for sentence, claim in self.invariant.items():
                yield f"after {step.name}: {sentence}", hypotheses, claim(after)
        for sentence, theorem in self.theorems.items():
            hypotheses, claim = theorem(self)
            if base is not None and self.axioms == base.axioms and self.invariant is base.invariant and same((hypotheses, claim), theorem(base)):
                continue
            yield f"theorem: {sentence}", [*self.invariants(state), *hypotheses], claim

    def not_proved(self, base: "Machine | None" = None) -> tuple[list[str], int]:
        """The conditions that are not proved, and how many there are."""
        answers = [(name, self.refute(hypotheses, claim)) for name, hypotheses, claim in self.conditions(base)]
        return [name for name, answer in answers if answer != z3.unsat], len(answers)

    def first_failure(self, base: "Machine") -> str | None:
        """A condition that is known to be wrong: with a counterexample, where need be among the small ones."""
        conditions = self.conditions(base)
        if not self.small_first:
            undecided = []
            for name, hypotheses, claim in conditions:
                match self.refute(hypotheses, claim, LITTLE_EFFORT):
                    case z3.sat:
                        return name
                    case z3.unknown:
                        undecided.append((name, hypotheses, claim))
            conditions = undecided
        small = (name for name, hypotheses, claim in conditions if self.refute([*self.small, *hypotheses], claim) == z3.sat)
        return next(small, None)

    def refute(self, hypotheses: list, claim, effort: int = EFFORT):
        # What a sentence speaks of is often nothing that the step changes.
        if any(claim.eq(hypothesis) for hypothesis in hypotheses):
            return z3.unsat
        return check([*self.axioms, *hypotheses, z3.Not(claim)], effort)

    def is_possible(self, wanted) -> bool:
        """There is a small state of the invariant in which `wanted` holds."""
        return check([*self.axioms, *self.small, *self.invariants(self.state), wanted], EFFORT) == z3.sat


def same(one: tuple, other: tuple) -> bool:
    """Both are the same hypotheses, and the same claim."""
    (hypotheses, claim), (others, other_claim) = one, other
    return len(hypotheses) == len(others) and claim.eq(other_claim) and all(a.eq(b) for a, b in zip(hypotheses, others))


def check(formulas: list, effort: int):
    solver = z3.Solver()
    solver.set("rlimit", effort)
    solver.add(*formulas)
    return solver.check()


def function(name: str, *sorts):
    """A function of the state, of these arguments and, last, this result. Without arguments it is a constant."""
    return z3.Function(name, *sorts) if len(sorts) > 1 else z3.Const(name, sorts[0])


def put(old, place: tuple, value):
    """The function `old` with `value` at `place`."""
    return lambda *arguments: z3.If(z3.And([a == b for a, b in zip(arguments, place)]), value, old(*arguments))


@dataclass(frozen=True)
class Variant:
    """A machine with something done wrong, or left out."""

    row: str
    """The name of the same variant in multifd-model's table, which has its shortest trace; or none there, in brackets."""
    machine: Machine
    harmless: str = ""
    """Why it is proved all the same, where it is."""


def only(sort, *elements) -> list:
    """The sort has these elements, and no other."""
    any_one = z3.Const("any_one", sort)
    return [z3.ForAll([any_one], z3.Or([any_one == element for element in elements])), z3.Distinct(*elements)]
