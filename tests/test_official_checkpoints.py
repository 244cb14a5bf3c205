"""Released checkpoints: state dicts under the official names and in the official shapes.

The networks are made here as the papers' repositories make them (torchvision's ResNet with the head
as its fc, timm's transformer), so that what they compute is the truth for what was loaded.
"""

import argparse
import copy
from itertools import pairwise

import pytest
import timm
import torch
import torchvision
from torch import nn

from fastcl.models import vit_moco_v3
from fastcl.official import haiku, load_official

IMAGES = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(1))


def linear_bn_relu(*sizes):
    parts = []
    for inputs, outputs in pairwise(sizes):
        parts += [nn.Linear(inputs, outputs, bias=False), nn.BatchNorm1d(outputs), nn.ReLU()]
    return parts


def moved(module, seed=0):
    """module with running statistics as after some training, so that they count."""
    generator = torch.Generator().manual_seed(seed)
    for name, buffer in module.named_buffers():
        if name.endswith("running_mean"):
            buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))
        if name.endswith("running_var"):
            buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))
    return module.eval()


@pytest.fixture(scope="module")
def resnet50():
    """Makes torchvision's ResNet-50 with other weights each time and the given head as fc."""
    torch.manual_seed(0)
    first = moved(torchvision.models.resnet50())

    def make(fc, scale=1.0):
        network = copy.deepcopy(first)
        network.conv1.weight.data *= scale
        network.fc = fc.eval()
        return network

    return make


def under(prefix, module):
    """A module's state with DistributedDataParallel's prefix and the attribute's name."""
    return {f"module.{prefix}{k}": v for k, v in module.state_dict().items()}


@torch.no_grad()
def same(ours, theirs, images=IMAGES):
    torch.testing.assert_close(ours.eval()(images), theirs.eval()(images))


def in_sequence(*parts):
    return nn.Sequential(*parts)


def test_moco_v1(tmp_path):
    query, key = (moved(torchvision.models.resnet18(num_classes=128), i) for i in (1, 2))
    state = under("encoder_q.", query) | under("encoder_k.", key)
    torch.save({"state_dict": state}, tmp_path / "moco.pth.tar")
    ours, absent = load_official(tmp_path / "moco.pth.tar", "moco-v1")
    assert absent == ["queue"] and ours.config.backbone == "resnet18"
    same(in_sequence(ours.encoder, ours.head), query)
    same(ours.key_encoder, key)


def test_moco_v2(resnet50, tmp_path):
    def head():
        return nn.Sequential(nn.Linear(2048, 2048), nn.ReLU(), nn.Linear(2048, 128))

    query, key = resnet50(head()), resnet50(head(), scale=0.5)
    queue = nn.functional.normalize(torch.randn(128, 65536), dim=0)
    state = under("encoder_q.", query) | under("encoder_k.", key)
    state |= {"module.queue": queue, "module.queue_ptr": torch.tensor([256])}
    file = tmp_path / "moco.pth.tar"
    whole = {"epoch": 200, "arch": "resnet50", "state_dict": state, "optimizer": {"state": {}}}
    torch.save(whole, file)
    ours, absent = load_official(file, "moco-v2")
    assert absent == [] and ours.config.backbone == "resnet50"
    same(in_sequence(ours.encoder, ours.head), query)
    same(ours.key_encoder, key)
    assert torch.equal(ours.queue.features, queue.T) and ours.queue.pointer.tolist() == [256]
    assert not any(p.requires_grad for p in ours.key_encoder.parameters())


def test_simsiam(resnet50):
    last = nn.Linear(2048, 2048)
    head = nn.Sequential(
        *linear_bn_relu(2048, 2048, 2048), last, nn.BatchNorm1d(2048, affine=False)
    )
    encoder = resnet50(moved(head, 1))
    predictor = moved(nn.Sequential(*linear_bn_relu(2048, 512), nn.Linear(512, 2048)), 2)
    state = under("encoder.", encoder) | under("predictor.", predictor)
    ours, absent = load_official({"state_dict": state, "arch": "resnet50"}, "simsiam")
    assert absent == []
    same(in_sequence(ours.encoder, ours.projector), encoder)
    same(ours.predictor, predictor, torch.randn(2, 2048))


def test_swav(resnet50):
    """The released file is the state itself, with the network's parts at its top."""
    network = resnet50(nn.Identity())
    network.projection_head = moved(
        nn.Sequential(nn.Linear(2048, 2048), nn.BatchNorm1d(2048), nn.ReLU(), nn.Linear(2048, 128))
    )
    network.prototypes = nn.Linear(128, 3000, bias=False)
    ours, absent = load_official(under("", network), "swav")
    assert absent == []
    same(ours.encoder, network)
    same(ours.head, network.projection_head, torch.randn(2, 2048))
    same(ours.prototypes, network.prototypes, torch.randn(2, 128))


def test_moco_v3_resnet(resnet50):
    def projector(seed):
        parts = [*linear_bn_relu(2048, 4096), nn.Linear(4096, 256, bias=False)]
        return moved(nn.Sequential(*parts, nn.BatchNorm1d(256, affine=False)), seed)

    base, momentum = resnet50(projector(1)), resnet50(projector(2), scale=0.5)
    parts = [*linear_bn_relu(256, 4096), nn.Linear(4096, 256, bias=False)]
    predictor = moved(nn.Sequential(*parts), 3)
    state = under("base_encoder.", base) | under("momentum_encoder.", momentum)
    state |= under("predictor.", predictor)
    ours, absent = load_official({"state_dict": state}, "moco-v3")
    assert absent == [] and not ours.config.predictor_last_norm
    same(in_sequence(ours.encoder, ours.projector), base)
    same(ours.key_encoder, momentum)
    same(ours.predictor, predictor, torch.randn(2, 256))


def test_moco_v3_transformer(monkeypatch):
    """timm's transformer of twelve heads with the projector as its head; here of two blocks."""
    monkeypatch.setitem(vit_moco_v3.SIZES, "vit-small-moco-v3", (384, 2, 12))

    def base(seed):
        torch.manual_seed(seed)
        vit = timm.create_model("vit_small_patch16_224", num_heads=12, depth=2, num_classes=0)
        parts = [*linear_bn_relu(384, 4096, 4096), nn.Linear(4096, 256, bias=False)]
        vit.head = nn.Sequential(*parts, nn.BatchNorm1d(256, affine=False))
        return moved(vit, seed)

    online, momentum = base(1), base(2)
    parts = [*linear_bn_relu(256, 4096), nn.Linear(4096, 256, bias=False)]
    predictor = moved(nn.Sequential(*parts, nn.BatchNorm1d(256, affine=False)), 3)
    state = under("base_encoder.", online) | under("momentum_encoder.", momentum)
    state |= under("predictor.", predictor)
    assert "module.base_encoder.head.6.weight" in state
    ours, absent = load_official({"state_dict": state}, "moco-v3")
    assert absent == [] and ours.config.freeze_patch and ours.config.predictor_last_norm
    assert (ours.config.backbone, ours.config.image_size) == ("vit-small-moco-v3", 224)
    images = torch.randn(1, 3, 224, 224)
    same(in_sequence(ours.encoder, ours.projector), online, images)
    same(ours.key_encoder, momentum, images)


class MultiCrop(nn.Module):
    """DINO's wrapper, for its names."""

    def __init__(self, backbone, head):
        super().__init__()
        self.backbone, self.head = backbone, head


class Head(nn.Module):
    def __init__(self, features, outputs):
        super().__init__()
        sizes = ((features, 2048), (2048, 2048))
        parts = [part for size in sizes for part in (nn.Linear(*size), nn.GELU())]
        self.mlp = nn.Sequential(*parts, nn.Linear(2048, 256))
        self.last_layer = nn.utils.parametrizations.weight_norm(nn.Linear(256, outputs, bias=False))

    def forward(self, x):
        return self.last_layer(nn.functional.normalize(self.mlp(x), dim=-1))

    def official(self):
        """Its state under the names of torch.nn.utils.weight_norm."""
        new = "last_layer.parametrizations.weight.original"
        old = {f"{new}0": "last_layer.weight_g", f"{new}1": "last_layer.weight_v"}
        return {old.get(k, k): v for k, v in self.state_dict().items()}


@pytest.fixture(scope="module")
def dino_vit():
    torch.manual_seed(3)
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0).eval()
    nn.init.normal_(vit.pos_embed, std=0.1)
    return vit


def test_dino_full_checkpoint(dino_vit, tmp_path):
    """Student under DistributedDataParallel, teacher not, the centre, and the script's arguments.

    ViT-Ti and 4,096 outputs, to be quick.
    """
    torch.manual_seed(4)
    student, teacher = (Head(192, 4096) for _ in range(2))
    states = [student.official(), teacher.state_dict()]  # of torch before 2.0, and after
    backbone = dino_vit.state_dict()
    center = torch.randn(1, 4096)
    other = {k: 0.5 * v for k, v in backbone.items()}
    whole = {
        "student": {f"module.backbone.{k}": v for k, v in other.items()}
        | {f"module.head.{k}": v for k, v in states[0].items()},
        "teacher": {f"backbone.{k}": v for k, v in backbone.items()}
        | {f"head.{k}": v for k, v in states[1].items()},
        "optimizer": {"state": {}, "param_groups": []},
        "epoch": 100,
        "args": argparse.Namespace(arch="vit_small", patch_size=16, norm_last_layer=False),
        "dino_loss": {"center": center},
    }
    torch.save(whole, tmp_path / "checkpoint.pth")
    ours, absent = load_official(tmp_path / "checkpoint.pth", "dino")
    assert absent == [] and ours.config.outputs == 4096 and not ours.config.norm_last_layer
    assert (ours.config.backbone, ours.config.image_size) == ("vit-tiny-dino", 224)
    assert torch.equal(ours.center, center[0])
    same(ours.teacher, in_sequence(dino_vit, teacher), torch.randn(1, 3, 224, 224))
    same(ours.head, student, torch.randn(2, 192))
    assert torch.equal(ours.encoder.norm.weight, other["norm.weight"])


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_dino_backbone(resnet50, dino_vit, kind):
    """What was released beside it is the teacher's backbone; it is the student's too, then."""
    theirs = dino_vit if kind == "vit" else resnet50(nn.Identity())
    images = torch.randn(2, 3, 224, 224) if kind == "vit" else IMAGES
    ours, absent = load_official(theirs.state_dict(), "dino")
    assert absent == ["center", "head", "teacher"]
    same(ours.get_submodule(ours.kept), theirs, images)
    same(ours.encoder, theirs, images)
    same(ours.teacher[1], ours.head, torch.randn(2, ours.feature_dim))


BYOL_NAMES = {  # online encoder, projector, predictor, target encoder, projector
    "solo-learn": ("backbone.", "projector.", "predictor.", "momentum_backbone.",
                   "momentum_projector."),
    "byol-pytorch": ("online_encoder.net.", "online_encoder.projector.net.",
                     "online_predictor.net.", "target_encoder.net.",
                     "target_encoder.projector.net."),
    "networks": ("online_network.encoder.", "online_network.projector.", "predictor.",
                 "target_network.encoder.", "target_network.projector."),
    "lightly": ("backbone.", "projection_head.layers.", "prediction_head.layers.",
                "backbone_momentum.", "projection_head_momentum.layers."),
}  # fmt: skip


def byol_mlp(inputs, seed, hidden=512, dim=64, bias=False):
    torch.manual_seed(seed)
    norm = nn.BatchNorm1d(hidden)
    last = nn.Linear(hidden, dim, bias=bias)
    return moved(nn.Sequential(nn.Linear(inputs, hidden), norm, nn.ReLU(), last), seed)


@pytest.mark.parametrize("style", BYOL_NAMES)
def test_byol(resnet50, style):
    bias = style == "lightly"
    f, target = resnet50(nn.Identity()), resnet50(nn.Identity(), scale=0.5)
    g, q, target_g = (byol_mlp(n, i, bias=bias) for i, n in enumerate((2048, 64, 2048)))
    parts = [f, g, q, target, target_g]
    if style == "lightly":  # its networks are nn.Sequential(*children)
        parts[0], parts[3] = (nn.Sequential(*list(n.children())[:-1]) for n in (f, target))
    state = {}
    for prefix, part in zip(BYOL_NAMES[style], parts, strict=True):
        state |= {f"{prefix}{k}": v for k, v in part.state_dict().items()}
    ours, absent = load_official(state, "byol")
    assert absent == [] and (ours.config.hidden, ours.config.dim) == (512, 64)
    same(in_sequence(ours.online, ours.predictor), in_sequence(f, g, q))
    same(ours.target, in_sequence(target, target_g))
    assert not any(p.requires_grad for p in ours.target.parameters())


def as_haiku(network, prefix):
    """A ResNet or head of PyTorch as Haiku's (parameters, state), arrays by module and name."""
    names = {"conv1": "initial_conv", "bn1": "initial_batchnorm"}
    params, state = {}, {}
    for name, module in network.named_modules():
        if name in ("0", "1", "3"):
            path = f"{prefix}/{ {'0': 'linear', '1': 'batch_norm', '3': 'linear_1'}[name] }"
        elif name.startswith("layer") and name.count(".") > 1:
            layer, block, *rest = name.split(".")
            rest = "".join(rest).replace("downsample0", "shortcut_conv")
            rest = rest.replace("downsample1", "shortcut_batchnorm")
            if rest[:4] == "conv":
                rest = f"conv_{int(rest[4:]) - 1}"
            if rest[:2] == "bn":
                rest = f"batchnorm_{int(rest[2:]) - 1}"
            path = f"{prefix}/~/block_group_{int(layer[5:]) - 1}/~/block_{block}/~/{rest}"
        else:
            path = f"{prefix}/~/{names.get(name)}"
        if isinstance(module, nn.Conv2d):
            params[path] = {"w": module.weight.detach().permute(2, 3, 1, 0).numpy()}
        elif isinstance(module, nn.Linear):
            params[path] = {"w": module.weight.detach().T.numpy()}
            if module.bias is not None:
                params[path]["b"] = module.bias.detach().numpy()
        elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            shape = (1,) * (3 if isinstance(module, nn.BatchNorm2d) else 1) + (-1,)

            def array(tensor, shape=shape):
                return tensor.detach().view(shape).numpy()

            params[path] = {"scale": array(module.weight), "offset": array(module.bias)}
            for ema, value in (("mean", module.running_mean), ("var", module.running_var)):
                state[f"{path}/~/{ema}_ema"] = {
                    "average": array(value),
                    "hidden": array(0 * value),
                    "counter": 7,
                }
    return params, state


def test_byol_of_deepmind(resnet50):
    """Haiku's trees, with TensorFlow's padding: a network of PyTorch on images padded by hand."""
    f, g, q = resnet50(nn.Identity()), byol_mlp(2048, 0), byol_mlp(64, 1)
    pairs = [as_haiku(*p) for p in ((f, "res_net50"), (g, "projector"), (q, "predictor"))]
    params = {k: v for p, _ in pairs for k, v in p.items()}
    state = {k: v for _, s in pairs for k, v in s.items()}
    params["classifier"] = {"w": torch.zeros(2048, 1000).numpy()}
    assert params["res_net50/~/initial_conv"]["w"].shape == (7, 7, 3, 64)
    file = {"online_params": params, "online_state": state, "rng": None}
    file |= {"target_params": params, "target_state": state}
    ours, absent = load_official(file, "byol")
    assert absent == []
    same(ours.projector, g, torch.randn(2, 2048))
    same(ours.predictor, q, torch.randn(2, 64))

    def at_the_end(module, inputs):  # 64, 32, … 4 pixels: even, so the odd pixel is at the end
        (x,) = inputs
        pool = isinstance(module, nn.MaxPool2d)
        size = module.kernel_size if pool else module.kernel_size[0]
        if size == 1:
            return None
        before = (size - 2) // 2
        return nn.functional.pad(x, (before, size - 2 - before) * 2, value=-1e9 if pool else 0.0)

    truth = copy.deepcopy(f)
    for module in truth.modules():
        layer = isinstance(module, nn.Conv2d | nn.MaxPool2d)
        if layer and module.stride in (2, (2, 2)):
            module.register_forward_pre_hook(at_the_end)
            module.padding = 0
    images = torch.randn(2, 3, 64, 64)
    same(ours.encoder, truth, images)
    same(ours.target[0], truth, images)
    with torch.no_grad():
        assert (truth(images) - f(images)).abs().max() > 1e-3


def test_same_padding_is_tensorflows():
    """⌈side/stride⌉ outputs, the odd pixel of padding last; by direct summation."""
    conv = haiku.same_padding_(nn.Conv2d(1, 1, 3, stride=2, padding=1, bias=False))
    nn.init.ones_(conv.weight)
    x = torch.arange(1.0, 17).view(1, 1, 4, 4)
    # Rows 0 to 2 and 2 to 4, of which 4 is padding; columns likewise.
    assert conv(x).flatten().tolist() == [54, 3 + 4 + 7 + 8 + 11 + 12, 9 + 10 + 11 + 39 + 3, 54]
    assert conv(torch.ones(1, 1, 5, 5)).flatten().tolist() == [4, 6, 4, 6, 9, 6, 4, 6, 4]
