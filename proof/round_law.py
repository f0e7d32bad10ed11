"""The round law, for every number of channels, pages, rounds and writes.

The destination puts copies of pages into memory as they come, on connections that promise nothing about each other. It may
do so because rounds do not mix: what was sent in one round is in place before anything of the next is. This file says what
the two sides do, and proves that then the destination starts with the memory that the source had.

**Main is a connection like the others.** It ends a round with FLUSH where a channel ends it with SYNC. Where the source names
zero pages on main, main carries copies, too; elsewhere it carries none, and the proof shows which waits of main are needed for
that reason alone. Both are one machine: `zeros_on_main` is a constant that may have either value.

**Both dialects are one machine.** Where each section ends with a sync point, a round of the dirty bitmap is several sections, and
pages that one section leaves are sent in a later one. So nothing here says that a channel has to be out of pages to write SYNC.
The same holds for a page that
main leaves to a later round, as a source does with pages that are written again before they are sent: it stays among those to be sent.
"Round" means what lies between two sync points. Round 0 is the set-up, which has a sync point and no page.

**Main alone**, without any channel, is a case of one channel: of one that finds every page to be one that it leaves to main, and whose
SYNCs are there at once. Nothing here says that a page which is left to main is zero. The engine's tests translate the steps of such a
migration into these (`multifd/src/testing/main_alone.rs`), so there is always a channel here.

**A version is a number.** Each write of the guest makes some version, perhaps an old one again. A copy that is read while the guest
writes may be a mixture, so it has any version at all; but then the log knows of the write.

**Not here:** that the destination knows which channels there are (`membership.py`, with numbers of packets), what happens to the VM
when one side fails (the commit's model: here a source that gave up after its end would be a theorem lost, and a variant
shows it), and time. That every page that the guest writes is in the log is the tracking law, an assumption here, and a variant too.
"""

from z3 import And, BoolSort, Const, DeclareSort, Exists, ForAll, If, Implies, Int, IntSort, Not, Or, substitute

from machine import Machine, State, Step, function, only, put

Connection, Page = DeclareSort("Connection"), DeclareSort("Page")
TRUTH, NUMBER = BoolSort(), IntSort()

main = Const("main", Connection)
zeros_on_main = Const("zeros_on_main", TRUTH)

c, d = Const("c", Connection), Const("d", Connection)
p, k = Const("p", Page), Int("k")
some_channel, other_channel = Const("some_channel", Connection), Const("other_channel", Connection)
one_page, other_page = Const("one_page", Page), Const("other_page", Page)
# Parameters of steps.
C, P, K, V = Const("C", Connection), Const("P", Page), Int("K"), Int("V")

before = State(
    {
        name: function(name, *sorts)
        for name, sorts in {
            # The source.
            "memory": (Page, NUMBER),  # the version that the guest sees
            "dirty": (Page, TRUTH),  # the log has a write that no drain has reported
            "todo": (Page, TRUTH),  # reported by a drain, and no channel has taken it
            "held": (Page, TRUTH),  # a channel has taken it, and has not written its copy
            "holder": (Page, Connection),  # that channel
            "zero": (Page, TRUTH),  # a channel found it to be zero, and main has not named it
            "zero_version": (Page, NUMBER),
            "round": (NUMBER,),  # the round that is open
            "sent": (Connection, NUMBER),  # SYNCs written on a channel, FLUSHes on main
            "paused": (TRUTH,),  # the guest stands still
            "ended": (TRUTH,),  # device state and the end of the stream are written on main
            "resumed": (TRUTH,),  # the source has given up, and the guest runs on there
            # What is under way. A copy of round k lies between sync points k - 1 and k of its connection.
            "flying": (Connection, Page, NUMBER, TRUTH),
            "version": (Connection, Page, NUMBER, NUMBER),
            "dead": (Connection, TRUTH),
            # The destination.
            "taken": (Connection, NUMBER),  # sync points that it has read from a connection
            "passed": (NUMBER,),  # barriers that all connections have passed
            "content": (Page, NUMBER),  # the version in its memory
            "stamp": (Page, NUMBER),  # the round of the copy that it came from; -1: of none
            "started": (TRUTH,),
            "refused": (TRUTH,),  # it has given up
            # For the proof alone: the last copy that was made of a page.
            "last": (Page, NUMBER),  # its round; -1: there is none
            "last_version": (Page, NUMBER),
            "last_on": (Page, Connection),
        }.items()
    }
)


def every_channel(claim):
    return ForAll([c], Implies(c != main, claim(c)))


def no_page(claim):
    return ForAll([p], Not(claim(p)))


def initial(s):
    return [
        s.round == 0,
        # There is no page in the set-up, so no barrier behind it: channels may come later than that.
        s.passed == 1,
        ForAll([c], And(s.sent(c) == 0, s.taken(c) == 0, Not(s.dead(c)))),
        ForAll([p], And(s.dirty(p), s.stamp(p) == -1, s.last(p) == -1)),
        no_page(lambda p: Or(s.todo(p), s.held(p), s.zero(p))),
        ForAll([c, p, k], Not(s.flying(c, p, k))),
        Not(Or(s.paused, s.ended, s.resumed, s.started, s.refused)),
    ]


SOURCE_WORKS = {"the source has neither ended nor given up": lambda s: Not(Or(s.ended, s.resumed))}
DESTINATION_WORKS = {"the destination has neither started nor given up": lambda s: Not(Or(s.started, s.refused))}
ROUND_ENDED = {"every channel has written SYNC of the round": lambda s: every_channel(lambda c: s.sent(c) == s.round + 1)}
ZEROS_NAMED = {"no zero page is left to name": lambda s: no_page(s.zero)}
# A copy that was read during a write is a mixture; the log has that write.
AS_READ = {"the copy is what memory holds, or the log knows better": lambda s: Or(V == s.memory(P), s.dirty(P))}
MY_ROUND = {"the channel has not ended the round": lambda s: And(C != main, s.sent(C) == s.round)}
BEHIND_BARRIER = {"all connections have passed the barrier behind its last sync point": lambda s: s.passed >= s.taken(C)}
ALIVE = {"its connection is alive": lambda s: Not(s.dead(C))}


def copied(s, connection, version, at):
    """A copy of P is put on a connection: it is the last one."""
    return {
        # What is written to a connection that is dead is lost; the source may not know it yet.
        "flying": put(s.flying, (connection, P, at), Not(s.dead(connection))),
        "version": put(s.version, (connection, P, at), version),
        "last": put(s.last, (P,), at),
        "last_version": put(s.last_version, (P,), version),
        "last_on": put(s.last_on, (P,), connection),
    }


def drained(s):
    return {"round": s.round + 1, "todo": lambda p: Or(s.todo(p), s.dirty(p)), "dirty": lambda p: False}


STEPS = [
    Step(
        "write: the guest writes, and the log knows",
        (P, V),
        {"the guest runs at the source": lambda s: Not(s.paused)},
        lambda s: {"memory": put(s.memory, (P,), V), "dirty": put(s.dirty, (P,), True)},
        is_fault=True,
    ),
    Step("pause: the source pauses the guest", (), SOURCE_WORKS | {"it runs": lambda s: Not(s.paused)}, lambda s: {"paused": True}),
    Step("drain: main opens a round with what the log has", (), SOURCE_WORKS | ROUND_ENDED | ZEROS_NAMED, drained),
    Step("section: main opens a round with what the last one left", (), SOURCE_WORKS | ROUND_ENDED | ZEROS_NAMED, lambda s: {"round": s.round + 1}),
    Step(
        "take: a channel takes a page",
        (C, P),
        SOURCE_WORKS | MY_ROUND | {"no channel has taken it": lambda s: s.todo(P)},
        lambda s: {"todo": put(s.todo, (P,), False), "held": put(s.held, (P,), True), "holder": put(s.holder, (P,), C)},
    ),
    Step(
        "send: it reads the page, and writes a copy",
        (C, P, V),
        SOURCE_WORKS | AS_READ | {"it has taken it": lambda s: And(s.held(P), s.holder(P) == C)},
        lambda s: {"held": put(s.held, (P,), False)} | copied(s, C, V, s.sent(C)),
    ),
    Step(
        "find: it reads the page, which is zero, and leaves it to main",
        (C, P, V),
        SOURCE_WORKS | AS_READ | {"it has taken it": lambda s: And(s.held(P), s.holder(P) == C), "main names zero pages": lambda s: zeros_on_main},
        lambda s: {"held": put(s.held, (P,), False), "zero": put(s.zero, (P,), True), "zero_version": put(s.zero_version, (P,), V)},
    ),
    Step(
        "name: main names a zero page",
        (P,),
        SOURCE_WORKS | {"a channel found it": lambda s: s.zero(P), "main has not ended the round": lambda s: s.sent(main) == s.round},
        lambda s: {"zero": put(s.zero, (P,), False)} | copied(s, main, s.zero_version(P), s.round),
    ),
    Step(
        "sync: a channel writes SYNC",
        (C,),
        SOURCE_WORKS | MY_ROUND | {"it holds no page": lambda s: ForAll([p], Not(And(s.held(p), s.holder(p) == C)))},
        lambda s: {"sent": put(s.sent, (C,), s.sent(C) + 1)},
    ),
    Step(
        "flush: main writes FLUSH",
        (),
        SOURCE_WORKS
        | {
            "the round is open": lambda s: s.sent(main) <= s.round,
            # Without zero pages on main, at any time: early, late, or rounds later.
            "where main names zero pages, it has named those of the round": lambda s: Implies(
                zeros_on_main, And(every_channel(lambda c: s.sent(c) > s.sent(main)), Or(s.sent(main) < s.round, no_page(s.zero)))
            ),
        },
        lambda s: {"sent": put(s.sent, (main,), s.sent(main) + 1)},
    ),
    Step(
        "end: main writes the end of the stream",
        (),
        SOURCE_WORKS
        | ROUND_ENDED
        | ZEROS_NAMED
        | {
            "the guest stands still": lambda s: s.paused,
            "every write was drained and sent": lambda s: no_page(lambda p: Or(s.dirty(p), s.todo(p))),
            "main has written FLUSH of the last round": lambda s: s.sent(main) == s.round + 1,
        },
        lambda s: {"ended": True},
    ),
    Step(
        "apply: a copy is put into place",
        (C, P, K),
        DESTINATION_WORKS | ALIVE | BEHIND_BARRIER | {"it is the next on its connection": lambda s: And(s.flying(C, P, K), s.taken(C) == K)},
        lambda s: {"flying": put(s.flying, (C, P, K), False), "content": put(s.content, (P,), s.version(C, P, K)), "stamp": put(s.stamp, (P,), K)},
    ),
    Step(
        "arrive: a connection reads its SYNC, or FLUSH",
        (C,),
        DESTINATION_WORKS
        | ALIVE
        | BEHIND_BARRIER
        | {
            "it was written": lambda s: s.sent(C) > s.taken(C),
            "all that was written before it is in place": lambda s: ForAll([p], Not(s.flying(C, p, s.taken(C)))),
        },
        lambda s: {"taken": put(s.taken, (C,), s.taken(C) + 1)},
    ),
    Step(
        "pass: all are there, and pass the barrier",
        (),
        DESTINATION_WORKS
        | {
            "every channel has read its SYNC": lambda s: every_channel(lambda c: s.taken(c) > s.passed),
            "main has read its FLUSH": lambda s: s.taken(main) > s.passed,
        },
        lambda s: {"passed": s.passed + 1},
    ),
    Step(
        "start: the destination starts the guest",
        (),
        DESTINATION_WORKS
        | {
            "the end of the stream has come": lambda s: And(s.ended, Not(s.dead(main))),
            "main has read all that was before it": lambda s: s.taken(main) == s.sent(main),
            "main has passed the last barrier": lambda s: s.passed >= s.taken(main),
        },
        lambda s: {"started": True},
    ),
    Step(
        "lose: a connection dies, with what is under way on it",
        (C,),
        {},
        lambda s: {"dead": put(s.dead, (C,), True), "flying": lambda c, p, k: And(c != C, s.flying(c, p, k))},
        is_fault=True,
    ),
    Step("resume: the source gives up, and the guest runs on", (), SOURCE_WORKS, lambda s: {"resumed": True, "paused": False}, is_fault=True),
    Step("refuse: the destination gives up", (), DESTINATION_WORKS, lambda s: {"refused": True}, is_fault=True),
]

# The waits of main are needed where main carries copies; elsewhere it may be anywhere.
INVARIANT = {
    "no sync point is read before it is written, and none is written before its round is open": lambda s: And(
        s.round >= 0, 1 <= s.passed, s.passed <= s.round + 1, ForAll([c], And(0 <= s.taken(c), s.taken(c) <= s.sent(c), s.sent(c) <= s.round + 1))
    ),
    "the source opens a round when every channel has ended the one before": lambda s: every_channel(lambda c: s.sent(c) >= s.round),
    "no channel is more than one sync point ahead of the barrier, and behind the set-up none is behind it; nor is main, where it carries copies": lambda s: ForAll(
        [c], Implies(Or(c != main, zeros_on_main), And(s.taken(c) <= s.passed + 1, Or(s.passed <= s.taken(c), s.passed == 1)))
    ),
    "a page is with one thread": lambda s: ForAll([p], And(Not(And(s.todo(p), s.held(p))), Not(And(s.todo(p), s.zero(p))), Not(And(s.held(p), s.zero(p))))),
    "a channel that holds a page has not ended the round": lambda s: ForAll(
        [p], Implies(s.held(p), And(s.holder(p) != main, s.sent(s.holder(p)) == s.round))
    ),
    "a zero page is known only where main names them, before it ends the round": lambda s: ForAll(
        [p], Implies(s.zero(p), And(zeros_on_main, s.sent(main) <= s.round))
    ),
    "where main names zero pages, it ends a round after the channels": lambda s: Implies(zeros_on_main, every_channel(lambda c: s.sent(main) <= s.sent(c))),
    "a page that is yet to be sent was not sent in this round, and this is not the set-up": lambda s: ForAll(
        [p], Implies(Or(s.todo(p), s.held(p), s.zero(p)), And(s.last(p) < s.round, s.round >= 1))
    ),
    "the last copy of a page is of a round that was opened, and not of the set-up": lambda s: ForAll([p], And(-1 <= s.stamp(p), s.stamp(p) <= s.last(p), s.last(p) <= s.round, s.last(p) != 0)),
    "a copy under way lies between the sync points of its round, behind those that were read": lambda s: ForAll(
        [c, p, k], Implies(s.flying(c, p, k), And(s.taken(c) <= k, k <= s.sent(c), 1 <= k, k <= s.last(p), Not(s.dead(c)), Or(c != main, zeros_on_main)))
    ),
    "there is one copy of a page in a round": lambda s: ForAll([c, d, p, k], Implies(And(s.flying(c, p, k), s.flying(d, p, k)), c == d)),
    "a copy under way is newer than what is in place": lambda s: ForAll([c, p, k], Implies(s.flying(c, p, k), s.stamp(p) < k)),
    "the last copy is under way, or in place, or was lost with a connection that never passes its round": lambda s: ForAll(
        [p],
        Implies(
            s.last(p) >= 0,
            Or(
                And(s.flying(s.last_on(p), p, s.last(p)), s.version(s.last_on(p), p, s.last(p)) == s.last_version(p)),
                And(s.stamp(p) == s.last(p), s.content(p) == s.last_version(p)),
                And(s.dead(s.last_on(p)), s.taken(s.last_on(p)) <= s.last(p)),
            ),
        ),
    ),
    "main has no copies where it names no zero pages": lambda s: ForAll([p], Implies(s.last(p) >= 0, Or(s.last_on(p) != main, zeros_on_main))),
    "the last copy is the one under way of its round": lambda s: ForAll(
        [c, p], Implies(s.flying(c, p, s.last(p)), And(c == s.last_on(p), s.version(c, p, s.last(p)) == s.last_version(p)))
    ),
    "the last write to a page is in the log, or yet to be read, or in what was read last": lambda s: ForAll(
        [p],
        Or(s.dirty(p), s.todo(p), s.held(p), If(s.zero(p), s.zero_version(p) == s.memory(p), And(s.last(p) >= 0, s.last_version(p) == s.memory(p)))),
    ),
    "behind the end nothing is left, and nothing is written": lambda s: Implies(
        s.ended,
        And(
            s.paused,
            Not(s.resumed),
            no_page(lambda p: Or(s.dirty(p), s.todo(p), s.held(p), s.zero(p))),
            ForAll([c], s.sent(c) == s.round + 1),
        ),
    ),
    "a destination that has started has passed every barrier": lambda s: Implies(s.started, And(s.ended, s.passed >= s.round + 1)),
}


def no_fault(s):
    return And(Not(s.resumed), Not(s.refused), ForAll([c], Not(s.dead(c))))


# What is yet to be done, for one page, one connection, one copy, and once. There are finitely many pages and connections, and so of copies
# under way: a sum over all of them is a number.
def work_of_page(s, page):
    return If(s.todo(page), 5, 0) + If(s.held(page), 4, 0) + If(s.zero(page), 3, 0)


def work_of_connection(s, connection):
    return 2 * (s.round + 1 - s.sent(connection)) + (s.sent(connection) - s.taken(connection))


def work_of_copy(s, connection, page, at):
    return If(s.flying(connection, page, at), 1, 0)


def other_work(s):
    return s.round + 1 - s.passed + If(s.paused, 0, 1) + If(s.ended, 0, 1) + If(s.started, 0, 1)


def takes_away(machine, step):
    """The step leaves less to do. It changes nothing but what belongs to one page, one connection and one copy."""
    s, t = machine.state, machine.state.after(step.effect(machine.state))
    connection = main if step.name.startswith(("name", "flush")) else C
    at = s.sent(connection) if step.name.startswith(("send", "name")) else K
    less = (
        work_of_page(t, P) + work_of_connection(t, connection) + work_of_copy(t, connection, P, at) + other_work(t)
        < work_of_page(s, P) + work_of_connection(s, connection) + work_of_copy(s, connection, P, at) + other_work(s)
    )
    nowhere_more = ForAll(
        [c, p, k],
        And(
            Implies(p != P, work_of_page(t, p) == work_of_page(s, p)),
            Implies(c != connection, work_of_connection(t, c) == work_of_connection(s, c)),
            Implies(Not(And(c == connection, p == P, k == at)), work_of_copy(t, c, p, k) == work_of_copy(s, c, p, k)),
            t.dirty(p) == s.dirty(p),
        ),
    )
    return [step.guard(s)], And(less, nowhere_more)


def is_work(step):
    """Neither a fault nor the opening of a round."""
    return not step.is_fault and not step.name.startswith(("drain", "section"))


# While the guest stands still and nothing fails, the source can go on until its end, and then the destination until it has started:
# in each of these cases a step is possible, with these parameters.
def unsent(s):
    return Exists([p], Or(s.held(p), s.zero(p)))


def all_ended(s):
    return every_channel(lambda c: s.sent(c) == s.round + 1)


def behind(s, c):
    """The destination has not read what was written on this connection, and no barrier keeps it from that."""
    return And(s.taken(c) <= s.passed, s.taken(c) < s.sent(c))


SOURCE_CASES = {
    "a channel holds a page": (lambda s: s.held(P), "send", lambda s: [(C, s.holder(P)), (V, s.memory(P))]),
    "no page is held, a zero page is found, and main is in its round": (lambda s: And(no_page(s.held), s.zero(P), s.sent(main) == s.round), "name", lambda s: []),
    "a zero page is found, and main is behind": (lambda s: And(no_page(s.held), s.zero(P), s.sent(main) < s.round), "flush", lambda s: []),
    "a channel has not ended the round": (lambda s: And(no_page(s.held), C != main, s.sent(C) == s.round), "sync", lambda s: []),
    "all have ended it, and pages are left": (lambda s: And(all_ended(s), Not(unsent(s)), Or(s.dirty(P), s.todo(P))), "drain", lambda s: []),
    "nothing is left, and main has not ended the round": (
        lambda s: And(all_ended(s), Not(unsent(s)), no_page(lambda p: Or(s.dirty(p), s.todo(p))), s.sent(main) <= s.round),
        "flush",
        lambda s: [],
    ),
    "nothing is left, and all have ended the round": (
        lambda s: And(all_ended(s), Not(unsent(s)), no_page(lambda p: Or(s.dirty(p), s.todo(p))), s.sent(main) == s.round + 1),
        "end",
        lambda s: [],
    ),
}
DESTINATION_CASES = {
    "a copy is the next on a connection": (lambda s: And(behind(s, C), s.flying(C, P, s.taken(C))), "apply", lambda s: [(K, s.taken(C))]),
    "a sync point is the next": (lambda s: And(behind(s, C), ForAll([p], Not(s.flying(C, p, s.taken(C))))), "arrive", lambda s: []),
    "all are at the barrier": (lambda s: ForAll([c], s.taken(c) > s.passed), "pass", lambda s: []),
    "everything was read, and every barrier passed": (lambda s: And(s.passed == s.round + 1, ForAll([c], s.taken(c) == s.sent(c))), "start", lambda s: []),
}


def possible_in(case, waiting):
    """In this case, while this side has something to wait for, the step is possible."""
    hypothesis, step, parameters = case
    return lambda m: (
        [m.state.paused, no_fault(m.state), waiting(m.state), hypothesis(m.state)],
        substitute(m.step(step).guard(m.state), *parameters(m.state)),
    )


def no_other_case(cases, waiting):
    """One of the cases is always there."""
    return lambda m: (
        [m.state.paused, no_fault(m.state), waiting(m.state)],
        Or([Exists([C, P], hypothesis(m.state)) for hypothesis, _, _ in cases.values()]),
    )


def source_waits(s):
    return Not(s.ended)


def destination_waits(s):
    return And(s.ended, Not(s.started))


THEOREMS = {
    # The round law.
    "a copy is put only over one of an earlier round": lambda m: ([m.step("apply").guard(m.state)], m.state.stamp(P) < K),
    "a destination that has started has the memory of the source": lambda m: ([m.state.started], ForAll([p], m.state.content(p) == m.state.memory(p))),
    "no lost copy is missed: what is in place then is the last copy of each page": lambda m: ([m.state.started], ForAll([p], m.state.stamp(p) == m.state.last(p))),
    "a guest that the source resumed is not started at the destination": lambda m: ([m.state.resumed], Not(m.state.started)),
    # Every wait ends.
    "the source can go on in one of its cases": no_other_case(SOURCE_CASES, source_waits),
    "the destination can go on in one of its cases": no_other_case(DESTINATION_CASES, destination_waits),
    "no work is negative": lambda m: (
        [],
        And(ForAll([p], work_of_page(m.state, p) >= 0), ForAll([c], work_of_connection(m.state, c) >= 0), other_work(m.state) >= 0),
    ),
    "a drain leaves no page in the log": lambda m: ([], no_page(m.state.after(drained(m.state)).dirty)),
} | {f"a step leaves less to do: {step.name}": lambda m, name=step.name: takes_away(m, m.step(name)) for step in STEPS if is_work(step)}
for cases, waits, side in [(SOURCE_CASES, source_waits, "source"), (DESTINATION_CASES, destination_waits, "destination")]:
    THEOREMS |= {f"the {side} can go on: {name}": possible_in(case, waits) for name, case in cases.items()}


ROUND_LAW = Machine(
    name="round law",
    state=before,
    axioms=[some_channel != main],
    initial=initial,
    steps=STEPS,
    invariant=INVARIANT,
    theorems=THEOREMS,
    small=[*only(Connection, main, some_channel, other_channel), *only(Page, one_page, other_page)],
    witnesses={
        "a start with every page sent in round 3": lambda s: And(s.started, ForAll([p], s.stamp(p) == 3)),
        "a start behind the death of a channel": lambda s: And(s.started, s.dead(some_channel)),
        "a start without main's FLUSH being late": lambda s: And(s.started, Not(zeros_on_main)),
        "copies of one page from two rounds under way": lambda s: And(s.flying(some_channel, one_page, 1), s.flying(other_channel, one_page, 2)),
        "a zero page on main behind a copy on a channel": lambda s: And(s.flying(main, one_page, 2), s.flying(some_channel, one_page, 1)),
        "a page that one section left and a later one has": lambda s: And(s.todo(one_page), s.sent(some_channel) == s.round + 1),
        "FLUSH before any SYNC": lambda s: And(s.sent(main) == s.round + 1, every_channel(lambda c: s.sent(c) == s.round), s.round == 2),
        "FLUSH two rounds late": lambda s: And(s.sent(main) == s.round - 2, s.round == 3),
        "a mixture under way": lambda s: And(s.flying(some_channel, one_page, 2), s.version(some_channel, one_page, 2) != s.memory(one_page), s.round == 2),
    },
)
