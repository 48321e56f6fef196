"""Lightning Fabric, imported without what takes longest and is not used here."""

import sys
from typing import Any

# To learn torchmetrics' version, Fabric imports it, and with it transformers and scipy where they
# are installed: half of the seconds that a training takes to start.
_modules: dict[str, Any] = sys.modules
_IS_NEW = "torchmetrics" not in _modules
if _IS_NEW:
    _modules["torchmetrics"] = None  # Python's own way to say that there is no such module
try:
    from lightning_fabric import Fabric as Fabric
    from lightning_fabric.loggers.tensorboard import TensorBoardLogger as TensorBoardLogger
    from lightning_fabric.plugins.precision import MixedPrecision as MixedPrecision
finally:
    if _IS_NEW:
        del _modules["torchmetrics"]
