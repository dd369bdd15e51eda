import dataclasses

import numpy as np
import pytest
import torch

from nucseg.config import ModelConfig
from nucseg.data.synth import Synthetic
from nucseg.errors import InputError
from nucseg.model import lora
from nucseg.model.bases import Base, random_base
from nucseg.model.heads import LayerNorm2d
from nucseg.model.network import build_model, is_plain, load_model, parameter_ledger, place, predict, save_model
from nucseg.model.sam import Encoder, build_sam

SMALL = ModelConfig(base="random", size=64, rank=4, alpha=4, dropout=0.0)


@pytest.fixture(scope="module")
def base() -> Base:
    """A random base whose BatchNorm statistics and zero-initialised weights are not the trivial ones."""
    generator = torch.Generator().manual_seed(1)
    state = {}
    for name, tensor in random_base(0).state.items():
        if name.endswith("running_var"):
            tensor = 0.5 + torch.rand(tensor.shape, generator=generator)
        elif name.endswith("running_mean") or "attention_biases" in name:
            tensor = 0.2 * torch.randn(tensor.shape, generator=generator)
        elif name.endswith("conv3.bn.weight"):
            tensor = torch.rand(tensor.shape, generator=generator)
        state[name] = tensor
    return Base("random", state, "0" * 64)


def images(n: int = 1, size: int = 64, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def make(base: Base, **changes):
    torch.manual_seed(0)
    return build_model(dataclasses.replace(SMALL, **changes), base)


def randomise(model) -> None:
    """As after training: every LoRA B away from zero."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for layer in lora.lora_layers(model).values():
            layer.lora_B.copy_(0.05 * torch.randn(layer.lora_B.shape, generator=generator))


@pytest.mark.parametrize(
    ("changes", "trainable", "total"),
    [
        # the report's own counts, which belong to rank 4 on every Linear with the unused classifier
        ({"rank": 4, "unused_head": True}, 124_321, 10_254_413),
        ({"rank": 8, "unused_head": True}, 248_385, 10_378_477),
        ({"rank": 2, "unused_head": True}, 62_289, 10_192_381),
        ({"rank": 16, "unused_head": True}, 496_513, 10_626_605),
        ({"rank": 4, "lora_target": "qkv"}, 29_696 + 257, None),
        ({"rank": 4, "lora_target": "attention"}, 29_696 + 14_848 + 257, None),
        ({"rank": 4, "lora_target": "mlp"}, 74_240 + 257, None),
        ({"rank": 4}, 124_321 - 5_280, None),
        ({"lora_target": "none"}, 257, 10_130_092 + 257),
        ({"lora_target": "full"}, 6_065_532 + 257, None),
    ],
)
def test_parameter_ledger(base, changes, trainable, total):
    ledger = parameter_ledger(make(base, **changes))
    assert ledger["base"] == 10_130_092
    assert ledger["trainable"] == trainable
    assert ledger["total"] == 10_130_092 + ledger["lora"] + ledger["head"]
    if total:
        assert ledger["total"] == total


def test_dora_trains_a_norm_for_each_row_too(base):
    plain = make(base, lora_target="qkv", rank=4)
    model = make(base, lora_target="qkv", rank=4, dora=True)
    rows = sum(layer.linear.out_features for layer in lora.lora_layers(model).values())
    assert parameter_ledger(model)["trainable"] == parameter_ledger(plain)["trainable"] + rows
    x = images()
    assert torch.allclose(model(x), plain(x), atol=1e-5)  # both start at the base


def test_norms_and_biases_alone(base, tmp_path):
    model = make(base, head="instance", lora_target="norms")
    trained = {name for name, p in model.encoder.named_parameters() if p.requires_grad}
    assert {name.rpartition(".")[2] for name in trained} == {"weight", "bias"}
    parts = dict(model.encoder.named_parameters())
    assert all(parts[name].ndim == 1 for name in trained)  # no matrix and no kernel
    assert not [name for name in trained if name.startswith(("head", "neck", "norm_head"))]
    left = {name for name, p in parts.items() if p.ndim == 1 and not name.startswith(("head", "neck", "norm_head"))}
    assert trained == left
    with torch.no_grad():
        parts["layers.1.blocks.0.mlp.fc1.bias"] += 1
    save_model(tmp_path / "a.safetensors", model)
    assert torch.equal(load_model(tmp_path / "a.safetensors", base)(images()), model(images()))


def test_late_placement_is_the_last_two_stages(base):
    names = lora.lora_layers(make(base, lora_target="late"))
    assert len(names) == 8 * 4  # 6 + 2 blocks of qkv, proj, fc1, fc2
    assert all(name.startswith(("encoder.layers.2.", "encoder.layers.3.")) for name in names)


@torch.no_grad()
def test_encoder_equals_the_stock_one_at_1024_px(base):
    sam = build_sam()
    sam.load_state_dict(base.state)
    stock = sam.image_encoder.eval()
    model = make(base, size=1024, lora_target="none")
    x = (images(size=1024).float() - model.mean) / model.std
    expected = stock(x)
    assert (model.encoder(x) - expected).abs().max() < 1e-5
    assert expected.abs().max() > 0.1  # not two empty outputs
    with_lora = make(base, size=1024)
    assert (with_lora.encoder(x) - expected).abs().max() < 1e-5  # B = 0: step 0 is the base


@torch.no_grad()
@pytest.mark.parametrize("size", [(64, 64), (256, 256), (128, 192)])
def test_encoder_runs_at_other_sizes_and_returns_to_the_first(base, size):
    encoder = Encoder().eval()
    encoder.load_state_dict(
        {k.removeprefix("image_encoder."): v for k, v in base.state.items() if k.startswith("image_")}
    )
    encoder.eval()
    small = torch.randn(1, 3, 64, 64)
    before = encoder(small)
    fine, middle, coarse, neck = encoder.features(torch.randn(2, 3, *size))
    h, w = size
    assert fine.shape == (2, 64, h // 4, w // 4)
    assert middle.shape == (2, 128, h // 8, w // 8)
    assert coarse.shape == (2, 320, h // 16, w // 16)
    assert neck.shape == (2, 256, h // 16, w // 16)
    assert torch.equal(encoder(small), before)
    with pytest.raises(InputError, match="multiples of 16"):
        encoder(torch.randn(1, 3, 72, 64))


def mobile_sams_features(encoder: Encoder, x: torch.Tensor) -> list[torch.Tensor]:
    """The features by mobile_sam's own code, which pads windows and copies, told the size of the grid."""
    height, width = x.shape[-2:]
    x, features = encoder.patch_embed(x), []
    for layer, stride in zip(encoder.layers, (4, 8, 16, 16), strict=True):
        grid = height // stride, width // stride
        for block in layer.blocks:
            block.input_resolution = grid
            x = block(x)
        features.append(x if x.ndim == 4 else x.transpose(1, 2).unflatten(2, grid))
        if layer.downsample is not None:
            layer.downsample.input_resolution = grid
            x = layer.downsample(x)
    return [features[0], features[1], features[3], encoder.neck(features[3])]


@pytest.mark.parametrize("size", [(64, 64), (224, 448), (256, 288), (16, 336), (112, 240)])
@pytest.mark.parametrize("training", [False, True])
def test_features_equal_mobile_sams_own_way_through_the_layers(base, size, training):
    """Windows that fit, that reach beyond below, to the right, both, and a map smaller than a window."""
    encoder = Encoder()
    encoder.load_state_dict(
        {k.removeprefix("image_encoder."): v for k, v in base.state.items() if k.startswith("image_")}
    )
    for name, parameter in encoder.named_parameters():  # biases are 0 in a fresh network, and would hide a mistake
        if name.endswith(("attention_biases", ".bias")):
            torch.nn.init.normal_(parameter, std=0.3)
    encoder.train(training)
    for module in encoder.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    x = torch.randn(2, 3, *size)
    ways, gradients = (encoder.features(x), mobile_sams_features(encoder, x)), []
    for ours, stock in zip(*ways, strict=True):
        assert torch.allclose(ours, stock, atol=1e-5, rtol=1e-5)
    weights = [m.weight for m in encoder.layers.modules() if isinstance(m, torch.nn.Linear)]
    for way in ways:
        gradients.append(torch.autograd.grad(sum(y.square().mean() for y in way), weights))
    for ours, stock in zip(*gradients, strict=True):
        assert torch.allclose(ours, stock, atol=1e-5, rtol=1e-3)


def train_a_little(model, steps: int = 3) -> None:
    model.train()
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(steps):
        loss = (model(images(2, seed=step)) - 1).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    model.eval()


@pytest.mark.parametrize(
    "changes",
    [
        {"dropout": 0.1},
        {"head": "mask_decoder", "decoder_lora_target": "attention"},
        {"lora_target": "none"},
        {"head": "instance"},
    ],
)
def test_training_leaves_the_base_bit_identical(base, changes):
    model = make(base, **changes)
    adapter = {name: tensor.clone() for name, tensor in model.adapter_state().items()}
    train_a_little(model)
    frozen = {name.replace(".linear.", "."): t for name, t in model.state_dict().items() if name not in adapter}
    compared = 0
    for name, tensor in frozen.items():
        original = name.replace("encoder.", "image_encoder.", 1) if name.startswith("encoder.") else name
        original = original.removeprefix("head.")
        assert torch.equal(tensor, base.state[original]), name
        compared += 1
    assert compared >= 240
    # the unused half: something did change, and every trained tensor of LoRA B and the head did
    changed = {n for n, t in model.adapter_state().items() if not torch.equal(t, adapter[n])}
    assert changed == set(adapter)


def test_full_fine_tuning_trains_the_batchnorm_too(base):
    model = make(base, lora_target="full")
    train_a_little(model, 1)
    name = "encoder.patch_embed.seq.0.bn.running_mean"
    assert name in model.adapter_state()
    assert not torch.equal(model.state_dict()[name], base.state["image_" + name])


@torch.no_grad()
def test_merged_equals_unmerged_after_training(base):
    with torch.enable_grad():
        model = make(base, head="mask_decoder", decoder_lora_target="all")
        train_a_little(model)
    x = images(2)
    before = model(x)
    weights = {n: t.clone() for n, t in model.state_dict().items()}
    lora.merge(model)
    lora.merge(model)  # idempotent
    assert (model(x) - before).abs().max() < 1e-5
    assert any(not torch.equal(t, weights[n]) for n, t in model.state_dict().items())
    lora.unmerge(model)
    lora.unmerge(model)
    assert all(torch.equal(t, weights[n]) for n, t in model.state_dict().items())
    assert torch.equal(model(x), before)


@torch.no_grad()
def test_mask_decoder_head_equals_mobile_sam_without_prompts(base):
    sam = build_sam()
    sam.load_state_dict(base.state)
    sam.eval()
    model = make(base, size=1024, head="mask_decoder")
    x = images(size=1024)
    sparse, dense = sam.prompt_encoder(points=None, boxes=None, masks=None)
    expected, _ = sam.mask_decoder(
        image_embeddings=sam.image_encoder(sam.preprocess(x.float())),
        image_pe=sam.prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
        multimask_output=False,
    )
    found = model.head(model.encoder.features((x.float() - model.mean) / model.std))
    assert found.shape == (1, 1, 256, 256)
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


@torch.no_grad()
def test_instance_head_is_small_and_ends_at_stride_2(base):
    model = make(base, head="instance", rank=8)
    ledger = parameter_ledger(model)
    assert ledger["trainable"] == ledger["lora"] + ledger["head"] < 0.06 * ledger["total"]
    x = torch.randn(2, 3, 64, 128)
    assert model.head((x, *model.encoder.features(x))).shape == (2, 2, 32, 64)
    assert model(images(2)).shape == (2, 2, 64, 64)


@torch.no_grad()
def test_a_batch_gives_what_its_images_give_alone(base):
    for head in ("linear", "mask_decoder", "instance"):
        model = make(base, head=head)
        randomise(model)
        x = images(3)
        alone = torch.cat([model(one[None]) for one in x])
        assert (model(x) - alone).abs().max() < 1e-4


def test_decoder_lora_gets_gradients(base):
    model = make(base, head="mask_decoder", lora_target="none", decoder_lora_target="all").train()
    randomise(model)
    model(images()).square().mean().backward()
    layers = lora.lora_layers(model)
    assert len(layers) == 35  # 28 attention projections, 2 x 2 of the MLPs, 3 of the first hypernetwork
    assert all(layer.lora_A.grad is not None and layer.lora_A.grad.abs().sum() > 0 for layer in layers.values())


def test_the_unused_head_gets_no_gradient(base):
    model = make(base, unused_head=True).train()
    randomise(model)
    model(images()).square().mean().backward()
    without = {n for n, layer in lora.lora_layers(model).items() if layer.lora_A.grad is None}
    assert without == {"encoder.head"}


def test_images_are_normalised_once(base):
    model = make(base)
    with pytest.raises(InputError, match="uint8"):
        model(images().float())


@torch.no_grad()
def test_predict_keeps_the_image_size_and_handles_any_shape(base):
    model = make(base)
    rng = np.random.default_rng(0)
    for shape in [(64, 64), (50, 90), (200, 31), (1, 7)]:
        found = predict(model, rng.integers(0, 256, (*shape, 3), dtype=np.uint8))
        assert found.shape == (1, *shape)
        assert found.dtype == np.float32
        assert ((found >= 0) & (found <= 1)).all()
    image = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    direct = torch.sigmoid(model(torch.from_numpy(image).permute(2, 0, 1)[None]))[0].numpy()
    np.testing.assert_allclose(predict(model, image), direct, atol=1e-6)


def test_adapter_round_trip_and_refusals(base, tmp_path):
    model = make(base, unused_head=True)
    train_a_little(model)
    path = tmp_path / "adapter.safetensors"
    save_model(path, model)
    assert path.stat().st_size < 600_000
    again = load_model(path, base)
    with torch.no_grad():
        assert torch.equal(again(images()), model(images()))
    other = dataclasses.replace(base, sha256="1" * 64)
    with pytest.raises(InputError, match="another base"):
        load_model(path, other)
    with pytest.raises(InputError, match="no such adapter"):
        load_model(tmp_path / "missing.safetensors", base)
    whole = path.read_bytes()
    for cut in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(InputError, match="not a readable adapter"):
            load_model(path, base)


def test_adapter_that_does_not_fit_is_refused(base):
    model = make(base)
    tensors = model.adapter_state()
    name = next(iter(tensors))
    with pytest.raises(InputError, match="does not fit"):
        model.load_adapter_state({n: t for n, t in tensors.items() if n != name})
    with pytest.raises(InputError, match="does not fit"):
        model.load_adapter_state(tensors | {name: tensors[name][:1]})


def test_an_adapter_with_non_finite_values_is_not_written(base, tmp_path):
    model = make(base)
    with torch.no_grad():
        model.head.conv.bias.fill_(float("nan"))
    with pytest.raises(InputError, match="not finite"):
        save_model(tmp_path / "a.safetensors", model)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"rank": 0}, "rank 0"),
        ({"rank": -1}, "rank -1"),
        ({"rank": 10_000}, "rank 10000"),
        ({"alpha": 0}, "alpha"),
        ({"alpha": float("nan")}, "alpha"),
        ({"dropout": 1.0}, "dropout"),
        ({"lora_target": "everywhere"}, "everywhere"),
        ({"head": "hydra"}, "hydra"),
        ({"size": 100}, "100"),
        ({"size": 2048}, "2048"),
        ({"decoder_lora_target": "all"}, "mask_decoder"),
        ({"head_norm": "none"}, "head_norm"),
        ({"head_width": 100}, "multiple of 32"),
        ({"head": "instance", "head_width": 96}, "fresh"),
        ({"lora_conv": True, "lora_target": "qkv"}, "lora_conv"),
        ({"dora": True, "dropout": 0.1}, "dora"),
        ({"dora": True, "lora_target": "none", "dropout": 0.0}, "dora"),
    ],
)
def test_bad_configs_are_one_sentence(base, changes, word):
    with pytest.raises(InputError, match=word) as error:
        make(base, **changes)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------- precision and pieces


def test_bfloat16_is_close_to_float32_and_saved_weights_do_not_change(base, tmp_path):
    model = make(base, head="instance")
    image = images(1, 128)[0].permute(1, 2, 0).numpy()
    exact = predict(model, image)
    assert model.precision == "float32"
    place(model, torch.device("cpu"), "bfloat16")
    rounded = predict(model, image)
    assert 0 < np.abs(rounded - exact).max() < 0.05
    assert all(p.dtype == torch.float32 for p in model.parameters())
    save_model(tmp_path / "a.safetensors", model)
    again = predict(load_model(tmp_path / "a.safetensors", base), image)
    assert np.abs(again - exact).max() < 1e-5
    assert place(model, torch.device("cpu")).precision in ("float32", "bfloat16")
    with pytest.raises(InputError, match="float8"):
        place(model, torch.device("cpu"), "float8")


def test_gradients_in_bfloat16_point_where_float32s_do(base):
    gradients = []
    for precision in ("float32", "bfloat16"):
        model = place(make(base, head="instance"), torch.device("cpu"), precision).train()
        model(images(2)).square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert torch.cosine_similarity(*gradients, dim=0) > 0.99


@pytest.mark.parametrize("piece", ["stem", "fine", "middle"])
def test_a_piece_that_is_left_out_learns_nothing(base, piece):
    for without, learns in (("", True), (piece, False)):
        model = make(base, head="instance", without=without).train()
        model(images()).sum().backward()
        gradients = [p.grad for p in getattr(model.head, piece).parameters()]
        assert all((g is not None and bool(g.abs().max() > 0)) == learns for g in gradients)


def test_without_depth_there_is_one_map_and_components_are_the_nuclei(base):
    from nucseg.inference.evaluate import segment_whole
    from nucseg.instances import components

    model = make(base, head="instance", without="distance")
    image = images(1, 128)[0].permute(1, 2, 0).numpy()
    maps = predict(model, image)
    assert maps.shape == (1, 128, 128)
    np.testing.assert_array_equal(segment_whole(model, image, 0.5, 20), components(maps[0], 0.5, 20))
    with pytest.raises(InputError, match="without"):
        make(base, without="distance")


@pytest.mark.parametrize(("norm", "same"), [("group", False), ("layer", True), ("batch", True)])
def test_a_field_looks_the_same_inside_a_larger_one(norm, same):
    """Within the first attention window (14 tokens of 16 px) all that a pixel depends on is the same, but the field."""
    torch.manual_seed(0)
    model = build_model(ModelConfig(base="offline", size=512, head="instance", head_norm=norm, head_start="fresh"))
    others = [Synthetic(n_per_tissue=1, seed=1)[i].image for i in (0, 7, 14, 21)]
    larger = np.concatenate([np.concatenate(others[:2], axis=1), np.concatenate(others[2:], axis=1)])
    window = np.s_[:, :192, :192]  # 224 px without what the head's convolutions see beyond
    difference = np.abs(predict(model, others[0], 1.0)[window] - predict(model, larger, 1.0)[window])
    assert (difference.max() < 1e-3) == same
    assert difference.max() > 0.05 or same


def test_batchnorm_in_the_head_travels_with_the_adapter(base, tmp_path):
    model = make(base, head="instance", head_norm="batch", head_width=32, head_start="fresh").train()
    model(images(2))  # running statistics change
    buffers = {n: t.clone() for n, t in model.head.named_buffers()}
    assert any(not torch.equal(t, torch.zeros_like(t)) for n, t in buffers.items() if n.endswith("running_mean"))
    save_model(tmp_path / "a.safetensors", model)
    loaded = load_model(tmp_path / "a.safetensors", base)
    assert all(torch.equal(t, buffers[n]) for n, t in loaded.head.named_buffers())
    assert torch.equal(loaded(images(1)), model.eval()(images(1)))


def test_layernorm2d_is_sams(base):
    from mobile_sam.modeling.common import LayerNorm2d as Stock

    ours, stock = LayerNorm2d(6), Stock(6, eps=LayerNorm2d(6).eps)
    x = torch.randn(2, 6, 3, 5)
    with torch.no_grad():
        for layer in (ours, stock):
            layer.weight.copy_(torch.arange(6.0))
            layer.bias.copy_(torch.arange(6.0) - 2)
    torch.testing.assert_close(ours(x), stock(x))


def test_lora_on_convolutions_trains_all_that_run_and_merges(base):
    model = make(base, head="instance", lora_conv=True, rank=2).train()
    randomise(model)
    convolutions = {n: m for n, m in lora.lora_layers(model).items() if isinstance(m, lora.LoRAConv2d)}
    assert len(convolutions) == 12 and not any("neck" in name or "local_conv" in name for name in convolutions)
    model(images()).square().mean().backward()
    assert all(layer.lora_A.grad.abs().sum() > 0 for layer in lora.lora_layers(model).values())
    model.eval()
    with torch.no_grad():
        before = model(images())
        lora.merge(model)
        assert (model(images()) - before).abs().max() < 1e-3 * before.abs().max()
        lora.unmerge(model)
        assert torch.equal(model(images()), before)


def test_a_wider_head_stays_below_six_percent(base):
    ledger = parameter_ledger(make(base, head="instance", head_width=96, head_start="fresh", rank=8, lora_conv=True))
    assert 0.05 < ledger["trainable"] / ledger["total"] < 0.06


@torch.no_grad()
def test_float16_is_close_to_float32(base):
    model = make(base, head="instance")
    full = model(images())
    place(model, torch.device("cpu"), "float16")
    assert (model(images()) - full).abs().max() < 0.02 * full.abs().max()


@pytest.mark.parametrize(("step", "plain"), [(8, True), (9, False)])
def test_one_pixel_of_another_grey_makes_an_image_not_plain(step, plain):
    image = np.full((64, 64, 3), 120, np.uint8)
    image[37, 41, 1] += step
    assert is_plain(image) is plain


def test_plain_images_have_no_nuclei_whatever_the_weights(base):
    model = make(base, head="instance")
    rng = np.random.default_rng(0)
    for grey in (0, 50, 128, 200, 255):
        plain = np.full((70, 90, 3), grey) + rng.integers(-3, 4, (70, 90, 3))
        assert not predict(model, plain.clip(0, 255).astype(np.uint8)).any()
    plain = np.full((70, 90, 3), 200, np.uint8)
    plain[20:40, 20:40] = 150
    assert predict(model, plain).any()
