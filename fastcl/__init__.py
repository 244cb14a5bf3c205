"""fastcl: fused kernels for contrastive and self-supervised learning, on CPUs and GPUs.

import fastcl.functional as F      losses as functions
import fastcl.losses               the same as nn.Modules
import fastcl.compat               the same under other libraries' names
python -m fastcl.train             14 self-supervised methods
python -m fastcl.env               what would run here, and why
"""

from fastcl import compat, functional, losses
from fastcl._version import __version__
from fastcl.ops import Backend, backend_of

__all__ = ["Backend", "__version__", "backend_of", "compat", "functional", "losses"]
