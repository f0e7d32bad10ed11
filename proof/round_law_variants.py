"""The round law with a part left out, or done wrong: each has to fail a condition, or is proved and says why it does no harm.

Rows have the names of the table of `multifd-model`, which has the shortest way to the harm of each
(`cargo run --release -p multifd-model -- --traces`). A test of that package demands that none of its rows is missing here.
Names in brackets are variants that the bounded model has no row for.
"""

from z3 import And, Const, ForAll, If, Implies, Not, Or

from machine import Variant, put
from round_law import (
    ALIVE,
    BEHIND_BARRIER,
    Connection,
    C,
    P,
    ROUND_ENDED,
    ROUND_LAW as LAW,
    ZEROS_NAMED,
    c,
    every_channel,
    main,
    zeros_on_main,
)

# One channel that is forgotten. It need not be one in particular.
forgotten = Const("forgotten", Connection)


def every_other_channel(claim):
    return ForAll([c], Implies(And(c != main, c != forgotten), claim(c)))


[round_ended], [zeros_named] = ROUND_ENDED, ZEROS_NAMED
[behind_barrier], [alive] = BEHIND_BARRIER, ALIVE
NOT_LOST = "all that was written before it is in place"


def main_goes_on(carries):
    """Main does not wait at sync points, where `carries` allows it."""
    machine = LAW
    for step in ("apply", "arrive"):
        machine = machine.with_guard(step, behind_barrier, lambda s: Or(s.passed >= s.taken(C), And(C == main, carries)))
    return machine


def for_each_other(carries):
    """The barrier lets channels pass without main, where `carries` allows it."""
    return LAW.with_guard("pass", "main has read its FLUSH", lambda s: Or(s.taken(main) > s.passed, carries))


VARIANTS = [
    # Waits, as in the model's table.
    Variant(
        "source main does not wait for the channels when a round opens",
        LAW,
        harmless="no step has such a wait: a channel begins a round when it is open, and main need not see it there",
    ),
    Variant("source main does not wait for the channels' SYNCs", LAW.without("drain", round_ended)),
    Variant("source channels do not wait for a round to open", LAW.with_guard("sync", "the channel has not ended the round", lambda s: C != main)),
    Variant("destination main does not wait for the SYNCs", main_goes_on(True).without("start", "main has passed the last barrier")),
    Variant(
        "destination main waits at the last sync point only",
        main_goes_on(Not(zeros_on_main)),
        harmless="where main carries no copies, it may be anywhere but behind the last barrier",
    ),
    Variant("the same, zero pages named on main", main_goes_on(True)),
    Variant(
        "destination channels do not wait behind SYNC",
        LAW.with_guard("apply", behind_barrier, lambda s: Or(s.passed >= s.taken(C), C != main)).with_guard(
            "arrive", behind_barrier, lambda s: Or(s.passed >= s.taken(C), C != main)
        ),
    ),
    Variant(
        "destination channels wait for each other, not for main",
        for_each_other(Not(zeros_on_main)),
        harmless="where main carries no copies, a channel that is ahead of it overtakes none",
    ),
    Variant("the same, zero pages named on main", for_each_other(True)),
    # Messages.
    Variant("one sync point left out on main", LAW.without("end", "main has written FLUSH of the last round")),
    Variant(
        "one SYNC left out on one channel",
        LAW.with_guard("sync", "the channel has not ended the round", lambda s: And(C != main, C != forgotten, s.sent(C) == s.round))
        .with_guard("drain", round_ended, lambda s: every_other_channel(lambda c: s.sent(c) == s.round + 1))
        .with_guard("end", round_ended, lambda s: every_other_channel(lambda c: s.sent(c) == s.round + 1)),
    ),
    Variant("no barrier behind the last round", LAW.without("start", "main has passed the last barrier", "main has read all that was before it")),
    Variant(
        "a page that waited is in the next round only if it was written again",
        LAW.with_effect("drain", lambda s, effect: effect | {"todo": lambda p: s.dirty(p)}),
    ),
    Variant("pages of the last round wait, too", LAW.without("end", "every write was drained and sent")),
    Variant(
        "pages in SYNC packets not taken (QEMU 9.2.0)",
        LAW.without("arrive", NOT_LOST).with_effect(
            "arrive", lambda s, effect: effect | {"flying": lambda c, p, k: And(s.flying(c, p, k), Not(And(c == C, k == s.taken(C))))}
        ),
    ),
    Variant("SYNC handled before the pages of its packet", LAW.without("arrive", NOT_LOST)),
    Variant("FLUSH early although main has zero pages to name", LAW.without("flush", "where main names zero pages, it has named those of the round")),
    Variant("FLUSH per round sent to a destination that syncs per section", LAW.with_guard("arrive", "it was written", lambda s: Or(s.sent(C) > s.taken(C), C == main))),
    Variant("sync points per section sent to a destination that wants FLUSH", LAW.without("start", "main has read all that was before it")),
    # Channels that come late.
    Variant(
        "those that have come at the first sync point are taken for all",
        LAW.with_guard("pass", "every channel has read its SYNC", lambda s: every_other_channel(lambda c: s.taken(c) > s.passed)),
    ),
    Variant(
        "those that have come at the second sync point are taken for all",
        LAW.with_guard("pass", "every channel has read its SYNC", lambda s: If(s.passed > 1, every_other_channel(lambda c: s.taken(c) > s.passed), every_channel(lambda c: s.taken(c) > s.passed))),
    ),
    Variant(
        "the first SYNC of a late channel counts for the current round",
        LAW.with_effect("arrive", lambda s, effect: {"taken": put(s.taken, (C,), If(s.taken(C) == 0, s.passed + 1, s.taken(C) + 1))}),
    ),
    # The tracking law, the end, and what a dead connection leaves.
    Variant("[a write is not in the log]", LAW.with_effect("write", lambda s, effect: {"memory": effect["memory"]})),
    Variant("[a drain forgets a page]", LAW.with_effect("drain", lambda s, effect: effect | {"todo": lambda p: s.todo(p)})),
    Variant("[a copy is older than the drain that reported its page]", LAW.without("send", "the copy is what memory holds, or the log knows better")),
    Variant("[a channel writes SYNC while it holds a page]", LAW.without("sync", "it holds no page")),
    Variant("[a page is taken by two channels]", LAW.without("take", "no channel has taken it")),
    Variant("[a round opens while zero pages are left to name]", LAW.without("drain", zeros_named)),
    Variant("[the guest runs on behind the end]", LAW.without("end", "the guest stands still")),
    Variant("[the end is written while pages are dirty]", LAW.without("end", "every write was drained and sent")),
    Variant("[the source resumes behind its end]", LAW.without("resume", "the source has neither ended nor given up")),
    Variant("[a barrier that no main and no channel waits at]", LAW.without("pass", "every channel has read its SYNC", "main has read its FLUSH")),
    Variant(
        "[a channel that died counts as arrived]",
        LAW.with_guard("pass", "every channel has read its SYNC", lambda s: every_channel(lambda c: Or(s.taken(c) > s.passed, s.dead(c)))),
    ),
    Variant(
        "[channels wait for FLUSH, and main for every SYNC]",
        LAW.with_guard("sync", "main has written FLUSH", lambda s: s.sent(main) > s.round).with_guard(
            "flush", "every channel has written SYNC", lambda s: every_channel(lambda c: s.sent(c) > s.round)
        ),
    ),
]
