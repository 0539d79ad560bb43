"""F5: who holds the pen, and when it changes hands: a pure table from events to actions.

pen    event                                         -> pen    action
SMALL  TAG        an opening tag completed              LARGE  SWITCH   nothing is copied: the lane owes pending ids
SMALL  TAG        of the registry (actions.py)          SMALL  ACT      whatever it is registered for
SMALL  TAG        refused by policy or budget, no room  SMALL  REJECT   rewound, drawn again without the tag
SMALL  MARK       a position the policy gives away      LARGE  TURN
SMALL  MARK       the same, refused by a budget         SMALL  STAY
LARGE  DUE        provisional tokens wait               LARGE  ASK      the small lane reads, a draw at each prefix
LARGE  READ       no draw enters the closing tag        LARGE  ACCEPT   they are content; the large model writes on
LARGE  READ       draw i does                           LARGE  CONFIRM  the small lane writes until the tag is whole
LARGE  COMPLETED  it is whole                           SMALL  CLOSE    both lanes retarget to the cut
LARGE  DIED       it is not                             LARGE  RESUME   the large text stands; the next prefix
LARGE  MARK       the span's cap, or the policy's stop  SMALL  FORCE    closing-tag ids are put into the small lane
LARGE  MARK       the budget is used up                 SMALL  FORCE
LARGE  FULL       the large context is full             SMALL  FORCE
any    MARK       the position changes nothing          same   STAY
any    END, STOP, LENGTH, BROKEN; SMALL FULL            nobody FINISH
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum, auto

from splitdecode._C import Event, EventKind
from splitdecode.split.budget import Budget
from splitdecode.split.policies import HandoffPolicy, Opening
from splitdecode.split.roles import Role


class Action(Enum):
    """What sequence.py does about an event."""

    SWITCH = auto()
    ACT = auto()
    REJECT = auto()
    TURN = auto()
    ASK = auto()
    ACCEPT = auto()
    CONFIRM = auto()
    CLOSE = auto()
    RESUME = auto()
    FORCE = auto()
    STAY = auto()
    FINISH = auto()


TABLE = {
    (Role.SMALL, EventKind.TAG): Action.SWITCH,
    (Role.SMALL, EventKind.MARK): Action.TURN,
    (Role.LARGE, EventKind.DUE): Action.ASK,
    (Role.LARGE, EventKind.READ): Action.CONFIRM,
    (Role.LARGE, EventKind.COMPLETED): Action.CLOSE,
    (Role.LARGE, EventKind.DIED): Action.RESUME,
    (Role.LARGE, EventKind.MARK): Action.FORCE,
    (Role.LARGE, EventKind.FULL): Action.FORCE,
}


class Handoff:
    """Who holds the pen, and when it changes hands."""

    def __init__(self, policy: HandoffPolicy, budget: Budget) -> None:
        self.policy, self.budget = policy, budget
        self.pen = Role.SMALL

    def on(self, event: Event, position: int, fits: Callable[[], bool], granted: Callable[[], bool]) -> Action:
        """The row of the table: `position` is the content so far, `fits` whether the large lane has room for a span,
        `granted` whether the budget has: asked once, it keeps an account."""
        action = TABLE.get((self.pen, event.kind), Action.FINISH)
        owner = self.policy.owner(position)
        if event.kind == EventKind.TAG and event.a > 1:
            return Action.ACT
        if action is Action.TURN and owner is None:
            return Action.STAY
        if event.kind == EventKind.MARK and owner is self.pen and not self.budget.over(position):
            return Action.STAY
        if action is Action.SWITCH and (self.policy.opening is Opening.REJECT or not fits() or not granted()):
            return Action.REJECT
        if action is Action.TURN and not granted():
            return Action.STAY
        if action is Action.TURN and not fits():
            return Action.FINISH
        if action is Action.CONFIRM and (event.a < 0 or owner is not None):
            return Action.ACCEPT
        if event.kind == EventKind.FULL and (event.a == Role.SMALL or self._for_good(position)):
            return Action.FINISH
        return action

    def _for_good(self, position: int) -> bool:
        """The policy never takes the pen away: a full context ends the answer."""
        return self.policy.owner(position) is self.pen and self.policy.next_mark(position) is None
