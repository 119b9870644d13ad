"""Degradations as they were published: functions that return a tuple of operators."""

from __future__ import annotations

import math

from rayscale.data.operators import (
    Bicubic,
    Burst,
    Decimate,
    Defocus,
    GaussianBlur,
    GaussianNoise,
    Jpeg,
    Mask,
    MaskKind,
    MotionBlur,
    OneOf,
    Operator,
    PoissonNoise,
    RandomResize,
    Range,
    Resize,
    Shrink,
    Shuffled,
    Sinc,
    Sometimes,
)

Degradation = tuple[Operator, ...]


def bicubic(scale: int) -> Degradation:
    """MATLAB's bicubic, the degradation of the classic test sets."""
    return (Bicubic(scale=scale),)


def first_order(scale: int) -> Degradation:
    """Blur, shrink, noise and JPEG once each: the classical model (section 3.1 of Real-ESRGAN), with its ranges."""
    return (
        _blur((0.2, 3.0)),
        Resize(scale=scale),
        _noise((1.0, 30.0), (0.05, 3.0)),
        Jpeg(quality=(30, 95)),
    )


def real_esrgan(scale: int) -> Degradation:
    """The second-order chain of Real-ESRGAN (Wang et al., ICCVW 2021, arXiv:2107.10833), published probabilities.

    Not taken over: sharpening the ground truth first. libjpeg stands for its differentiable JPEG, OpenCV's area
    filter for torch's adaptive pooling, and pictures are rounded to uint8 between two steps.
    """
    last = (Resize(scale=scale), Sometimes(probability=0.8, operators=(Sinc(),)))
    compressed = Jpeg(quality=(30, 95))
    return (
        _blur((0.2, 3.0)),
        RandomResize(probabilities=(0.2, 0.7, 0.1), factor=(0.15, 1.5)),
        _noise((1.0, 30.0), (0.05, 3.0)),
        Jpeg(quality=(30, 95)),
        Sometimes(probability=0.8, operators=(_blur((0.2, 1.5)),)),
        RandomResize(probabilities=(0.3, 0.4, 0.3), factor=(0.3, 1.2), scale=scale),
        _noise((1.0, 25.0), (0.05, 2.5)),
        OneOf(options=((*last, compressed), (compressed, *last))),
    )


def bsrgan(scale: int) -> Degradation:
    """The shuffled chain of BSRGAN (Zhang et al., ICCV 2021, arXiv:2103.14006), as its code has it.

    Not taken over: noise of a simulated camera sensor (a quarter of its samples).
    """
    if scale != 4:
        return (_bsrgan_shuffle(scale, scale), Jpeg(quality=(30, 95)))
    halve = OneOf(options=((Resize(scale=2),), (Bicubic(scale=2, border="mirror"),)))
    options: tuple[Degradation, ...] = ((_bsrgan_shuffle(4, 4),), (halve, _bsrgan_shuffle(2, 4)))
    return (OneOf(options=options, weights=(0.75, 0.25)), Jpeg(quality=(30, 95)))


def _bsrgan_shuffle(scale: int, total: int) -> Shuffled:
    """`scale` of what the shuffled part is given, `total` of the photo."""
    sizes = tuple(range(7, 26, 2))
    anisotropic = GaussianBlur(sigma=(0.0, math.sqrt(4.0 + scale)), sizes=sizes, isotropic=False, uniform_in="variance")
    isotropic = GaussianBlur(sigma=(0.0, 2.0 + 0.2 * scale), sizes=sizes)
    blur = OneOf(options=((anisotropic,), (isotropic,)))
    shrink = OneOf(
        options=((Shrink(ratio=(1.0, 2.0 * scale)),), (Decimate(scale=scale, sigma=(0.1, 0.6 * scale)),)),
        weights=(0.75, 0.25),
    )
    return Shuffled(
        operators=(
            blur,
            blur,
            shrink,
            Resize(scale=total),
            GaussianNoise(sigma=(2.0, 25.0), gray=0.4, correlated=0.2),
            Sometimes(probability=0.9, operators=(Jpeg(quality=(30, 95)),)),
        ),
        ordered=(2, 3),
    )


def denoise(sigma: float | Range = (0.0, 55.0)) -> Degradation:
    """White Gaussian noise of one level or, blindly, of a range (DnCNN: Zhang et al., TIP 2017, arXiv:1608.03981)."""
    low, high = sigma if isinstance(sigma, tuple) else (sigma, sigma)
    return (GaussianNoise(sigma=(low, high)),)


def deblock(quality: tuple[int, int] = (10, 80)) -> Degradation:
    """JPEG (ARCNN: Dong et al., ICCV 2015, arXiv:1504.06993; blindly, FBCNN: Jiang et al., ICCV 2021)."""
    return (Jpeg(quality=quality),)


def deblur() -> Degradation:
    """One of motion, defocus and Gaussian blur, and a little noise. The ranges are our own: motion as far as the
    hand-held kernels that Levin et al. (CVPR 2009) recorded.
    """
    options: tuple[Degradation, ...] = (
        (MotionBlur(length=(3.0, 25.0)),),
        (Defocus(radius=(1.0, 5.0)),),
        (GaussianBlur(sigma=(0.5, 4.0), sizes=(25,)),),
    )
    return (OneOf(options=options, weights=(0.5, 0.25, 0.25)), GaussianNoise(sigma=(0.0, 5.0)))


def inpaint(
    ratio: Range = (0.1, 0.4),
    kinds: tuple[MaskKind, ...] = ("box", "strokes", "irregular"),
    picture_px: int = 0,
) -> Degradation:
    """Boxes and free-form strokes (DeepFill v2: Yu et al., ICCV 2019, arXiv:1806.03589), and irregular holes
    (Liu et al., ECCV 2018, arXiv:1804.07723). `picture_px`: as of `Mask`.
    """
    return (Mask(kinds=kinds, ratio=ratio, picture_px=picture_px),)


def burst(scale: int, frames: int = 8) -> Degradation:
    """Hand-held frames: shifts of up to 24 px of high resolution and 1 degree (DBSR: Bhat et al., CVPR 2021,
    arXiv:2101.10997), one lens and sensor grid, noise and compression of each frame's own.
    """
    return (
        Burst(
            frames=frames,
            shift_px=24.0,
            degrees=1.0,
            shared=(GaussianBlur(sigma=(0.2, 1.5)), Resize(scale=scale, methods=("area", "bilinear"))),
            each=(GaussianNoise(sigma=(1.0, 10.0), gray=0.0), Jpeg(quality=(70, 98))),
        ),
    )


_KERNELS = (0.45, 0.25, 0.12, 0.03, 0.12, 0.03)  # Gaussian, generalised, plateau: isotropic and not
_SINC = 0.1


def _blur(sigma: Range) -> OneOf:
    """Real-ESRGAN's choice of kernels, 7..21 px."""
    gaussians: tuple[Degradation, ...] = (
        (GaussianBlur(sigma=sigma),),
        (GaussianBlur(sigma=sigma, isotropic=False),),
        (GaussianBlur(sigma=sigma, shape="generalised", beta=(0.5, 4.0)),),
        (GaussianBlur(sigma=sigma, shape="generalised", beta=(0.5, 4.0), isotropic=False),),
        (GaussianBlur(sigma=sigma, shape="plateau", beta=(1.0, 2.0)),),
        (GaussianBlur(sigma=sigma, shape="plateau", beta=(1.0, 2.0), isotropic=False),),
    )
    sincs: tuple[Degradation, ...] = (  # 3 of the 8 sizes are small ones, of a higher least cutoff
        (Sinc(sizes=(7, 9, 11), cutoff=(math.pi / 3, math.pi)),),
        (Sinc(sizes=(13, 15, 17, 19, 21), cutoff=(math.pi / 5, math.pi)),),
    )
    weights = (*((1 - _SINC) * p for p in _KERNELS), _SINC * 3 / 8, _SINC * 5 / 8)
    return OneOf(options=(*gaussians, *sincs), weights=tuple(round(w, 6) for w in weights))


def _noise(sigma: Range, scale: Range) -> OneOf:
    return OneOf(options=((GaussianNoise(sigma=sigma, gray=0.4),), (PoissonNoise(scale=scale, gray=0.4),)))
