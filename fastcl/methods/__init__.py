"""The methods, by the name that `--method` takes, in the order in which they were published."""

from fastcl.methods.base import Config, Method, Progress
from fastcl.methods.byol import BYOL
from fastcl.methods.byol_v2 import BYOLV2
from fastcl.methods.cmc import CMC
from fastcl.methods.cpc import CPC
from fastcl.methods.dino import DINO
from fastcl.methods.instdisc import InstDisc
from fastcl.methods.invaspread import InvaSpread
from fastcl.methods.moco_v1 import MoCoV1
from fastcl.methods.moco_v2 import MoCoV2
from fastcl.methods.moco_v3 import MoCoV3
from fastcl.methods.simclr_v1 import SimCLRV1
from fastcl.methods.simclr_v2 import SimCLRV2
from fastcl.methods.simsiam import SimSiam
from fastcl.methods.swav import SwAV

METHODS: dict[str, type[Method]] = {
    "instdisc": InstDisc,
    "invaspread": InvaSpread,
    "cpc": CPC,
    "cmc": CMC,
    "moco-v1": MoCoV1,
    "simclr-v1": SimCLRV1,
    "moco-v2": MoCoV2,
    "simclr-v2": SimCLRV2,
    "swav": SwAV,
    "byol": BYOL,
    "byol-v2": BYOLV2,
    "simsiam": SimSiam,
    "moco-v3": MoCoV3,
    "dino": DINO,
}

__all__ = ["METHODS", "Config", "Method", "Progress"]
