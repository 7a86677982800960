"""The public names of crystaljax.dft_bridge, and where each is; loaded when first used."""

from .accounting import Budget as Budget
from .accounting import Stats as Stats
from .bridge import Bridge as Bridge
from .evaluators import open_bridge as open_bridge
from .keys import Request as Request
from .limits import Limits as Limits
from .store import Store as Store
