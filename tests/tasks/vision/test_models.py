from __future__ import annotations

import pytest
import torch
from torch import nn
from torchvision.models import resnet18

from fedsim.core.device import resolve_device
from fedsim.core.errors import ConfigError
from fedsim.core.evaluation import evaluate
from fedsim.tasks.vision.models import LiveTapConv2d, build_model, needs_two_samples
from fedsim.tasks.vision.resnet import ResNet18
from tests.vision import vision

NAMES = ["resnet18", "resnet18-cifar", "cnn"]
MODELS = [(name, norm) for name in NAMES for norm in ("batch", "group")]


def build(name, norm="batch", classes=100, seed=42):
    return build_model(name, classes=classes, norm=norm, seed=seed)


def parameters_of(model):
    return sum(p.numel() for p in model.parameters())


def output_of(module, model):
    seen = []
    module.register_forward_hook(lambda _, inputs, output: seen.append(tuple(output.shape)))
    with torch.no_grad():
        model(torch.zeros(2, 3, 32, 32))
    return seen[0]


@pytest.mark.parametrize(
    ("name", "norm", "numbers", "tensors", "entries"),
    [
        ("resnet18", "batch", 11_227_812, 62, 122),
        ("resnet18", "group", 11_227_812, 62, 62),
        # The stem is 3x3 instead of 7x7: 64 * 3 * 40 fewer.
        ("resnet18-cifar", "batch", 11_220_132, 62, 122),
        # 432 + 4608 + 9216 of the convolutions, 160 of the norms, 51300 of the classifier.
        ("cnn", "batch", 65_716, 11, 20),
        ("cnn", "group", 65_716, 11, 11),
    ],
)
def test_models_have_these_sizes_at_100_classes(name, norm, numbers, tensors, entries):
    model = build(name, norm)
    assert parameters_of(model) == numbers
    assert len(list(model.parameters())) == tensors
    assert len(model.state_dict()) == entries


def test_resnet18_of_seed_42_is_torchvisions_with_a_new_head_drawn_after_it():
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed: it seeds the generators of GPUs too, and those stay seeded.
        torch.default_generator.manual_seed(42)
        by_hand = resnet18(weights=None)
        by_hand.fc = nn.Linear(512, 100)
    found, expected = build("resnet18").state_dict(), by_hand.state_dict()
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, lambda channels: nn.GroupNorm(32, channels)])
def test_our_resnet18_is_torchvisions_to_the_last_bit(norm):
    draw = torch.Generator().manual_seed(1)
    images = torch.randn(4, 3, 64, 64, generator=draw)
    seen = []
    for make in (ResNet18, lambda classes, n: resnet18(num_classes=classes, norm_layer=n)):
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(7)
            model = make(10, norm)
        output = model(images)
        output.square().sum().backward()
        gradients = {f"gradient of {n}": p.grad for n, p in model.named_parameters()}
        seen.append({"output": output, **gradients, **model.state_dict()})
    assert list(seen[0]) == list(seen[1])
    for name, tensor in seen[0].items():
        assert torch.equal(tensor, seen[1][name]), name


@pytest.mark.parametrize("name", NAMES)
def test_weights_follow_from_the_seed_alone(name):
    first, again, other = (build(name, seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[n], again[n]) for n in first)
    drawn = [n for n in first if first[n].dim() in (2, 4)]
    assert not any(torch.equal(first[n], other[n]) for n in drawn)


@pytest.mark.parametrize("name", NAMES)
def test_group_norm_has_no_buffers(name):
    model = build(name, "group")
    assert list(model.buffers()) == []
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())


def test_group_norm_has_32_groups_or_as_many_as_channels():
    groups = [m.num_groups for m in build("cnn", "group").modules() if isinstance(m, nn.GroupNorm)]
    assert groups == [16, 32, 32]
    model = build("resnet18", "group")
    groups = {m.num_groups for m in model.modules() if isinstance(m, nn.GroupNorm)}
    assert groups == {32}


def test_resnet18_ends_in_1x1_maps_and_its_cifar_form_in_4x4():
    model = build("resnet18")
    assert output_of(model.layer4, model) == (2, 512, 1, 1)
    model = build("resnet18-cifar")
    assert output_of(model.conv1, model) == (2, 64, 32, 32)
    model = build("resnet18-cifar")
    assert output_of(model.layer4, model) == (2, 512, 4, 4)


@pytest.mark.parametrize(("name", "norm"), MODELS)
def test_the_last_two_parameters_are_the_classifiers(name, norm):
    model = build(name, norm, classes=7)
    (weight_name, weight), (bias_name, bias) = list(model.named_parameters())[-2:]
    prefix = "13" if name == "cnn" else "fc"
    assert [weight_name, bias_name] == [f"{prefix}.weight", f"{prefix}.bias"]
    assert tuple(weight.shape) == (7, 512)
    assert tuple(bias.shape) == (7,)


@pytest.mark.parametrize(("name", "norm"), MODELS)
def test_a_new_model_is_in_training_mode_float32_on_the_cpu(name, norm):
    model = build(name, norm, classes=7)
    assert model.training
    assert {(p.dtype, p.device.type) for p in model.parameters()} == {(torch.float32, "cpu")}
    assert all(p.requires_grad for p in model.parameters())
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 7)


@pytest.mark.parametrize(("name", "norm"), MODELS)
def test_needs_two_samples_exactly_where_one_cannot_be_trained_on(name, norm):
    assert needs_two_samples(name, norm) == ((name, norm) == ("resnet18", "batch"))
    model = build(name, norm, classes=7)
    one = torch.zeros(1, 3, 32, 32)
    if needs_two_samples(name, norm):
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            model(one)
    else:
        assert model(one).shape == (1, 7)


@pytest.mark.parametrize(("available", "expected"), [(True, "cuda"), (False, "cpu")])
def test_auto_is_cuda_where_there_is_one(available, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    assert resolve_device("auto") == torch.device(expected)
    assert resolve_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize(("name", "module"), [("cuda", torch.cuda), ("mps", torch.backends.mps)])
def test_a_device_that_is_not_there_is_refused(name, module, monkeypatch):
    monkeypatch.setattr(module, "is_available", lambda: True)
    assert resolve_device(name) == torch.device(name)
    monkeypatch.setattr(module, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=f"^device = '{name}' cannot be used; expected 'auto'"):
        resolve_device(name)


@pytest.mark.slow
def test_untrained_resnet18_scores_what_the_notebook_printed(cifar100):
    result = evaluate(
        vision(cifar100.spec),
        build("resnet18"),
        cifar100.test(),
        device=torch.device("cpu"),
    )
    assert round(result.loss, 4) == 4.6169
    assert result.accuracy == 0.0095
    assert result.num_samples == 10_000


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "padding"),
    [
        (1, 3, 1, 1),
        (2, 3, 2, 1),
        (1, 1, 1, 0),
        (2, 1, 2, 0),
        (2, 3, 1, 1),
        (4, 3, 2, 1),
        (1, 3, 2, 1),
        (3, 3, 1, 0),
        (2, 5, 3, 2),
        (3, 3, 3, 1),
    ],
)
def test_a_live_tap_convolution_equals_the_general_one(size, kernel, stride, padding):
    random_numbers = torch.Generator().manual_seed(0)
    plain = nn.Conv2d(5, 7, kernel, stride, padding, bias=False).double()
    live = LiveTapConv2d(5, 7, kernel, stride, padding, bias=False).double()
    live.load_state_dict(plain.state_dict())
    inputs = torch.randn(4, 5, size, size, generator=random_numbers, dtype=torch.float64)
    one, other = inputs.clone().requires_grad_(), inputs.clone().requires_grad_()
    expected, found = plain(one), live(other)
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    expected.square().sum().backward()
    found.square().sum().backward()
    torch.testing.assert_close(other.grad, one.grad, atol=1e-12, rtol=0)
    torch.testing.assert_close(live.weight.grad, plain.weight.grad, atol=1e-12, rtol=0)
    assert torch.equal(live.weight.grad == 0, plain.weight.grad == 0)


def test_resnet18_equals_torchvisions_up_to_rounding_with_the_same_zeros():
    # In float64: the means of eight numbers at the last layers make much of what is rounded.
    ours = build_model("resnet18", classes=100, norm="batch", seed=42).double()
    theirs = resnet18(weights=None, num_classes=100).double()
    theirs.load_state_dict(ours.state_dict())
    random_numbers = torch.Generator().manual_seed(0)
    inputs = torch.randn(8, 3, 32, 32, generator=random_numbers, dtype=torch.float64)
    targets = torch.arange(8)
    for model in (ours, theirs):
        nn.functional.cross_entropy(model(inputs), targets).backward()
    zeros = entries = 0
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, atol=1e-10, rtol=1e-8, msg=name)
        zeros += int((mine.grad == 0).sum())
        entries += mine.numel()
    # Eight of nine taps of three kernels and five of nine of a fourth meet padding only.
    assert 0.61 < zeros / entries < 0.63
