"""Upscalers and their GAN: what the contract tests, which name no family, do not hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, pad
from torch.nn.utils.parametrizations import spectral_norm

from rayscale.artifact import load as load_artifact
from rayscale.contract import ModelCard, digest
from rayscale.errors import ConfigError
from rayscale.export import to_onnx
from rayscale.nn import SpectralNorm, spectrally_normed
from rayscale.perceptual import PerceptualNet
from rayscale.recipes import discover, load, resolved
from rayscale.task import Batch, Optimizer, Task
from rayscale.tasks.compact import Compact
from rayscale.tasks.edsr import Edsr
from rayscale.tasks.rrdb import Rrdb
from rayscale.tasks.span import BranchedConv, Span, merge
from rayscale.tasks.srgan import PatchCritic, Srgan, UnetCritic
from rayscale.tasks.unet import Unet, Up
from rayscale.upscaler import Upscaler

CPU = torch.device("cpu")
SCALES = (1, 2, 3, 4)


def randomised(net: nn.Module) -> nn.Module:
    """Weights as training leaves them: no zeros, every path open. In float64, so that far pixels are seen."""
    generator = torch.Generator().manual_seed(0)
    for parameter in net.parameters():
        spread = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1
        parameter.data = torch.randn(parameter.shape, generator=generator) * spread
    return net.double()


def reach_px(task: Upscaler) -> int:
    """How far the input pixels lie that an output pixel depends on, by its gradient; the furthest of one cell."""
    net = randomised(task.net())
    assert task.halo_px is not None
    cell = task.align
    middle = -(-(task.halo_px + 3) // cell) * cell
    torch.manual_seed(1)
    furthest = 0
    for place in range(cell):
        x = torch.rand(1, 3, 2 * middle + cell, 3 * cell, dtype=torch.float64, requires_grad=True)
        rows = slice((middle + place) * task.scale, (middle + place + 1) * task.scale)
        inputs = (x, x[:, :1].detach().round()) if task.needs_mask else (x,)
        (gradient,) = torch.autograd.grad(net(*inputs)[:, :, rows].square().sum(), x)
        touched = gradient.abs().sum((0, 1, 3)).nonzero().flatten()
        furthest = max(furthest, middle + place - int(touched.min()), int(touched.max()) - middle - place)
    return furthest


@pytest.mark.parametrize(
    "task",
    [
        *(Compact(scale=s, features=4, blocks=2) for s in SCALES),
        *(Span(scale=s, features=4, blocks=b) for s, b in ((1, 1), (2, 3), (3, 1), (4, 2))),
        *(Edsr(scale=s, features=4, blocks=b) for s, b in ((1, 1), (2, 3), (3, 1), (4, 2))),
        *(Rrdb(scale=s, features=4, growth=2, blocks=1) for s in SCALES),
        *(Unet(scale=s, features=4, levels=n, blocks=b) for s, n, b in ((1, 1, 1), (2, 2, 1), (3, 1, 2), (4, 3, 1))),
    ],
    ids=str,
)
def test_the_halo_is_the_exact_receptive_radius(task: Upscaler) -> None:
    """Neither a pixel short, which tiles show, nor one too many, which nothing would show."""
    assert reach_px(task) == task.halo_px


def test_every_scale_has_the_size_it_says() -> None:
    for make in (Span, Edsr, Rrdb, Unet):
        for scale in SCALES:
            task = make(scale=scale, features=4, blocks=1)
            with torch.no_grad():
                found = task.net()(torch.rand(2, 3, 2 * task.align, 3 * task.align))
            assert found.shape == (2, 3, 2 * task.align * scale, 3 * task.align * scale)


def test_a_fresh_net_gives_the_nearest_neighbour_picture() -> None:
    """The first gradients are about detail, and a run of no images is no worse than the simplest upscaling."""
    x = torch.rand(1, 3, 8, 8)
    for make in (Compact, Span, Edsr, Rrdb, Unet):
        shipped = make(scale=2, features=4, blocks=1)
        found = shipped.shipped(shipped.build(CPU))[""](x)
        assert torch.equal(found, x.repeat_interleave(2, 2).repeat_interleave(2, 3)), make


def test_of_a_radius_too_large_a_part_is_taken_and_that_is_told() -> None:
    small, large = Rrdb(blocks=6, features=4, growth=2), Rrdb(blocks=23, features=4, growth=2)
    assert (small.halo_px, small.halo_error) == (94, 0.0)
    assert (large.radius_px, large.halo_px) == (349, 96)
    assert large.specs[""].halo_error == large.halo_error == 0.5 / 255
    exact = replace(large, max_halo_px=349)
    assert (exact.halo_px, exact.halo_error) == (349, 0.0)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Span(scale=5), "task.scale=5: must be 1, 2, 3 or 4"),
        (lambda: Span(gain=0), "task.gain=0: must be at least 1"),
        (lambda: Edsr(blocks=0), "task.blocks=0: must be at least 1"),
        (lambda: Rrdb(growth=0), "task.growth=0"),
        (lambda: Unet(levels=0), "task.levels=0"),
        (lambda: Unet(scale=2, needs_mask=True), "fills at scale 1"),
        (lambda: Compact(ssim_weight=-1.0), "task.ssim_weight=-1.0: must not be negative"),
        (lambda: Srgan(generator=Compact(), adversarial_weight=0.0), "there is no game"),
        (lambda: Srgan(generator=Compact(), style_weight=-1.0), "task.style_weight=-1.0"),
        (lambda: Srgan(generator=Compact(), critic_features=0), "task.critic_features=0"),
        (
            lambda: Srgan(
                generator=Compact(), perceptual_weight=0.0, perceptual=PerceptualNet(net="vgg16", uri="a.onnx")
            ),
            "task.perceptual.net=vgg16: has no effect",
        ),
        (lambda: Edsr(residual_share=0.0), "task.residual_share=0.0"),
    ],
)
def test_a_wrong_setting_is_one_line(make: type, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make()
    assert says in str(caught.value)


# --- SPAN: branches and what they are together ---


def branches(conv: BranchedConv, x: Tensor) -> Tensor:
    """The two branches one layer after the other, padded once and before all of them."""
    padded = pad(x, (1, 1, 1, 1))
    inner = conv2d(conv2d(padded, conv.enter[:, :, None, None]), conv.mix)
    return conv2d(inner, conv.leave[:, :, None, None], conv.bias) + conv2d(x, conv.skip[:, :, None, None])


def test_the_kernel_is_what_its_branches_are_together() -> None:
    torch.manual_seed(0)
    conv, x = BranchedConv(3, 5, 2).double(), torch.randn(2, 3, 9, 7, dtype=torch.float64)
    nn.init.normal_(conv.bias)
    expected = branches(conv, x)
    torch.testing.assert_close(conv(x), expected)  # borders included
    turned = conv2d(x, conv.kernel().mT, conv.bias, padding=1)
    assert not torch.allclose(turned, expected), "negative control"


def test_what_ships_computes_what_was_trained() -> None:
    torch.manual_seed(0)
    net = Span(scale=2, features=6, blocks=2).net()
    nn.init.normal_(net.last.weight, std=0.1)  # type: ignore[arg-type]
    before = {k: v.clone() for k, v in net.state_dict().items()}
    plain = merge(net)
    assert not any(isinstance(m, BranchedConv) for m in plain.modules())
    assert any(isinstance(m, BranchedConv) for m in net.modules())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items()), "the trained net is left as it was"
    x = torch.rand(2, 3, 11, 13)
    with torch.no_grad():
        torch.testing.assert_close(plain(x), net(x), rtol=0, atol=1e-6)
        assert plain(x).std() > 0.01
        assert torch.equal(plain.first.weight, net.first.kernel()), "the very kernel"  # type: ignore[attr-defined, operator]


def test_gradients_reach_every_branch() -> None:
    net = randomised(Span(scale=2, features=4, blocks=1).net())
    net(torch.rand(1, 3, 8, 8, dtype=torch.float64)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())


def test_the_kernel_is_float32_under_autocast() -> None:
    torch.manual_seed(0)
    conv = BranchedConv(3, 4, 2)
    expected = conv.kernel()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(conv.kernel(), expected)
        assert (conv.enter @ conv.enter.mT).dtype == torch.bfloat16, "negative control: autocast was on"


@pytest.mark.parametrize("name", ["x2", "x3", "x4"])
def test_the_quality_net_has_at_most_a_million_parameters(name: str) -> None:
    task = load(f"rayscale.recipes.span:{name}").task
    count = sum(p.numel() for p in task.shipped(task.build(CPU))[""].parameters())
    assert 900_000 < count <= 1_000_000


# --- the encoder-decoder with a mask ---


def test_upscaling_is_a_transposed_convolution() -> None:
    torch.manual_seed(0)
    up, x = Up(6, 4), torch.randn(2, 6, 5, 7)
    conv = up[0]
    transposed = nn.ConvTranspose2d(6, 4, 2, stride=2)
    transposed.weight.data = conv.weight.data.reshape(4, 2, 2, 6).permute(3, 0, 1, 2).contiguous()
    transposed.bias = None
    conv.bias.data.zero_()
    torch.testing.assert_close(up(x), transposed(x))
    assert not torch.allclose(up(x), transposed(x.flip(-1))), "negative control"


def test_with_a_mask_only_missing_pixels_change(tmp_path: Path) -> None:
    torch.manual_seed(0)
    task = Unet(scale=1, features=4, levels=1, needs_mask=True)
    nets = task.build(CPU)
    for parameter in nets["ema"].parameters():
        nn.init.normal_(parameter, std=0.2)
    image, mask = torch.rand(2, 3, 8, 8), (torch.rand(2, 1, 8, 8) > 0.5).float()
    module = task.shipped(nets)[""]
    found = module(image, mask)
    assert torch.equal(found[mask.expand_as(found) == 0], image[mask.expand_as(image) == 0])
    assert (found != image)[mask.expand_as(found) == 1].float().mean() > 0.9
    card = ModelCard(family=task.family, spec=task.specs[""], licence="MIT")
    to_onnx(module, card, tmp_path / "model")
    given = {"image": image.numpy(), "mask": mask.numpy()}
    np.testing.assert_allclose(load_artifact(tmp_path / "model").run(given)["image_out"], found.numpy(), atol=1e-5)


# --- terms beside the pixel loss ---


def batch_of(scale: int, images_seen: int = 0, px: int = 16) -> Batch:
    generator = torch.Generator().manual_seed(3)
    sides = {"lr": px, "hr": px * scale}
    return Batch({k: torch.rand(2, 3, s, s, generator=generator) for k, s in sides.items()}, images_seen)


def test_weights_of_the_other_losses_count() -> None:
    task = Compact(scale=2, features=4, blocks=1, fft_weight=0.5, ssim_weight=0.25)
    nets, batch = task.build(CPU), batch_of(2)
    total, terms = task.loss("g", nets, batch)
    assert set(terms) == {"loss/l1", "loss/fft", "loss/ssim"}
    torch.testing.assert_close(total, terms["loss/l1"] + 0.5 * terms["loss/fft"] + 0.25 * terms["loss/ssim"])
    assert set(replace(task, fft_weight=0.0, ssim_weight=0.0).loss("g", nets, batch).terms) == {"loss/l1"}


# --- SRGAN ---


def srgan(**settings: object) -> Srgan:
    generator = Compact(scale=2, features=4, blocks=1, optimizer=Optimizer(learning_rate=3e-4))
    return Srgan(generator=generator, critic_features=4, **settings)  # type: ignore[arg-type]


def gradients(nets: Mapping[str, nn.Module]) -> set[str]:
    return {name for name, net in nets.items() if any(p.grad is not None for p in net.parameters())}


@pytest.mark.parametrize("adversarial", ["non_saturating", "relativistic", "hinge"])
@pytest.mark.parametrize("critic", ["unet", "patch"])
def test_each_turn_teaches_its_own_net(critic: str, adversarial: str) -> None:
    task = srgan(critic=critic, adversarial=adversarial, style_weight=0.1)
    assert [turn.name for turn in task.turns] == ["d", "g"]
    for turn in task.turns:
        torch.manual_seed(0)
        nets = task.build(CPU)
        for name in ("net", "critic"):
            nets[name].train().requires_grad_(name in turn.nets)
        task.loss(turn.name, nets, batch_of(2)).total.backward()  # type: ignore[no-untyped-call]
        assert gradients(nets) == set(turn.nets)


def test_the_generators_own_settings_hold() -> None:
    task = srgan()
    assert task.turns[1].optimizer == task.generator.turns[0].optimizer
    assert task.turns[1].ema == task.generator.turns[0].ema
    assert task.specs == task.generator.specs
    assert "features" not in replace(task, perceptual_weight=0.0).build(CPU), "no net that no term looks at"


def test_a_pixel_run_is_a_warm_start_as_it_is() -> None:
    task = srgan()
    nets, before = task.build(CPU), task.generator.build(CPU)
    assert set(nets) - set(before) == {"critic", "features"}
    for name, net in before.items():
        nets[name].load_state_dict(net.state_dict())


def test_the_ramp_is_a_warm_start_within_the_run() -> None:
    task = srgan(ramp_images=1000, pixel_weight=2.0)
    torch.manual_seed(0)
    nets = task.build(CPU)
    found = {seen: task.loss("g", nets, batch_of(2, seen)) for seen in (0, 500, 1000, 9000)}
    torch.testing.assert_close(found[0].total, 2 * found[0].terms["loss/l1"])
    added = {seen: losses.total - found[0].total for seen, losses in found.items()}
    torch.testing.assert_close(added[500], added[1000] / 2)
    assert added[1000] == added[9000] > 0
    terms = found[1000].terms
    parts = sum(v for k, v in terms.items() if k.startswith("balance/"))
    torch.testing.assert_close(parts, found[1000].total.detach())


def test_a_critic_that_tells_apart_says_so() -> None:
    """The balance that is logged, at its two ends."""
    task = srgan()
    real, fake = torch.ones(2, 3, 16, 16), torch.zeros(2, 3, 16, 16)

    class Brightness(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean(1, keepdim=True)

    sure, fooled = task._critic(Brightness(), real, fake), task._critic(Brightness(), fake, real)
    assert (sure.terms["balance/told_apart"], fooled.terms["balance/told_apart"]) == (1, 0)
    assert sure.total < fooled.total


def test_a_loss_leaves_no_trace_but_where_the_critic_learns() -> None:
    torch.manual_seed(0)
    task = srgan()
    nets = {name: net.train() for name, net in task.build(CPU).items()}
    before = {k: v.clone() for k, v in nets["critic"].state_dict().items()}

    def moved() -> bool:
        return any(not torch.equal(v, before[k]) for k, v in nets["critic"].state_dict().items())

    with torch.no_grad():
        task.loss("d", nets, batch_of(2))
    nets["critic"].requires_grad_(False)
    task.loss("g", nets, batch_of(2))
    assert not moved()
    nets["critic"].requires_grad_(True)
    task.loss("d", nets, batch_of(2))
    assert moved()


def test_torchs_own_spectral_norm_would_leave_one() -> None:
    """Negative control of the test above, and why there is one of ours."""
    conv = spectral_norm(nn.Conv2d(3, 4, 3)).train().requires_grad_(False)
    before = {k: v.clone() for k, v in conv.state_dict().items()}
    with torch.no_grad():
        conv(torch.rand(1, 3, 8, 8))
    assert any(not torch.equal(v, before[k]) for k, v in conv.state_dict().items())


def test_spectral_norm_is_the_largest_singular_value() -> None:
    torch.manual_seed(0)
    conv = spectrally_normed(nn.Conv2d(3, 8, 3)).train()
    x = torch.rand(1, 3, 8, 8)
    for _ in range(50):
        conv(x)
    assert torch.linalg.matrix_norm(conv.weight.flatten(1), 2).item() == pytest.approx(1.0, abs=1e-3)
    (norm,) = (m for m in conv.modules() if isinstance(m, SpectralNorm))
    with torch.autocast("cpu", torch.bfloat16):
        assert conv.weight.dtype == torch.float32
    total = conv(x).sum() + conv(2 * x).sum()  # twice in one graph: the first call's vectors are still needed
    total.backward()
    assert norm.left.grad is None


def test_critics_judge_places() -> None:
    x = torch.rand(2, 3, 33, 40)  # no multiple of a critic's strides
    assert UnetCritic(4)(x).shape == (2, 1, 33, 40)
    assert PatchCritic(4)(x).shape == (2, 1, 4, 5)
    with pytest.raises(ConfigError, match=r"data\.hr_crop_px=8"):
        srgan()._critic(PatchCritic(4), torch.rand(1, 3, 8, 8), torch.rand(1, 3, 8, 8))


# --- recipes over several families ---


def test_the_generator_is_set_by_its_path() -> None:
    recipe = load("rayscale.recipes.srgan:tiny", ["task.generator.features=7", "task.adversarial=hinge"])
    task: Task = recipe.task
    assert isinstance(task, Srgan)
    assert task.generator == replace(srgan_of("tiny").generator, features=7)  # type: ignore[call-arg]
    assert task.adversarial == "hinge"
    both = ["task.perceptual.net=vgg19", "task.perceptual.uri=s3://bucket/vgg19.onnx"]
    assert load("rayscale.recipes.srgan:x4", both).task.perceptual.net == "vgg19"  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"did you mean 'task\.generator\.features'"):
        load("rayscale.recipes.srgan:tiny", ["task.generator.feature=7"])
    with pytest.raises(ConfigError, match="is a group of settings"):
        load("rayscale.recipes.srgan:tiny", ["task.generator=edsr"])


def srgan_of(name: str) -> Srgan:
    task = load(f"rayscale.recipes.srgan:{name}").task
    assert isinstance(task, Srgan)
    return task


def test_generators_of_two_families_are_two_recipes() -> None:
    """Settings alone would not tell them apart."""
    base = load("rayscale.recipes.srgan:tiny")
    a, b = (
        replace(base, task=replace(srgan_of("tiny"), generator=make(features=8, blocks=1))) for make in (Compact, Twin)
    )
    assert a.task.generator.__dict__ == b.task.generator.__dict__  # type: ignore[attr-defined]
    assert digest(resolved(a)) != digest(resolved(b))
    assert resolved(a)["task.generator_type"] == "rayscale.tasks.compact:Compact"
    assert "task.optimizer_type" not in resolved(base), "what can be of one type only is not named"


class Twin(Compact):
    """Another family with the same settings."""


def test_each_family_has_a_recipe_for_every_scale() -> None:
    known = discover()
    for family in ("span", "edsr", "rrdb", "unet"):
        for scale in (2, 3, 4):
            recipe = known[f"rayscale.recipes.{family}:x{scale}"]()
            assert recipe.data.scale == recipe.task.specs[""].scale == scale
            assert recipe.data.hr_crop_px // scale % recipe.task.specs[""].align == 0
