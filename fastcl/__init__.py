"""fastcl: fused kernels for contrastive and self-supervised learning, on CPUs and GPUs.

    import fastcl.functional as F      losses as functions
    import fastcl.losses               the same as nn.Modules
    python -m fastcl.train             14 self-supervised methods
    python -m fastcl.env               what would run here, and why
"""

from fastcl._version import __version__

__all__ = ["__version__"]
