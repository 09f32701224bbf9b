"""loralib's state dicts and PEFT's folders hold the same changes, in both directions."""

from __future__ import annotations

from pathlib import Path

import loralib
import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import lory.lora as lora
from lory.adapters.checkpoints import Weights
from lory.adapters.factors import read_adapter, write_adapter
from lory.adapters.loralib import Layout, Slices, loralib_to_peft, peft_to_loralib
from lory.runtime import UsageError

ALPHA = 6
IDS = torch.tensor([[1, 5, 9], [0, 10, 3]])


class Net(nn.Module):
    """One layer of each kind: embedding (11, 8), linear (8, 6), fused (6, 12) and convolution (4, 5, 3x3)."""

    def __init__(self, tokens: nn.Module, up: nn.Module, qkv: nn.Module, conv: nn.Module) -> None:
        super().__init__()
        self.wte, self.up, self.qkv, self.conv = tokens, up, qkv, conv

    def forward(self, ids: Tensor) -> Tensor:
        x = self.qkv(self.up(self.wte(ids)))  # (2, 3, 12)
        return self.conv(x.view(2, 4, 3, 3))


def plain() -> Net:
    return Net(nn.Embedding(11, 8), nn.Linear(8, 6), nn.Linear(6, 12), nn.Conv2d(4, 5, 3, padding=1))


def adapted(library: object, enabled: tuple[bool, ...] = (True, False, True)) -> Net:
    """The net with loralib's or our layers of ranks 2, 3, 2 and 1, all with random A and B."""
    options = {"lora_alpha": ALPHA, "merge_weights": False}
    net = Net(
        library.Embedding(11, 8, r=2, **options),
        library.Linear(8, 6, r=3, **options),
        library.MergedLinear(6, 12, r=2, enable_lora=list(enabled), **options),
        library.Conv2d(4, 5, 3, r=1, padding=1, **options),
    )
    randomize(net)
    return net


@torch.no_grad()
def randomize(net: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        parameter.normal_(std=0.3, generator=generator)


def without_adapter(net: Net) -> Net:
    """A plain net with the same base weights."""
    bare = plain()
    state = {name.replace(".conv.", "."): value for name, value in net.state_dict().items() if "lora_" not in name}
    state = {name.replace("conv.conv", "conv"): value for name, value in state.items()}
    bare.load_state_dict(state)
    return bare


LAYOUT = Layout(merged={"qkv": Slices((True, False, True))}, convolutions={"conv": (3, 3)})


def weights_of(net: nn.Module, bias: str = "none") -> Weights:
    return Weights(dict(loralib.lora_state_dict(net, bias)), (), Path("adapter.pt"))


@pytest.mark.parametrize("library", [loralib, lora], ids=["loralib", "lory"])
@pytest.mark.parametrize("enabled", [(True, False, True), (False, True, False), (True, True)])
def test_peft_gives_loralibs_outputs(tmp_path: Path, library: object, enabled: tuple[bool, ...]) -> None:
    net = adapted(library, enabled).eval()
    layout = Layout(merged={"qkv": Slices(enabled)}, convolutions={"conv": (3, 3)})
    loralib_to_peft(weights_of(net), tmp_path / "out", ALPHA, layout)
    bare = without_adapter(net).eval()
    assert not torch.allclose(bare(IDS), net(IDS), atol=0.1)
    loaded = peft.PeftModel.from_pretrained(bare, tmp_path / "out").eval()
    torch.testing.assert_close(loaded(IDS), net(IDS), rtol=1e-5, atol=1e-5)


def test_a_merged_linear_keeps_a_and_gets_a_block_diagonal_b(tmp_path: Path) -> None:
    net = adapted(loralib)
    made = loralib_to_peft(weights_of(net), tmp_path / "out", ALPHA, LAYOUT).layers["qkv"]
    assert torch.equal(made.lora_A, net.qkv.lora_A)
    expected = torch.zeros(12, 4)
    expected[:4, :2], expected[8:, 2:] = net.qkv.lora_B[:4].detach(), net.qkv.lora_B[4:].detach()
    assert torch.equal(made.lora_B, expected)
    assert made.scaling == net.qkv.scaling


def test_unequal_slices_are_exact(tmp_path: Path) -> None:
    layer = lora.MergedLinear(6, 10, r=2, lora_alpha=3, enable_lora=[True, False, True], out_slices=[5, 2, 3])
    randomize(layer)
    holder = nn.ModuleDict({"qkv": layer})
    layout = Layout(merged={"qkv": Slices.parse("5:1,2:0,3:1")})
    made = loralib_to_peft(weights_of(holder), tmp_path / "out", 3, layout).layers["qkv"]
    torch.testing.assert_close(made.lora_B @ made.lora_A * made.scaling, layer.delta_weight())


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_there_and_back_is_bit_for_bit(tmp_path: Path, suffix: str) -> None:
    net = adapted(loralib)
    given = weights_of(net, "all")
    layout = Layout(merged=LAYOUT.merged, convolutions={})
    tensors = {name: value for name, value in given.tensors.items() if not name.startswith("conv")}
    loralib_to_peft(Weights(tensors, (), Path("x")), tmp_path / "out", ALPHA, layout)
    _, alpha = peft_to_loralib(tmp_path / "out", tmp_path / f"back{suffix}", layout)
    path = tmp_path / f"back{suffix}"
    back = torch.load(path, weights_only=True) if suffix == ".pt" else load_file(path)
    assert alpha == ALPHA
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)


def test_a_convolution_of_pefts_is_one_of_loralibs_of_the_same_rank(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, lora_alpha=5, target_modules=["conv"], init_lora_weights=False)
    bare = plain()
    adapter = peft.get_peft_model(bare, config).eval()
    adapter.save_pretrained(tmp_path / "peft")
    state, alpha = peft_to_loralib(tmp_path / "peft", tmp_path / "out.pt", Layout())
    layer = loralib.Conv2d(4, 5, 3, r=2, lora_alpha=alpha, padding=1)
    layer.load_state_dict({name.removeprefix("conv."): value for name, value in state.items()}, strict=False)
    layer.conv.load_state_dict(bare.conv.base_layer.state_dict())
    x = torch.randn(2, 4, 3, 3)
    torch.testing.assert_close(layer(x), bare.conv(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel", [(3,), (2, 3), (3, 2), (2, 2, 3), (1, 1)])
def test_other_kernels_go_there_and_back(tmp_path: Path, kernel: tuple[int, ...]) -> None:
    conv = {1: lora.Conv1d, 2: lora.Conv2d, 3: lora.Conv3d}[len(kernel)]
    net = nn.ModuleDict({"conv": conv(4, 5, kernel, r=2, lora_alpha=3)})
    randomize(net)
    made = loralib_to_peft(weights_of(net), tmp_path / "peft", 3, Layout(convolutions={"conv": kernel})).layers["conv"]
    delta = (made.lora_B.flatten(1) @ made.lora_A.flatten(1) * made.scaling).view(5, 4, *kernel)
    torch.testing.assert_close(delta, net["conv"].delta_weight())
    state, alpha = peft_to_loralib(tmp_path / "peft", tmp_path / "back.pt", Layout())
    *others, last = kernel
    smaller = min(torch.Size(others).numel(), last)
    back = nn.ModuleDict({"conv": conv(4, 5, kernel, r=len(state["conv.lora_A"]) // smaller, lora_alpha=alpha)})
    back.load_state_dict(state, strict=False)
    torch.testing.assert_close(back["conv"].delta_weight(), delta)


def test_rslora_and_alpha_patterns_come_out_in_b(tmp_path: Path) -> None:
    config = peft.LoraConfig(
        r=4,
        lora_alpha=5,
        target_modules=["up", "qkv"],
        alpha_pattern={"up": 7},
        use_rslora=True,
        init_lora_weights=False,
    )
    bare = plain()
    adapter = peft.get_peft_model(bare, config).eval()
    adapter.save_pretrained(tmp_path / "peft")
    state, alpha = peft_to_loralib(tmp_path / "peft", tmp_path / "out.pt", Layout(), alpha=3)
    for name in ("up", "qkv"):
        delta = state[f"{name}.lora_B"] @ state[f"{name}.lora_A"] * alpha / 4
        torch.testing.assert_close(delta, getattr(bare, name).get_delta_weight("default"))


@pytest.mark.parametrize(("bias", "mode"), [("lora_only", "lora_only"), ("all", "all")])
def test_biases_travel_and_peft_loads_them(tmp_path: Path, bias: str, mode: str) -> None:
    net = nn.Sequential(loralib.Linear(3, 4, r=2, lora_alpha=ALPHA, merge_weights=False), nn.Linear(4, 2))
    randomize(net)
    loralib_to_peft(weights_of(net, bias), tmp_path / "out", ALPHA, Layout())
    bare = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    randomize(bare, 1)
    loaded = peft.PeftModel.from_pretrained(bare, tmp_path / "out")
    assert loaded.peft_config["default"].bias == mode
    assert torch.equal(bare[0].base_layer.bias, net[0].bias)
    assert torch.equal(bare[1].bias, net[1].bias) == (bias == "all")
    back, _ = peft_to_loralib(tmp_path / "out", tmp_path / "back.pt", Layout())
    assert back.keys() == weights_of(net, bias).tensors.keys()


def test_a_classifier_is_stored_whole(tmp_path: Path) -> None:
    net = nn.ModuleDict({"up": loralib.Linear(3, 4, r=2), "classifier": nn.Linear(4, 2)})
    randomize(net)
    tensors = weights_of(net).tensors | {f"classifier.{k}": v for k, v in net["classifier"].state_dict().items()}
    weights = Weights(tensors, (), Path("x.pt"))
    with pytest.raises(UsageError, match=r"'classifier\.weight'.*--save-module"):
        loralib_to_peft(weights, tmp_path / "out", 1, Layout())
    loralib_to_peft(weights, tmp_path / "out", 1, Layout(), modules_to_save=["classifier"])
    bare = nn.ModuleDict({"up": nn.Linear(3, 4), "classifier": nn.Linear(4, 2)})
    peft.PeftModel.from_pretrained(bare, tmp_path / "out")
    assert torch.equal(bare["classifier"].modules_to_save["default"].weight, net["classifier"].weight)


def test_fan_in_fan_out_is_said_in_the_config(tmp_path: Path) -> None:
    layer = loralib.Linear(3, 4, r=2, lora_alpha=2, fan_in_fan_out=True)
    randomize(layer)
    net = nn.ModuleDict({"c_fc": layer})
    made = loralib_to_peft(weights_of(net), tmp_path / "out", 2, Layout(), fan_in_fan_out=True)
    assert read_adapter(tmp_path / "out").fan_in_fan_out
    before = layer.weight.clone()
    layer.eval()  # merges: (in, out)
    torch.testing.assert_close(
        (made.layers["c_fc"].lora_B @ made.layers["c_fc"].lora_A * made.layers["c_fc"].scaling).T,
        layer.weight - before,
    )


def test_what_the_shapes_leave_open_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"'qkv'.*MergedLinear with 2 adapted slices.*--merged 'qkv=1,0,1'"):
        loralib_to_peft(weights_of(adapted(loralib)), tmp_path / "out", ALPHA, Layout(convolutions={"conv": (3, 3)}))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (Layout(merged={"kqv": Slices((True,))}), "'kqv' matches none of the adapted layers"),
        (Layout(merged={"qkv": Slices((True, True, True))}), "'qkv'.*not of 3 adapted slices"),
        (Layout(merged={"qkv": Slices.parse("5:1,3:0,4:1")}), "8 adapted outputs, which don't make up its 2"),
        (Layout(merged=LAYOUT.merged, convolutions={"conv": (5, 5)}), "not of a convolution with kernel"),
        (Layout(merged={"(qkv": Slices((True,))}), "broken regular expression"),
    ],
)
def test_a_layout_that_does_not_fit_is_refused(tmp_path: Path, layout: Layout, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        loralib_to_peft(weights_of(adapted(loralib)), tmp_path / "out", ALPHA, layout)


def test_a_full_b_is_no_merged_linear(tmp_path: Path) -> None:
    made = loralib_to_peft(weights_of(adapted(loralib)), tmp_path / "out", ALPHA, LAYOUT)
    made.layers["qkv"].lora_B[0, 3] = 1
    (tmp_path / "full").mkdir()
    write_adapter(tmp_path / "full", made)
    with pytest.raises(UsageError, match="'qkv' has a B that is not block-diagonal"):
        peft_to_loralib(tmp_path / "full", tmp_path / "x.pt", LAYOUT)
    state, _ = peft_to_loralib(tmp_path / "full", tmp_path / "x.pt", Layout())  # a Linear takes it
    assert state["qkv.lora_B"].shape == (12, 4)


@pytest.mark.parametrize("text", ["", "1,2", "0,0", "5:1,0", "a:1,5:0"])
def test_slices_that_mean_nothing_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="1,0,1"):
        Slices.parse(text)


def test_dora_is_refused_by_name(tmp_path: Path) -> None:
    adapter = peft.get_peft_model(plain(), peft.LoraConfig(r=2, target_modules=["up"], use_dora=True))
    adapter.save_pretrained(tmp_path / "peft")
    with pytest.raises(UsageError, match="uses use_dora"):
        peft_to_loralib(tmp_path / "peft", tmp_path / "x.pt", Layout())
