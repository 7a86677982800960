"""The public names of crystaljax, and where each is; loaded when first used."""

from .elements import Vocabulary as Vocabulary
from .env import CrystalEnv as CrystalEnv
from .env import EnvParams as EnvParams
from .env import EnvState as EnvState
from .errors import CrystalJAXError as CrystalJAXError
from .evaluators import UNRELAXED_DENSITY as UNRELAXED_DENSITY
from .evaluators import FunctionEvaluator as FunctionEvaluator
from .evaluators import TableEvaluator as TableEvaluator
from .objectives import Objective as Objective
from .objectives import Term as Term
from .observation import GraphObservation as GraphObservation
from .properties import Property as Property
from .skeleton import Skeleton as Skeleton
from .status import Status as Status
from .structures import StructureError as StructureError
from .structures import StructureWarning as StructureWarning
from .structures import read_mp20 as read_mp20
from .structures import to_skeleton as to_skeleton
from .tasks import make as make
from .tasks import make_custom as make_custom
from .tasks import registered_tasks as registered_tasks
from .testing import api_test as api_test
from .version import __version__ as __version__
