"""Device state on its way, for every number of channels, sections and pieces.

The source saves the state of its devices piece after piece. A piece is on main, or in a packet that any channel takes to the destination.
This file says what the two sides do, and proves that the destination starts only when each device was given all of its pieces, in their
order.

**A piece is its number** in the order in which it was saved, over all sections. Main has a word for each in that order: the piece itself,
or that a packet follows. Packets have numbers of their own, without gaps, that the words do not repeat.

**The rounds are here as far as state depends on them.** Each channel has a page of the last round before its last SYNC, main its FLUSH, and
the barrier is behind both. Why all pages are in place behind it is the round law's to say (`round_law.py`). State of the running guest goes
before the last round, on main, and the source waits for PONG.

**A connection may be narrow**, and hold one packet, or hold any number: `narrow` is a constant that may have either value. So is `kept`: state
that was kept until the last round was over is queued before main speaks of any of it; elsewhere main speaks of packets `batch` at a time.

**A loss** takes with it what is under way on a connection. Where some of it still arrives, it arrived before. A side may give up at any
moment; what it has written by then still arrives.

**Not here:** how many packets a channel writes at a time, what a packet says of its section beside its number, limits of time, a source that breaks
the rules, and what else can happen around the commit, which the commit's model has. In the bounded model a channel that waits for room is seen by main,
here it just waits.
"""

from z3 import And, BoolSort, Const, DeclareSort, Exists, ForAll, If, Implies, Int, IntSort, Not, Or, substitute

from machine import Machine, State, Step, function, only, put

Channel = DeclareSort("Channel")
TRUTH, NUMBER = BoolSort(), IntSort()

# Any of these.
narrow, kept = Const("narrow", TRUTH), Const("kept", TRUTH)
window, buffers, batch = Int("window"), Int("buffers"), Int("batch")
takes_packets = function("takes_packets", Channel, TRUTH)
taker, other = Const("taker", Channel), Const("other", Channel)

c, p, q, n = Const("c", Channel), Int("p"), Int("q"), Int("n")
# Parameters of steps.
C, P, B = Const("C", Channel), Int("P"), Const("B", TRUTH)

QUEUED, HELD, FLYING, ARRIVING, HERE, GIVEN, LOST = range(7)

before = State(
    {
        name: function(name, *sorts)
        for name, sorts in {
            # The source.
            "lives": (NUMBER,),  # pieces that were saved while the guest ran
            "last": (TRUTH,),  # the last round is open
            "synced": (Channel, TRUTH),  # has written its last SYNC
            "flushed": (TRUTH,),  # main has written the last FLUSH
            "asked": (TRUTH,),  # the VM has another packet, and main waits for a buffer
            "saved": (NUMBER,),  # pieces
            "saving_over": (TRUTH,),
            "packed": (NUMBER, TRUTH),  # the piece is in a packet
            "section": (NUMBER, NUMBER),  # the one that the piece belongs to
            "number": (NUMBER, NUMBER),  # of the piece's packet
            "piece": (NUMBER, NUMBER),  # by the number of its packet
            "next": (NUMBER,),  # the number of the next packet
            "taken": (NUMBER,),  # packets that channels have taken from the queue
            "written": (NUMBER,),  # packets that channels have written
            "told": (NUMBER,),  # words written on main
            "told_packets": (NUMBER,),  # those of them that speak of a packet
            "closed": (TRUTH,),  # no packet follows
            "over": (Channel, TRUTH),  # the sending channel has ended
            "ended": (TRUTH,),  # the end is written on main
            "go": (TRUTH,),  # GO is written
            "resumed": (TRUTH,),  # the source has given up, and the guest runs on there
            "doubt": (TRUTH,),  # it has given up behind GO
            "done": (TRUTH,),  # it knows that the guest runs at the destination
            # Under way, and in the destination's memory.
            "place": (NUMBER, NUMBER),  # where a packet is
            "on": (NUMBER, Channel),  # the channel that took it
            "dead": (Channel, TRUTH),
            "main_dead": (TRUTH,),
            # The destination.
            "paged": (Channel, TRUTH),  # the channel's page of the last round is in place
            "arrived": (Channel, TRUTH),  # its last SYNC was read
            "main_arrived": (TRUTH,),
            "passed": (TRUTH,),  # the barrier behind the last round
            "left": (Channel, TRUTH),  # the channel has ended
            "window_ended": (TRUTH,),  # main knows that one has
            "given": (NUMBER,),  # words that main is done with
            "wanted": (NUMBER,),  # the number of the packet that comes next
            "pong": (NUMBER,),  # words up to which the source knows that all was loaded
            "ready": (TRUTH,),
            "started": (TRUTH,),
            "refused": (TRUTH,),  # it has given up
            # For the proof alone: what devices were given, in that order.
            "got": (NUMBER, NUMBER),
            "gets": (NUMBER,),
        }.items()
    }
)


def every_channel(claim):
    return ForAll([c], claim(c))


def is_packet(s, piece):
    return And(0 <= piece, piece < s.saved, s.packed(piece))


def no_packet(s, claim):
    return ForAll([p], Not(And(is_packet(s, p), claim(p))))


def is_at(s, piece, *places):
    return And(is_packet(s, piece), Or([s.place(piece) == place for place in places]))


def initial(s):
    zero = ["lives", "saved", "next", "taken", "written", "told", "told_packets", "given", "wanted", "pong", "gets"]
    flags = "last flushed asked saving_over closed ended go resumed doubt done main_dead main_arrived passed window_ended ready started refused"
    none = ["synced", "over", "dead", "paged", "arrived", "left"]
    return [
        *[getattr(s, name) == 0 for name in zero],
        *[Not(getattr(s, name)) for name in flags.split()],
        *[every_channel(lambda c, name=name: Not(getattr(s, name)(c))) for name in none],
    ]


SOURCE_WORKS = {"the source has neither given up nor ended": lambda s: Not(Or(s.resumed, s.doubt, s.done))}
DESTINATION_WORKS = {"the destination has neither started nor given up": lambda s: Not(Or(s.started, s.refused))}
MAIN_IS_FREE = {"main waits for no buffer": lambda s: Not(s.asked)}
MORE_TO_SAVE = {"the last FLUSH is written": lambda s: s.flushed, "the VM has not saved all": lambda s: Not(s.saving_over)}
MAIN_ALIVE = {"main is alive": lambda s: Not(s.main_dead)}
ALIVE = {"its connection is alive": lambda s: Not(s.dead(C))}
PASSED = {"the last round is over, but for state of the running guest": lambda s: Or(s.passed, s.given < s.lives)}
A_WORD = {"main has written the next word": lambda s: s.given < s.told}
NOT_READY = {"the end was not read": lambda s: Not(s.ready)}


def saves(s, **more):
    return {"saved": s.saved + 1, "section": put(s.section, (s.saved,), If(B, s.section(s.saved - 1) + 1, s.section(s.saved - 1)))} | more


def gives(s, piece):
    return {"given": s.given + 1, "got": put(s.got, (s.gets,), piece), "gets": s.gets + 1}


def gives_up(s):
    return {"resumed": Or(s.resumed, Not(s.go)), "doubt": Or(s.doubt, s.go)}


def is_wanted(s, piece):
    return s.number(piece) == s.wanted


def moves(s, place):
    return {"place": put(s.place, (P,), place)}


STEPS = [
    Step(
        "live: the VM saves a piece while the guest runs",
        (B,),
        SOURCE_WORKS | {"the last round is not open": lambda s: Not(s.last)},
        lambda s: saves(s, lives=s.lives + 1, packed=put(s.packed, (s.saved,), False)),
    ),
    Step(
        "last: main opens the last round",
        (),
        SOURCE_WORKS | {"it is not open": lambda s: Not(s.last), "all is told": lambda s: s.told == s.saved, "PONG has come for all of it": lambda s: s.pong == s.saved},
        lambda s: {"last": True},
    ),
    Step(
        "sync: a channel writes its last SYNC",
        (C,),
        SOURCE_WORKS | {"the last round is open": lambda s: s.last, "it has not": lambda s: Not(s.synced(C))},
        lambda s: {"synced": put(s.synced, (C,), True)},
    ),
    Step(
        "flush: main writes the last FLUSH",
        (),
        SOURCE_WORKS | {"every channel has written its last SYNC": lambda s: And(s.last, every_channel(s.synced)), "main has not": lambda s: Not(s.flushed)},
        lambda s: {"flushed": True},
    ),
    Step(
        "body: the VM saves a piece that is on main",
        (B,),
        SOURCE_WORKS | MAIN_IS_FREE | MORE_TO_SAVE,
        lambda s: saves(s, packed=put(s.packed, (s.saved,), False)),
    ),
    Step(
        "ask: the VM has a packet",
        (),
        SOURCE_WORKS | MAIN_IS_FREE | MORE_TO_SAVE | {"main has spoken of all packets but fewer than a batch": lambda s: Or(kept, s.next - s.told_packets < batch)},
        lambda s: {"asked": True},
    ),
    Step(
        "put: main numbers the packet and queues it",
        (B,),
        SOURCE_WORKS | {"the VM has one": lambda s: s.asked, "there is a buffer": lambda s: Or(kept, s.next - s.taken < buffers)},
        lambda s: saves(
            s,
            packed=put(s.packed, (s.saved,), True),
            number=put(s.number, (s.saved,), s.next),
            piece=put(s.piece, (s.next,), s.saved),
            place=put(s.place, (s.saved,), QUEUED),
            next=s.next + 1,
            asked=False,
        ),
    ),
    Step("all: the VM has saved all", (), SOURCE_WORKS | MAIN_IS_FREE | MORE_TO_SAVE, lambda s: {"saving_over": True}),
    Step(
        "tell: main writes the next word",
        (),
        SOURCE_WORKS
        | MAIN_IS_FREE
        | {
            "there is one": lambda s: s.told < s.saved,
            "the batch is complete, or all was saved": lambda s: Or(Not(s.last), s.saving_over, And(Not(kept), s.next - s.told_packets >= batch)),
        },
        lambda s: {"told": s.told + 1, "told_packets": s.told_packets + If(s.packed(s.told), 1, 0)},
    ),
    Step("close: main says that no packet follows", (), SOURCE_WORKS | {"the VM has saved all": lambda s: s.saving_over, "main has not": lambda s: Not(s.closed)}, lambda s: {"closed": True}),
    Step(
        "take: a channel takes the next packet",
        (C, P),
        SOURCE_WORKS
        | {
            "it takes packets": lambda s: takes_packets(C),
            "it has written its last SYNC": lambda s: s.synced(C),
            "it has not ended": lambda s: Not(s.over(C)),
            "it holds none": lambda s: no_packet(s, lambda p: And(s.place(p) == HELD, s.on(p) == C)),
            "it is in the queue": lambda s: is_at(s, P, QUEUED),
            "it is the first there": lambda s: no_packet(s, lambda p: And(s.place(p) == QUEUED, p < P)),
        },
        lambda s: moves(s, HELD) | {"on": put(s.on, (P,), C), "taken": s.taken + 1},
    ),
    Step(
        "write: a channel writes its packet",
        (P,),
        SOURCE_WORKS
        | {
            "a channel holds it": lambda s: is_at(s, P, HELD),
            "its connection has room": lambda s: Implies(narrow, no_packet(s, lambda p: And(s.place(p) == FLYING, s.on(p) == s.on(P)))),
        },
        # To a connection that is dead it is lost; the source may not know it yet.
        lambda s: moves(s, If(s.dead(s.on(P)), LOST, FLYING)) | {"written": s.written + 1},
    ),
    Step(
        "over: a sending channel ends",
        (C,),
        SOURCE_WORKS
        | {
            "it has not ended": lambda s: Not(s.over(C)),
            "it has written its last SYNC": lambda s: s.synced(C),
            "no packet follows, or it takes none": lambda s: Or(s.closed, Not(takes_packets(C))),
            "the queue is empty, or it takes none": lambda s: Or(no_packet(s, lambda p: s.place(p) == QUEUED), Not(takes_packets(C))),
            "it holds none": lambda s: no_packet(s, lambda p: And(s.place(p) == HELD, s.on(p) == C)),
        },
        lambda s: {"over": put(s.over, (C,), True)},
    ),
    Step(
        "end: main writes the end",
        (),
        SOURCE_WORKS | {"the VM has saved all": lambda s: s.saving_over, "all is told": lambda s: s.told == s.saved, "main has not": lambda s: Not(s.ended)},
        lambda s: {"ended": True},
    ),
    Step(
        "apply: the page of a channel is put into place",
        (C,),
        DESTINATION_WORKS | ALIVE | {"it is written": lambda s: s.last, "it is not in place": lambda s: Not(s.paged(C))},
        lambda s: {"paged": put(s.paged, (C,), True)},
    ),
    Step(
        "arrive: a channel reads its last SYNC",
        (C,),
        DESTINATION_WORKS | ALIVE | {"it is written": lambda s: s.synced(C), "its page is in place": lambda s: s.paged(C), "it has not": lambda s: Not(s.arrived(C))},
        lambda s: {"arrived": put(s.arrived, (C,), True)},
    ),
    Step(
        "meet: main reads the last FLUSH",
        (),
        DESTINATION_WORKS | MAIN_ALIVE | {"it is written": lambda s: s.flushed, "all before it was read": lambda s: s.given >= s.lives, "main has not": lambda s: Not(s.main_arrived)},
        lambda s: {"main_arrived": True},
    ),
    Step(
        "pass: all pass the barrier behind the last round",
        (),
        DESTINATION_WORKS
        | {"every channel has read its last SYNC": lambda s: every_channel(s.arrived), "main has read its FLUSH": lambda s: s.main_arrived, "they have not": lambda s: Not(s.passed)},
        lambda s: {"passed": True},
    ),
    Step(
        "head: a channel reads the head of a packet",
        (P,),
        DESTINATION_WORKS
        | {
            "the packet is the next on its connection": lambda s: And(is_at(s, P, FLYING), no_packet(s, lambda p: And(s.place(p) == FLYING, s.on(p) == s.on(P), p < P))),
            "the channel has read its last SYNC": lambda s: s.arrived(s.on(P)),
            "all have passed the barrier": lambda s: s.passed,
            "the channel is done with the one before": lambda s: no_packet(s, lambda p: And(s.place(p) == ARRIVING, s.on(p) == s.on(P))),
            "there is room for it": lambda s: s.number(P) < s.wanted + window,
            "its number did not come before": lambda s: And(s.wanted <= s.number(P), no_packet(s, lambda p: And(Or(s.place(p) == ARRIVING, s.place(p) == HERE), s.number(p) == s.number(P)))),
        },
        lambda s: moves(s, ARRIVING),
    ),
    Step(
        "come: the rest of a packet is there",
        (P,),
        DESTINATION_WORKS | {"its head was read": lambda s: is_at(s, P, ARRIVING), "its connection is alive": lambda s: Not(s.dead(s.on(P)))},
        lambda s: moves(s, HERE),
    ),
    Step(
        "give: main gives a piece of its own to the device",
        (),
        DESTINATION_WORKS | MAIN_ALIVE | NOT_READY | A_WORD | PASSED | {"it is on main": lambda s: Not(s.packed(s.given))},
        lambda s: gives(s, s.given),
    ),
    Step(
        "unpack: main gives the piece of a packet to the device",
        (P,),
        DESTINATION_WORKS
        | MAIN_ALIVE
        | NOT_READY
        | A_WORD
        | PASSED
        | {
            "a packet follows": lambda s: s.packed(s.given),
            "the packet is there": lambda s: is_at(s, P, HERE),
            "it has the number that comes next": lambda s: is_wanted(s, P),
        },
        lambda s: gives(s, P) | moves(s, GIVEN) | {"wanted": s.wanted + 1},
    ),
    Step(
        "pong: the destination has loaded all that came",
        (),
        DESTINATION_WORKS | MAIN_ALIVE | {"the source does not know": lambda s: s.pong < s.given},
        lambda s: {"pong": s.given},
    ),
    Step(
        "ready: the destination has read the end",
        (),
        DESTINATION_WORKS
        | MAIN_ALIVE
        | NOT_READY
        | {
            "it is written": lambda s: s.ended,
            "main is done with all words": lambda s: s.given == s.told,
            "main has passed the last barrier": lambda s: s.passed,
            "no packet is left in the window": lambda s: no_packet(s, lambda p: Or(s.place(p) == ARRIVING, s.place(p) == HERE)),
        },
        lambda s: {"ready": True},
    ),
    Step(
        "go: the source lets the destination start",
        (),
        SOURCE_WORKS | MAIN_ALIVE | {"READY has come": lambda s: s.ready, "every channel has ended": lambda s: every_channel(s.over), "main has not": lambda s: Not(s.go)},
        lambda s: {"go": True},
    ),
    Step(
        "start: the destination starts the guest",
        (),
        DESTINATION_WORKS | MAIN_ALIVE | {"it is ready": lambda s: s.ready, "GO has come": lambda s: s.go},
        lambda s: {"started": True},
    ),
    Step("done: the source learns that the guest runs", (), SOURCE_WORKS | MAIN_ALIVE | {"it does": lambda s: s.started}, lambda s: {"done": True}),
    # What goes wrong, and what follows from that.
    Step(
        "lose: a channel's connection dies, with what is under way on it",
        (C,),
        {},
        lambda s: {"dead": put(s.dead, (C,), True), "place": lambda p: If(And(is_at(s, p, FLYING), s.on(p) == C), LOST, s.place(p))},
        is_fault=True,
    ),
    Step("cut: main dies, with what is under way on it", (), {}, lambda s: {"main_dead": True}, is_fault=True),
    Step("fail: the source gives up, for any reason", (), SOURCE_WORKS, gives_up, is_fault=True),
    Step("refuse: the destination gives up, for any reason", (), DESTINATION_WORKS, lambda s: {"refused": True}, is_fault=True),
    Step(
        "notice: the source finds a connection dead",
        (P,),
        SOURCE_WORKS
        | {
            "main is, or the destination has given up, or a channel has something to write": lambda s: Or(
                s.main_dead, s.refused, And(is_at(s, P, HELD), s.dead(s.on(P)))
            )
        },
        gives_up,
    ),
    Step(
        "leave: the destination finds a channel's connection dead",
        (C,),
        DESTINATION_WORKS | {"it is": lambda s: s.dead(C), "it has not ended before": lambda s: Not(s.left(C))},
        # Before the barrier, or in a packet, it is the end.
        lambda s: {
            "left": put(s.left, (C,), True),
            "window_ended": True,
            "refused": Or(Not(s.passed), Not(no_packet(s, lambda p: And(s.place(p) == ARRIVING, s.on(p) == C)))),
        },
    ),
    Step(
        "miss: the destination waits for a packet that may not come",
        (),
        DESTINATION_WORKS
        | {
            "a packet follows": lambda s: And(s.given < s.told, s.packed(s.given)),
            "it is not there": lambda s: no_packet(s, lambda p: And(Or(s.place(p) == ARRIVING, s.place(p) == HERE), is_wanted(s, p))),
            "a channel has ended": lambda s: s.window_ended,
        },
        lambda s: {"refused": True},
    ),
    Step(
        "hang: the destination finds main dead, or the source gone",
        (),
        DESTINATION_WORKS | {"it is": lambda s: Or(s.main_dead, s.resumed, s.doubt)},
        lambda s: {"refused": True},
    ),
]


def splits(s, words, packets):
    """Of the packets those below this number, and no others, are among so many words."""
    return ForAll([p], Implies(is_packet(s, p), (p < words) == (s.number(p) < packets)))


INVARIANT = {
    "words are written when their pieces were saved, and read when they are written": lambda s: And(
        0 <= s.pong, s.pong <= s.given, s.given <= s.told, s.told <= s.saved, 0 <= s.lives, s.lives <= s.saved
    ),
    "numbers begin at 0": lambda s: And(0 <= s.wanted, s.wanted <= s.told_packets, s.told_packets <= s.next, 0 <= s.taken, s.taken <= s.next),
    "pieces of the running guest are on main": lambda s: ForAll([p], Implies(And(0 <= p, p < s.lives), Not(s.packed(p)))),
    "sections follow each other": lambda s: ForAll([p, q], Implies(And(0 <= p, p < q, q < s.saved), s.section(p) <= s.section(q))),
    "each packet has a number": lambda s: ForAll(
        [p], Implies(is_packet(s, p), And(0 <= s.number(p), s.number(p) < s.next, s.piece(s.number(p)) == p, QUEUED <= s.place(p), s.place(p) <= LOST))
    ),
    "each number has a packet": lambda s: ForAll([n], Implies(And(0 <= n, n < s.next), And(is_packet(s, s.piece(n)), s.number(s.piece(n)) == n))),
    "numbers have the order of the pieces": lambda s: ForAll([p, q], Implies(And(is_packet(s, p), is_packet(s, q)), (p < q) == (s.number(p) < s.number(q)))),
    "numbers say of which packets main has spoken": lambda s: splits(s, s.told, s.told_packets),
    "numbers say which packets were given": lambda s: splits(s, s.given, s.wanted),
    "the packet that comes next is not among the words that main is done with": lambda s: Implies(
        s.wanted < s.told_packets, And(s.given <= s.piece(s.wanted), s.piece(s.wanted) < s.told)
    ),
    "the packets in the queue are the last": lambda s: ForAll([p], Implies(is_packet(s, p), (s.place(p) == QUEUED) == (s.taken <= s.number(p)))),
    "packets that were given are those below the next number": lambda s: ForAll([p], Implies(is_packet(s, p), (s.place(p) == GIVEN) == (s.number(p) < s.wanted))),
    "a packet that is with a channel is one of those that take packets, behind its last SYNC": lambda s: ForAll(
        [p], Implies(And(is_packet(s, p), s.place(p) != QUEUED), And(takes_packets(s.on(p)), s.synced(s.on(p))))
    ),
    "a channel holds one packet": lambda s: ForAll([p, q], Implies(And(is_at(s, p, HELD), is_at(s, q, HELD), s.on(p) == s.on(q)), p == q)),
    "a channel that holds a packet has not ended": lambda s: ForAll([p], Implies(is_at(s, p, HELD), Not(s.over(s.on(p))))),
    "what is under way on a channel is in order": lambda s: ForAll([p, q], Implies(And(is_at(s, p, HELD), is_at(s, q, FLYING, ARRIVING), s.on(p) == s.on(q)), q < p)),
    "a narrow connection holds one packet": lambda s: Implies(narrow, ForAll([p, q], Implies(And(is_at(s, p, FLYING), is_at(s, q, FLYING), s.on(p) == s.on(q)), p == q))),
    "a dead connection has nothing under way": lambda s: ForAll([p], Implies(is_at(s, p, FLYING), Not(s.dead(s.on(p))))),
    "the memory of the destination holds what there is room for": lambda s: ForAll([p], Implies(is_at(s, p, ARRIVING, HERE), s.number(p) < s.wanted + window)),
    "a packet that is received is on a channel that has not ended": lambda s: Implies(Not(s.refused), ForAll([p], Implies(is_at(s, p, ARRIVING), Not(s.left(s.on(p)))))),
    "one packet is received on a channel": lambda s: ForAll([p, q], Implies(And(is_at(s, p, ARRIVING), is_at(s, q, ARRIVING), s.on(p) == s.on(q)), p == q)),
    "packets are lost with a connection": lambda s: ForAll([p], Implies(is_at(s, p, LOST), s.dead(s.on(p)))),
    "a channel that has ended is known to main": lambda s: ForAll([c], Implies(s.left(c), And(s.dead(c), s.window_ended))),
    "a destination that goes on without a channel has passed the barrier": lambda s: Implies(And(s.window_ended, Not(s.refused)), s.passed),
    "main has not spoken of fewer packets than a batch": lambda s: And(
        Implies(Not(kept), s.next - s.told_packets + If(s.asked, 1, 0) <= batch), Implies(Not(kept), s.next - s.taken <= buffers)
    ),
    "channels end when no packet follows": lambda s: ForAll(
        [c], Implies(s.over(c), And(s.synced(c), Or(Not(takes_packets(c)), And(s.closed, no_packet(s, lambda p: s.place(p) == QUEUED)))))
    ),
    "the source's phases": lambda s: And(
        Implies(Not(s.last), And(s.lives == s.saved, every_channel(lambda c: Not(s.synced(c))), s.next == 0)),
        Implies(s.flushed, And(s.last, every_channel(s.synced))),
        Implies(s.last, s.lives <= s.told),
        Implies(Or(s.asked, s.saving_over), s.flushed),
        Implies(s.saved > s.lives, s.flushed),
        Implies(s.saving_over, Not(s.asked)),
        Implies(s.closed, s.saving_over),
        Implies(s.ended, And(s.saving_over, s.told == s.saved)),
    ),
    "the destination's phases": lambda s: And(
        every_channel(lambda c: And(Implies(s.arrived(c), And(s.synced(c), s.paged(c))), Implies(s.paged(c), s.last))),
        Implies(s.main_arrived, And(s.flushed, s.given >= s.lives)),
        Implies(s.passed, And(s.main_arrived, every_channel(s.arrived))),
        Implies(s.given > s.lives, s.passed),
    ),
    "devices were given the pieces in their order": lambda s: And(s.gets == s.given, ForAll([n], Implies(And(0 <= n, n < s.gets), s.got(n) == n))),
    "a destination that is ready has given all": lambda s: Implies(s.ready, And(s.ended, s.given == s.saved, s.passed)),
    "the source lets it start when it is ready": lambda s: And(Implies(s.go, s.ready), Implies(s.started, And(s.go, Not(s.refused)))),
    "the source takes the guest back before GO, and not behind it": lambda s: And(Implies(s.resumed, Not(s.go)), Implies(s.doubt, s.go), Implies(s.done, s.started)),
}


# What is yet to be done, for one packet, for one channel, and once.
def work_of_packet(s, piece):
    ranks = {QUEUED: 5, HELD: 4, FLYING: 3, ARRIVING: 2, HERE: 1}
    return If(is_packet(s, piece), sum([If(s.place(piece) == place, rank, 0) for place, rank in ranks.items()]), 0)


def one_if(*claims):
    return sum([If(claim, 1, 0) for claim in claims])


def work_of_channel(s, c):
    return one_if(Not(s.synced(c)), Not(s.over(c)), Not(s.paged(c)), Not(s.arrived(c)), Not(s.left(c)))


def other_work(s):
    flags = [s.last, s.flushed, s.saving_over, s.closed, s.ended, s.main_arrived, s.passed, s.ready, s.go, s.started, s.done, s.refused, Or(s.resumed, s.doubt)]
    return (s.saved - s.told) + (s.saved - s.given) + (s.saved - s.pong) + one_if(*[Not(flag) for flag in flags])


def takes_away(machine, step):
    """The step leaves less to do. It changes nothing but what belongs to one packet and one channel."""
    s, t = machine.state, machine.state.after(step.effect(machine.state))
    less = work_of_packet(t, P) + work_of_channel(t, C) + other_work(t) < work_of_packet(s, P) + work_of_channel(s, C) + other_work(s)
    nowhere_more = ForAll([c, p], And(Implies(p != P, work_of_packet(t, p) == work_of_packet(s, p)), Implies(c != C, work_of_channel(t, c) == work_of_channel(s, c))))
    return [step.guard(s)], And(less, nowhere_more)


SAVES = ("live", "body", "ask", "put")


def is_work(step):
    return not step.is_fault and not step.name.startswith(SAVES)


# Until the destination has started, or given up, a step is possible, whatever was lost: in each of these cases, with these parameters.
def next_packet(s):
    return s.piece(s.wanted)


def first_queued(s):
    return s.piece(s.taken)


def a_packet_follows(s):
    return And(s.passed, s.given < s.told, s.packed(s.given))


def receives(s, channel):
    """The channel is in a packet."""
    return Not(no_packet(s, lambda p: And(s.place(p) == ARRIVING, s.on(p) == channel)))


def holds(s, channel):
    return Not(no_packet(s, lambda p: And(s.place(p) == HELD, s.on(p) == channel)))


def is_blocked(s):
    """Main waits for a buffer, and there is none."""
    return And(s.passed, s.asked, Not(kept), s.next - s.taken >= buffers)


def all_is_told(s):
    return And(s.passed, s.saving_over, s.told == s.saved, s.given == s.told)


GONE = {
    "main or the source is gone": (lambda s: Or(s.main_dead, s.resumed, s.doubt), "hang", lambda s: []),
    "a channel is dead, and that is not known": (lambda s: And(s.dead(C), Not(s.left(C))), "leave", lambda s: []),
}
CASES = {
    "a word about the running guest is to be written": (lambda s: And(Not(s.last), s.told < s.saved), "tell", lambda s: []),
    "one is to be read": (lambda s: And(s.given < s.told, s.given < s.lives), "give", lambda s: []),
    "PONG is to be written": (lambda s: And(Not(s.last), s.given == s.saved, s.pong < s.saved), "pong", lambda s: []),
    "PONG was read": (lambda s: And(Not(s.last), s.pong == s.saved), "last", lambda s: []),
    "a channel has not written its last SYNC": (lambda s: And(s.last, Not(s.synced(C))), "sync", lambda s: []),
    "all have": (lambda s: And(s.last, every_channel(s.synced), Not(s.flushed)), "flush", lambda s: []),
    "a page is on its way": (lambda s: And(s.last, Not(s.paged(C))), "apply", lambda s: []),
    "a SYNC is the next": (lambda s: And(s.synced(C), s.paged(C), Not(s.arrived(C))), "arrive", lambda s: []),
    "FLUSH is the next": (lambda s: And(s.flushed, s.given >= s.lives, Not(s.main_arrived)), "meet", lambda s: []),
    "all are at the barrier": (lambda s: And(every_channel(s.arrived), s.main_arrived, Not(s.passed)), "pass", lambda s: []),
    "the VM has no more": (lambda s: And(s.passed, Not(s.asked), Not(s.saving_over)), "all", lambda s: []),
    "it has, and there is a buffer": (lambda s: And(s.passed, s.asked, Or(kept, s.next - s.taken < buffers)), "put", lambda s: []),
    "all was saved, and is not told": (lambda s: And(s.passed, s.saving_over, s.told < s.saved), "tell", lambda s: []),
    "the next piece is on main": (lambda s: And(s.passed, s.given < s.told, Not(s.packed(s.given))), "give", lambda s: []),
    "the next packet is there": (lambda s: And(a_packet_follows(s), s.place(next_packet(s)) == HERE), "unpack", lambda s: [(P, next_packet(s))]),
    "it is received": (lambda s: And(a_packet_follows(s), s.place(next_packet(s)) == ARRIVING), "come", lambda s: [(P, next_packet(s))]),
    "it is the next on its connection": (
        lambda s: And(a_packet_follows(s), s.place(next_packet(s)) == FLYING, Not(receives(s, s.on(next_packet(s))))),
        "head",
        lambda s: [(P, next_packet(s))],
    ),
    "it is behind one that is received": (
        lambda s: And(a_packet_follows(s), s.place(next_packet(s)) == FLYING, is_at(s, P, ARRIVING), s.on(P) == s.on(next_packet(s))),
        "come",
        lambda s: [],
    ),
    "a channel holds it": (lambda s: And(a_packet_follows(s), s.place(next_packet(s)) == HELD), "write", lambda s: [(P, next_packet(s))]),
    "it is in the queue": (lambda s: And(a_packet_follows(s), s.place(next_packet(s)) == QUEUED), "take", lambda s: [(C, taker), (P, next_packet(s))]),
    "it is lost": (lambda s: And(a_packet_follows(s), s.place(next_packet(s)) == LOST), "miss", lambda s: []),
    "main waits for a buffer, and a channel is free": (
        lambda s: And(is_blocked(s), Not(holds(s, taker))),
        "take",
        lambda s: [(C, taker), (P, first_queued(s))],
    ),
    "its channel has a packet, and its connection room": (
        lambda s: And(is_blocked(s), is_at(s, P, HELD), s.on(P) == taker, Implies(narrow, no_packet(s, lambda p: And(s.place(p) == FLYING, s.on(p) == taker)))),
        "write",
        lambda s: [],
    ),
    "its connection has none, and main has read all words": (
        lambda s: And(is_blocked(s), narrow, s.given == s.told, is_at(s, P, FLYING), s.on(P) == taker, Not(receives(s, taker))),
        "head",
        lambda s: [],
    ),
    "nor has the channel, which is in a packet": (
        lambda s: And(is_blocked(s), narrow, is_at(s, P, ARRIVING), s.on(P) == taker),
        "come",
        lambda s: [],
    ),
    "all is told, and given": (lambda s: And(all_is_told(s), Not(s.ended)), "end", lambda s: []),
    "the end is the next": (lambda s: And(all_is_told(s), s.ended, Not(s.ready)), "ready", lambda s: []),
    "channels wait for packets": (lambda s: And(s.ready, Not(s.closed)), "close", lambda s: []),
    "a channel can end": (lambda s: And(s.ready, s.closed, Not(s.over(C))), "over", lambda s: []),
    "all have ended": (lambda s: And(s.ready, every_channel(s.over), Not(s.go)), "go", lambda s: []),
    "GO is there": (lambda s: s.go, "start", lambda s: []),
}


def waits(s):
    """The destination waits."""
    return Not(Or(s.started, s.refused))


def nothing_is_gone(s):
    return [Not(Or(s.main_dead, s.resumed, s.doubt)), every_channel(lambda c: Implies(s.dead(c), s.left(c)))]


def possible_in(case, hypotheses):
    hypothesis, step, parameters = case
    return lambda m: (
        [waits(m.state), *hypotheses(m.state), hypothesis(m.state)],
        substitute(m.step(step).guard(m.state), *parameters(m.state)),
    )


def some_case(m):
    s = m.state
    return [waits(s), *nothing_is_gone(s)], Or([Exists([C, P], hypothesis(s)) for hypothesis, _, _ in CASES.values()])


THEOREMS = {
    # What devices are given.
    "devices are given pieces in their order, and none twice": lambda m: (
        [],
        ForAll([p, q], Implies(And(0 <= p, p < q, q < m.state.gets), And(m.state.got(p) < m.state.got(q), m.state.section(m.state.got(p)) <= m.state.section(m.state.got(q))))),
    ),
    "a destination that has started has given every piece of every section": lambda m: (
        [m.state.started],
        And(m.state.gets == m.state.saved, ForAll([p], Implies(And(0 <= p, p < m.state.saved), m.state.got(p) == p))),
    ),
    "it does not start where a packet was lost": lambda m: ([is_at(m.state, P, LOST)], Not(m.state.started)),
    "what the guest's devices hold behind the pause is given when the last page of each channel is in place": lambda m: (
        [Or(m.step("give").guard(m.state), m.step("unpack").guard(m.state)), m.state.given >= m.state.lives],
        every_channel(m.state.paged),
    ),
    "no more packets are in the destination's memory than there is room for": lambda m: (
        [is_at(m.state, P, ARRIVING, HERE)],
        And(m.state.wanted <= m.state.number(P), m.state.number(P) < m.state.wanted + window, m.state.piece(m.state.number(P)) == P),
    ),
    # Where the guest is.
    "the source writes GO when the destination has given all": lambda m: ([m.state.go], m.state.gets == m.state.saved),
    "a guest that the source resumed is not started at the destination": lambda m: ([m.state.resumed], Not(m.state.started)),
    "a source that says so knows that the destination has started": lambda m: ([m.state.done], m.state.started),
    # Every wait ends.
    "one of the cases is always there": some_case,
    "a source whose destination has started, or given up, can go on": lambda m: (
        [Or(m.state.started, m.state.refused), Not(Or(m.state.resumed, m.state.doubt, m.state.done))],
        Or(m.step("done").possible(m.state), m.step("notice").possible(m.state)),
    ),
    "no work is negative": lambda m: ([], And(work_of_packet(m.state, P) >= 0, work_of_channel(m.state, C) >= 0, other_work(m.state) >= 0)),
}
THEOREMS |= {f"a side can go on: {name}": possible_in(case, lambda s: []) for name, case in GONE.items()}
THEOREMS |= {f"a side can go on: {name}": possible_in(case, nothing_is_gone) for name, case in CASES.items()}
THEOREMS |= {f"a step leaves less to do: {step.name}": lambda m, name=step.name: takes_away(m, m.step(name)) for step in STEPS if is_work(step)}


AXIOMS = [takes_packets(taker), window >= 1, buffers >= 1, batch >= 1]
ROOM_FOR_A_BATCH = batch <= window

DEVICE_STATE_LAW = Machine(
    name="device state",
    small_first=True,
    state=before,
    axioms=[*AXIOMS, ROOM_FOR_A_BATCH],
    initial=initial,
    steps=STEPS,
    invariant=INVARIANT,
    theorems=THEOREMS,
    small=[*only(Channel, taker, other), window <= 2, buffers <= 2, batch <= 4, before.saved <= 4],
    witnesses={
        "a start with two sections in packets": lambda s: And(s.started, s.saved == 4, s.next == 4, s.section(0) < s.section(3)),
        "a start behind the death of a channel": lambda s: And(s.started, s.dead(taker)),
        "a start with state of the running guest": lambda s: And(s.started, s.lives == 1, s.next == 2),
        "a packet that comes before the one that is next": lambda s: And(s.place(s.piece(1)) == HERE, s.place(s.piece(0)) == FLYING, s.wanted == 0, s.next == 2),
        "a channel that waits for room": lambda s: And(is_at(s, s.piece(2), FLYING), s.wanted == 0, Not(receives(s, s.on(s.piece(2))))),
        "a lost packet that main waits for": lambda s: And(is_at(s, s.piece(0), LOST), a_packet_follows(s), s.wanted == 0, s.given == 0, waits(s)),
        "a channel that takes no packets": lambda s: And(s.started, Not(takes_packets(other)), s.next == 3),
        "all is queued before main speaks of any": lambda s: And(kept, s.next == 4, s.told == 0, s.flushed),
        "a source in doubt": lambda s: And(s.doubt, s.started),
    },
)
