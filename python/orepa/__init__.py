"""OREPA: train re-parameterised networks at almost the price of the plain ones (CVPR 2022).

`OREPAConv` is a drop-in for `torch.nn.Conv2d`; `prepare` swaps it into any model, `convert` turns the trained model back
into plain convolutions, `report` shows the changes. `analyze` measures what the branches contribute, `prune_branches`
removes those that the kernels can do without. `orepa.models` registers models with timm; `load_official` loads the authors'
checkpoints into them.
"""

from orepa_kernels import BackendError, __version__

from .analysis import Analysis, analyze
from .modules.accumulation import squeeze_once
from .modules.offline_conv import OfflineConv
from .modules.orepa_conv import OREPAConv
from .modules.reduction import exclude_from_ddp
from .modules.repvgg import RepVGGBlock
from .official import block_from_official, load_official
from .optim import OptimizerCheck, check_optimizer, parameter_groups
from .surgery.convert import ConversionError, convert
from .surgery.prepare import prepare
from .surgery.prune import prune_branches
from .surgery.report import Report, report
from .topology import Topology, register_topology, topologies

__all__ = [
    "Analysis",
    "BackendError",
    "ConversionError",
    "OREPAConv",
    "OfflineConv",
    "OptimizerCheck",
    "RepVGGBlock",
    "Report",
    "Topology",
    "__version__",
    "analyze",
    "block_from_official",
    "check_optimizer",
    "convert",
    "exclude_from_ddp",
    "load_official",
    "parameter_groups",
    "prepare",
    "prune_branches",
    "register_topology",
    "report",
    "squeeze_once",
    "topologies",
]
