"""The hand-over law, for every number of connections, pages, breaks and recoveries.

After the switch to postcopy the guest runs at the destination with the pages that are there, and waits for those that are not. Its
memory at the source, or in a checkpoint, stands still: each page has one final version. This file says what the two sides do from
the last round on, and proves that the guest never reads anything else, and loses no write of its own.

Each page has a bit at the sender: the thread that sets it sends the page, for a request or in the background, and no other
does. When any connection is lost all are given up, with what is under way on them; recovery begins with what the destination
says it has. So it needs no memory of the sender: another process goes on where one was killed.

A connection is never used again. The destination gives old ones up before it says what it has, and that is a guard here.

**Not here:** partial pages (a page is placed whole, by one call of the kernel), the death of the destination, which takes the guest
along as it would without any migration, and a checkpoint that is started twice on purpose.
"""

from z3 import And, BoolSort, Const, DeclareSort, Exists, ForAll, If, Implies, Int, IntSort, Not, Or

from machine import Machine, State, Step, function, only, put

Connection, Page = DeclareSort("Connection"), DeclareSort("Page")
TRUTH, NUMBER = BoolSort(), IntSort()

final = function("final", Page, NUMBER)
"""The version of a page in the memory that stands still."""
clean = function("clean", Page, TRUTH)
"""Precopy sent the page, and the guest has not written it since: by the round law its final version is in place."""

c, d = Const("c", Connection), Const("d", Connection)
p, q = Const("p", Page), Const("q", Page)
one_line, other_line, third_line = (Const(name, Connection) for name in ("one_line", "other_line", "third_line"))
one_page, other_page = Const("one_page", Page), Const("other_page", Page)
# Parameters of steps.
C, P, V = Const("C", Connection), Const("P", Page), Int("V")

before = State(
    {
        name: function(name, *sorts)
        for name, sorts in {
            # The sender.
            "claimed": (Page, TRUTH),  # its bit is set
            "runs_at_source": (TRUTH,),
            "given": (TRUTH,),  # RUN is written
            # What is under way.
            "old": (Page, TRUTH),  # a copy of a round of precopy
            "flying": (Connection, Page, TRUTH),
            "run_comes": (TRUTH,),
            "used": (Connection, TRUTH),  # now, or before
            "line": (Connection,),  # one of those in use
            "alive": (Connection, TRUTH),
            "broken": (TRUTH,),  # none is in use
            # The destination.
            "settled": (TRUTH,),  # the last barrier has passed
            "placed": (Page, TRUTH),
            "discarded": (Page, TRUTH),  # it was told to give the page up, before it ran
            "content": (Page, NUMBER),
            "touched": (Page, TRUTH),  # the guest has written it there
            "wanted": (Page, TRUTH),  # the guest waits for it
            "runs": (TRUTH,),
            "done": (TRUTH,),
        }.items()
    }
)


def no_page(claim):
    return ForAll([p], Not(claim(p)))


def initial(s):
    return [
        ForAll([p], Implies(clean(p), And(s.placed(p), s.content(p) == final(p), Not(s.old(p))))),
        ForAll([p], And(s.claimed(p) == clean(p), Not(s.touched(p)), Not(s.wanted(p)), Not(s.discarded(p)))),
        ForAll([c, p], Not(s.flying(c, p))),
        ForAll([c], s.alive(c) == s.used(c)),
        s.alive(s.line),
        Not(Or(s.runs_at_source, s.given, s.run_comes, s.broken, s.settled, s.runs, s.done)),
    ]


WORKS = {"the migration has not ended": lambda s: Not(s.done)}
CONNECTED = {"the connections are in use": lambda s: Not(s.broken)}
DISCARDED = {"all that is not final was discarded": lambda s: ForAll([p], Or(clean(p), s.discarded(p)))}

STEPS = [
    Step(
        "round: a copy of the last round is put into place",
        (P, V),
        {"it is under way": lambda s: s.old(P)},
        lambda s: {"old": put(s.old, (P,), False), "placed": put(s.placed, (P,), True), "content": put(s.content, (P,), V)},
    ),
    Step("barrier: the last round ends", (), {"all of its copies are in place": lambda s: no_page(s.old), "not yet": lambda s: Not(s.settled)}, lambda s: {"settled": True}),
    Step(
        "discard: the destination gives up a page that is not final",
        (P,),
        {
            "the last barrier has passed": lambda s: s.settled,
            "it is not final": lambda s: Not(clean(P)),
            "not yet": lambda s: Not(s.discarded(P)),
        },
        lambda s: {"placed": put(s.placed, (P,), False), "discarded": put(s.discarded, (P,), True)},
    ),
    Step(
        "give: the source writes RUN",
        (),
        CONNECTED | DISCARDED | {"the last barrier has passed": lambda s: s.settled, "not yet": lambda s: Not(s.given), "the guest does not run there": lambda s: Not(s.runs_at_source)},
        lambda s: {"given": True, "run_comes": True},
    ),
    Step("run: the destination reads RUN, and runs the guest", (), {"it has come": lambda s: s.run_comes}, lambda s: {"run_comes": False, "runs": True}),
    Step(
        "resume: the source takes the guest back",
        (),
        {"RUN is not written": lambda s: Not(s.given), "not yet": lambda s: Not(s.runs_at_source)},
        lambda s: {"runs_at_source": True},
        is_fault=True,
    ),
    Step(
        "send: a thread sets the bit of a page, and sends it",
        (C, P),
        WORKS | CONNECTED | DISCARDED | {"the bit was not set": lambda s: Not(s.claimed(P)), "the connection is in use": lambda s: s.alive(C)},
        lambda s: {"claimed": put(s.claimed, (P,), True), "flying": put(s.flying, (C, P), True)},
    ),
    Step(
        "place: the destination places a page, and wakes who waits for it",
        (C, P),
        {"it is under way": lambda s: s.flying(C, P)},
        lambda s: {
            "flying": put(s.flying, (C, P), False),
            "placed": put(s.placed, (P,), True),
            "content": put(s.content, (P,), final(P)),
            "wanted": put(s.wanted, (P,), False),
        },
    ),
    Step(
        "write: the guest writes a page that is there",
        (P, V),
        {"it runs": lambda s: s.runs, "the page is there": lambda s: s.placed(P)},
        lambda s: {"content": put(s.content, (P,), V), "touched": put(s.touched, (P,), True)},
        is_fault=True,
    ),
    Step(
        "fault: the guest waits for a page that is not there",
        (P,),
        {"it runs": lambda s: s.runs, "the page is not there": lambda s: Not(s.placed(P)), "not yet": lambda s: Not(s.wanted(P))},
        lambda s: {"wanted": put(s.wanted, (P,), True)},
        is_fault=True,
    ),
    Step(
        "break: a connection is lost, all are given up",
        (),
        WORKS,
        lambda s: {"broken": True, "alive": lambda c: False, "flying": lambda c, p: False, "run_comes": False},
        is_fault=True,
    ),
    Step(
        "recover: a sender, perhaps another one, goes on with what the destination says it has",
        (C,),
        WORKS
        | {
            "the connections were lost": lambda s: s.broken,
            "the guest was given away": lambda s: And(s.given, s.runs),
            "its connection is a new one": lambda s: Not(s.used(C)),
        },
        lambda s: {
            "broken": False,
            "line": C,
            "alive": put(s.alive, (C,), True),
            "used": put(s.used, (C,), True),
            "claimed": lambda p: s.placed(p),
        },
        is_fault=True,
    ),
    Step(
        "end: both sides are done",
        (),
        WORKS | CONNECTED | {"the guest runs at the destination": lambda s: s.runs, "every page is there": lambda s: ForAll([p], s.placed(p))},
        lambda s: {"done": True},
    ),
]

INVARIANT = {
    "the guest runs nowhere twice": lambda s: And(
        Not(And(s.runs_at_source, Or(s.given, s.runs))), Implies(Or(s.run_comes, s.runs), s.given), Not(And(s.run_comes, s.runs))
    ),
    "behind the first discard the last round has ended": lambda s: And(
        Implies(s.settled, no_page(s.old)), Implies(s.given, s.settled), ForAll([p], Implies(s.discarded(p), s.settled))
    ),
    "what is not final is discarded before any page is sent again, and before RUN": lambda s: ForAll(
        [p, q], Implies(And(Not(clean(q)), Or(s.given, And(s.claimed(p), Not(clean(p))))), s.discarded(q))
    ),
    "a page that was discarded is not there until it was sent again": lambda s: ForAll([p], Implies(And(s.discarded(p), s.placed(p)), s.claimed(p))),
    "what is final was not discarded": lambda s: ForAll([p], Implies(s.discarded(p), Not(clean(p)))),
    "no round carries a page that is final": lambda s: ForAll([p], Implies(s.old(p), Not(clean(p)))),
    "where the guest runs, what is there was sent": lambda s: ForAll([p], Implies(And(s.given, s.placed(p)), s.claimed(p))),
    "what is there and was sent is final, or the guest has written it": lambda s: ForAll(
        [p], Implies(And(s.placed(p), s.claimed(p), Not(s.touched(p))), s.content(p) == final(p))
    ),
    "the guest has written only what is there": lambda s: ForAll([p], Implies(s.touched(p), And(s.runs, s.placed(p)))),
    "the guest waits only for what is not there": lambda s: ForAll([p], Implies(s.wanted(p), And(s.runs, Not(s.placed(p))))),
    "a page that precopy left final stays there, and is not sent again": lambda s: ForAll([p], Implies(clean(p), And(s.placed(p), s.claimed(p)))),
    "RUN is under way, or read, or lost with its connection": lambda s: Implies(s.given, Or(s.run_comes, s.runs, s.broken)),
    "a page under way has its bit set, is not there yet, and its connection is in use": lambda s: ForAll(
        [c, p], Implies(s.flying(c, p), And(s.claimed(p), Not(s.placed(p)), s.alive(c)))
    ),
    "a page is under way once": lambda s: ForAll([c, d, p], Implies(And(s.flying(c, p), s.flying(d, p)), c == d)),
    "a page whose bit is set is there or under way, unless the connections were lost": lambda s: ForAll(
        [p], Implies(And(s.claimed(p), Not(s.broken)), Or(s.placed(p), Exists([c], s.flying(c, p))))
    ),
    "connections that were lost are never in use again": lambda s: And(
        ForAll([c], Implies(s.alive(c), And(s.used(c), Not(s.broken)))), Implies(Not(s.broken), s.alive(s.line)), Implies(s.run_comes, Not(s.broken))
    ),
    "at the end every page is there": lambda s: Implies(s.done, And(s.runs, ForAll([p], s.placed(p)))),
}


def work_of_page(s, page):
    return If(s.claimed(page), 0, 2) + If(s.old(page), 2, 0) + If(Or(clean(page), s.discarded(page)), 0, 1)


def work_of_copy(s, connection, page):
    return If(s.flying(connection, page), 1, 0)


def other_work(s):
    return If(s.settled, 0, 1) + If(s.given, 0, 2) + If(s.run_comes, 1, 0) + If(s.done, 0, 1)


def takes_away(machine, step):
    """The step leaves less to do, and changes nothing but what belongs to one page and one copy."""
    s, t = machine.state, machine.state.after(step.effect(machine.state))
    less = work_of_page(t, P) + work_of_copy(t, C, P) + other_work(t) < work_of_page(s, P) + work_of_copy(s, C, P) + other_work(s)
    nowhere_more = ForAll(
        [c, p],
        And(
            Implies(p != P, work_of_page(t, p) == work_of_page(s, p)),
            Implies(Or(c != C, p != P), work_of_copy(t, c, p) == work_of_copy(s, c, p)),
        ),
    )
    return [step.guard(s)], And(less, nowhere_more)


def is_work(step):
    return not step.is_fault


THEOREMS = {
    "a page is placed only where none is, and never over a write of the guest": lambda m: (
        [m.step("place").guard(m.state)],
        And(Not(m.state.placed(P)), Not(m.state.touched(P))),
    ),
    "no page is placed twice after the hand-over": lambda m: ([m.step("send").guard(m.state), m.state.given], Not(m.state.placed(P))),
    "what the guest reads is the version that the source held, or its own": lambda m: (
        [m.state.runs, m.state.placed(P), Not(m.state.touched(P))],
        m.state.content(P) == final(P),
    ),
    "at the end the memory is the source's, with the guest's own writes": lambda m: (
        [m.state.done],
        ForAll([p], And(m.state.placed(p), Or(m.state.touched(p), m.state.content(p) == final(p)))),
    ),
    "the guest does not run on both sides": lambda m: ([], Not(And(m.state.runs, m.state.runs_at_source))),
    # Every wait ends in a page, or in a connection that can be replaced.
    "while the connections live some step is possible until both are done": lambda m: (
        [Not(m.state.broken), Not(m.state.done), Not(m.state.runs_at_source)],
        Or([step.possible(m.state) for step in m.steps if is_work(step)]),
    ),
    "a guest that runs and whose connections were lost can be recovered": lambda m: (
        [m.state.broken, m.state.runs, Not(m.state.done), Not(m.state.used(C))],
        m.step("recover").possible(m.state),
    ),
    "a page that the guest waits for is under way, or its bit is not set, or the connections were lost": lambda m: (
        [m.state.wanted(P), Not(m.state.broken)],
        Or(Not(m.state.claimed(P)), Exists([c], m.state.flying(c, P))),
    ),
    "no work is negative": lambda m: ([], ForAll([c, p], And(work_of_page(m.state, p) >= 0, work_of_copy(m.state, c, p) >= 0))),
} | {f"a step leaves less to do: {step.name}": lambda m, name=step.name: takes_away(m, m.step(name)) for step in STEPS if is_work(step)}


HAND_OVER_LAW = Machine(
    name="hand-over law",
    state=before,
    axioms=[],
    initial=initial,
    steps=STEPS,
    invariant=INVARIANT,
    theorems=THEOREMS,
    small=[*only(Connection, one_line, other_line, third_line), *only(Page, one_page, other_page)],
    witnesses={
        "an end at which the guest has written a page": lambda s: And(s.done, s.touched(one_page), Not(s.touched(other_page)), Not(clean(other_page))),
        "a recovery while the guest waits": lambda s: And(s.alive(other_line), s.used(one_line), Not(s.alive(one_line)), s.wanted(one_page), s.claimed(other_page)),
        "two pages under way on two connections": lambda s: And(s.flying(one_line, one_page), s.flying(other_line, other_page), s.runs),
        "a guest given away with RUN lost": lambda s: And(s.given, s.broken, Not(s.runs)),
    },
)
