import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from nucseg.errors import InputError
from nucseg.model import lora
from nucseg.model.adapters import read_adapter, read_decoding, save_adapter
from nucseg.model.lora import DoRALinear, LoRAConv2d, LoRALinear, inject


def test_the_update_is_the_papers_equation_by_hand():
    layer = LoRALinear(nn.Linear(2, 3), r=1, alpha=2.0)
    with torch.no_grad():
        layer.linear.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]))
        layer.linear.bias.copy_(torch.tensor([0.5, 0.0, 0.0]))
        layer.lora_A.copy_(torch.tensor([[1.0, -1.0]]))
        layer.lora_B.copy_(torch.tensor([[1.0], [2.0], [0.0]]))
    # W0 x + b = (3.5, 1, 4); A x = 2; B A x = (2, 4, 0); scaling = 2 / 1
    assert layer(torch.tensor([3.0, 1.0])).tolist() == [7.5, 9.0, 4.0]


@settings(max_examples=40, deadline=None)
@given(
    inputs=st.integers(1, 9),
    outputs=st.integers(1, 9),
    share=st.floats(0, 1),
    alpha=st.floats(0.1, 32),
    seed=st.integers(0, 99),
)
def test_invariants(inputs, outputs, share, alpha, seed):
    torch.manual_seed(seed)
    linear = nn.Linear(inputs, outputs)
    r = 1 + int(share * (min(inputs, outputs) - 1))
    x = torch.randn(4, inputs)
    frozen = linear(x)
    layer = LoRALinear(linear, r, alpha)
    assert torch.equal(layer(x), frozen)  # B = 0
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == ["lora_A", "lora_B"]
    nn.init.normal_(layer.lora_B)
    assert torch.linalg.matrix_rank(layer.delta(), rtol=1e-4) <= r
    expected = frozen + (alpha / r) * x @ layer.lora_A.T @ layer.lora_B.T
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
    weight = linear.weight.clone()
    layer.merge()
    torch.testing.assert_close(linear(x), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
    layer.unmerge()
    assert torch.equal(linear.weight, weight)


def test_dora_is_the_papers_equation_by_hand():
    layer = DoRALinear(nn.Linear(2, 2), r=1, alpha=1.0)
    with torch.no_grad():
        layer.linear.weight.copy_(torch.tensor([[3.0, 4.0], [0.0, 2.0]]))
        layer.linear.bias.zero_()
        layer.lora_magnitude.copy_(torch.tensor([10.0, 2.0]))
    # row norms of W0 are 5 and 2, so the first row becomes 10 / 5 * (3, 4)
    assert layer(torch.tensor([1.0, 1.0])).tolist() == pytest.approx([14.0, 2.0])
    with torch.no_grad():
        layer.lora_A.copy_(torch.tensor([[1.0, 0.0]]))
        layer.lora_B.copy_(torch.tensor([[0.0], [2.0]]))
    # the second row of W0 + B A is (2, 2), of norm 2 sqrt(2): 2 / (2 sqrt(2)) * (2, 2) = (sqrt(2), sqrt(2))
    assert layer(torch.tensor([1.0, 1.0])).tolist() == pytest.approx([14.0, 2 * math.sqrt(2)])


@settings(max_examples=20, deadline=None)
@given(inputs=st.integers(1, 6), outputs=st.integers(1, 6), seed=st.integers(0, 99))
def test_dora_starts_at_the_frozen_layer_and_merges(inputs, outputs, seed):
    torch.manual_seed(seed)
    linear, x = nn.Linear(inputs, outputs), torch.randn(3, inputs)
    frozen, weight = linear(x), linear.weight.clone()
    layer = DoRALinear(linear, 1, 1.0)
    torch.testing.assert_close(layer(x), frozen)
    nn.init.normal_(layer.lora_B)
    nn.init.uniform_(layer.lora_magnitude)
    torch.testing.assert_close(layer.adapted().norm(dim=1), layer.lora_magnitude)  # the row norms are the magnitudes
    before = layer(x)
    layer.merge()
    torch.testing.assert_close(layer(x), before)
    layer.unmerge()
    assert torch.equal(layer.linear.weight, weight)
    trained = [name for name, p in layer.named_parameters() if p.requires_grad]
    assert sorted(trained) == ["lora_A", "lora_B", "lora_magnitude"]


@pytest.mark.parametrize("bias", [True, False])
def test_gradients_are_those_of_the_equation(bias: bool):
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(7, 5, bias=bias, dtype=torch.float64), r=3, alpha=2)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(2, 4, 7, dtype=torch.float64, requires_grad=True)
    leaves = [x, layer.lora_A, layer.lora_B]
    update = layer.scaling * nn.functional.linear(nn.functional.linear(x, layer.lora_A), layer.lora_B)
    for out in (layer(x), layer(x.transpose(0, 1)).transpose(0, 1)):
        expected = layer.linear(x) + update
        assert torch.allclose(out, expected)
        ours, theirs = (torch.autograd.grad(y.pow(3).sum(), leaves, retain_graph=True) for y in (out, expected))
        assert all(torch.allclose(a, b) for a, b in zip(ours, theirs, strict=True))
    assert layer.linear.weight.grad is None
    layer(x.detach()).sum().backward()  # the first layer of a frozen network: its input needs no gradient
    assert layer.lora_A.grad is not None


def test_in_bfloat16_the_update_and_its_gradients_survive():
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(256, 256), r=2, alpha=2)
    nn.init.normal_(layer.lora_B, std=0.002)  # a step or two after the start
    x = torch.randn(64, 256)
    update = (layer(x) - layer.linear(x)).detach()
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x)
        difference = found.float() - layer.linear(x).float()
    assert found.dtype == torch.bfloat16
    assert ((difference * update).sum() / update.square().sum()).item() == pytest.approx(1, abs=0.1)
    gradients = [torch.autograd.grad(y.float().square().sum(), layer.lora_B)[0] for y in (found, layer(x))]
    assert (gradients[0] - gradients[1]).norm() < 0.02 * gradients[1].norm()


def test_dropout_touches_the_update_alone():
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(50, 5), r=2, alpha=2.0, dropout=0.5)
    x = torch.randn(3, 50)
    assert torch.equal(layer.train()(x), layer.linear(x))  # B = 0, dropped or not
    nn.init.normal_(layer.lora_B)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_non_finite_weights_are_not_merged():
    layer = LoRALinear(nn.Linear(4, 4), r=2, alpha=2.0)
    weight = layer.linear.weight.clone()
    with torch.no_grad():
        layer.lora_B.fill_(math.inf)
    with pytest.raises(InputError, match="not finite"):
        layer.merge()
    assert torch.equal(layer.linear.weight, weight) and not layer.merged


def network() -> nn.Module:
    return nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Sequential(nn.Linear(8, 2), nn.ReLU())})


def test_inject_changes_nothing_when_one_layer_cannot_take_the_rank():
    model = network()
    with pytest.raises(InputError, match="8 -> 2"):
        inject(model, r=4, alpha=4)
    assert not lora.lora_layers(model)
    assert inject(model, r=4, alpha=4, skip=("b",)) == ["a"]
    with pytest.raises(InputError, match="already"):
        inject(model, r=1, alpha=1)


def test_inject_refuses_a_placement_that_matches_nothing():
    with pytest.raises(InputError, match="matches no Linear"):
        inject(network(), r=1, alpha=1, lora_target="qkv")
    with pytest.raises(InputError, match="not known"):
        inject(network(), r=1, alpha=1, lora_target="nowhere")


def test_a_merged_model_unmerges_as_a_whole():
    model = network()
    inject(model, r=1, alpha=1)
    for layer in lora.lora_layers(model).values():
        nn.init.normal_(layer.lora_B)
    lora.merge(model)
    assert all(layer.merged for layer in lora.lora_layers(model).values())
    lora.unmerge(model)
    assert not any(layer.merged for layer in lora.lora_layers(model).values())


def test_adapter_files_hold_config_and_base(tmp_path):
    path = tmp_path / "a.safetensors"
    save_adapter(path, {"x": torch.arange(3.0)}, {"rank": 8, "lora_target": "all"}, "f" * 64)
    tensors, config, base = read_adapter(path)
    assert tensors["x"].tolist() == [0, 1, 2]
    assert config == {"rank": 8, "lora_target": "all"}
    assert base == "f" * 64


def test_a_foreign_safetensors_file_is_named_as_such(tmp_path):
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="not an adapter written by nucseg"):
        read_adapter(tmp_path / "other.safetensors")


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=300))
def test_random_bytes_are_never_an_adapter(data, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    path.write_bytes(data)
    with pytest.raises(InputError):
        read_adapter(path)


def test_the_update_of_a_convolution_by_hand():
    layer = LoRAConv2d(nn.Conv2d(2, 1, 1), r=1, alpha=3.0)
    with torch.no_grad():
        layer.linear.weight.copy_(torch.tensor([1.0, -1.0]).view(1, 2, 1, 1))
        layer.linear.bias.fill_(0.5)
        layer.lora_A.copy_(torch.tensor([2.0, 1.0]).view(1, 2, 1, 1))
        layer.lora_B.fill_(-1.0)
    x = torch.tensor([[4.0, 0.0], [1.0, 2.0]]).view(1, 2, 1, 2)  # pixels (4, 1) and (0, 2)
    # W0 x + b = (3.5, -1.5); A x = (9, 2); B A x = (-9, -2); scaling = 3 / 1
    assert layer(x).flatten().tolist() == [3.5 - 27, -1.5 - 6]


@settings(max_examples=30, deadline=None)
@given(
    inputs=st.integers(1, 6),
    outputs=st.integers(1, 6),
    kernel=st.sampled_from([1, 2, 3]),
    stride=st.integers(1, 2),
    share=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_invariants_of_convolutions(inputs, outputs, kernel, stride, share, seed):
    torch.manual_seed(seed)
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, dilation=2 if kernel == 3 else 1)
    x = torch.randn(2, inputs, 9, 7)
    frozen, weight = conv(x), conv.weight.clone()
    layer = LoRAConv2d(conv, 1 + int(share * (min(inputs * kernel**2, outputs) - 1)), alpha=2.5)
    assert torch.equal(layer(x), frozen)  # B = 0
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == ["lora_A", "lora_B"]
    nn.init.normal_(layer.lora_B)
    assert torch.linalg.matrix_rank(layer.delta().flatten(1), rtol=1e-4) <= layer.r
    expected = F.conv2d(x, weight + layer.delta(), conv.bias, stride, kernel // 2, conv.dilation)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
    layer.merge()
    layer.merge()
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(conv(x), expected, rtol=1e-4, atol=1e-4)
    layer.unmerge()
    assert torch.equal(conv.weight, weight)


def test_a_1x1_convolution_is_a_linear_layer_over_pixels():
    torch.manual_seed(0)
    conv, linear = nn.Conv2d(5, 4, 1), nn.Linear(5, 4)
    a, b = LoRAConv2d(conv, r=2, alpha=4), LoRALinear(linear, r=2, alpha=4)
    with torch.no_grad():
        linear.weight.copy_(conv.weight.flatten(1))
        linear.bias.copy_(conv.bias)
        b.lora_A.copy_(a.lora_A.flatten(1))
        nn.init.normal_(b.lora_B)
        a.lora_B.copy_(b.lora_B.view_as(a.lora_B))
    x = torch.randn(2, 5, 3, 6)
    torch.testing.assert_close(a(x), b(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
    torch.testing.assert_close(a.delta().flatten(1), b.delta())


def test_inject_wraps_convolutions_only_if_asked_and_never_depthwise_ones():
    def make() -> nn.Module:
        return nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Conv2d(8, 8, 1), "c": nn.Conv2d(8, 8, 3, groups=8)})

    assert inject(make(), r=2, alpha=2) == ["a"]
    model = make()
    assert inject(model, r=2, alpha=2, conv=True) == ["a", "b"]
    assert isinstance(model["b"], LoRAConv2d) and isinstance(model["c"], nn.Conv2d)
    with pytest.raises(InputError, match="grouped"):
        LoRAConv2d(nn.Conv2d(8, 8, 3, groups=8), r=1, alpha=1)
    with pytest.raises(InputError, match="9 -> 4"):
        LoRAConv2d(nn.Conv2d(1, 4, 3), r=5, alpha=1)


def test_adapter_files_may_hold_a_decoding(tmp_path):
    path = tmp_path / "a.safetensors"
    save_adapter(path, {"x": torch.zeros(1)}, {}, "")
    assert read_decoding(path) == {}
    save_adapter(path, {"x": torch.zeros(1)}, {}, "", {"threshold": 0.4})
    assert read_decoding(path) == {"threshold": 0.4}
    save_adapter(path, {"x": torch.zeros(1)}, {}, "", ["no", "dictionary"])
    with pytest.raises(InputError, match="damaged"):
        read_decoding(path)
