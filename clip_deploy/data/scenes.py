"""Images of coloured shapes with captions, rendered by this project: training, calibration and evaluation data.

A scene has one subject (the largest shape), often a smaller companion, clutter behind, sometimes a bar in front,
uneven light and sensor noise. Its class is the subject's colour and shape; its caption says the rest.
"""

import hashlib
from dataclasses import dataclass
from itertools import product

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SIZE = 64  # pixels, width and height of a rendered image
OVERSAMPLING = 3  # drawn larger, then averaged down: smooth edges

# Neighbours in this list are meant to be confused: each pixel value is jittered by up to COLOUR_JITTER.
COLOURS = {
    "red": (214, 40, 40),
    "orange": (240, 130, 30),
    "yellow": (240, 210, 50),
    "green": (50, 160, 70),
    "cyan": (60, 190, 200),
    "blue": (50, 90, 210),
    "purple": (130, 60, 180),
    "pink": (235, 120, 180),
}
COLOUR_JITTER = 34
SHAPES = ("circle", "square", "triangle", "star", "cross", "hexagon")
SIZES = {"small": (9.0, 12.0), "large": (15.0, 19.0)}  # radius of the subject in pixels
COMPANION_RADIUS = (5.0, 7.5)
RELATIONS = {"left of": (1, 0), "right of": (-1, 0), "above": (0, 1), "below": (0, -1)}  # where the companion stands

CLASSES = tuple(f"{colour} {shape}" for colour, shape in product(COLOURS, SHAPES))
TEMPLATES = ("a photo of a {}", "an image of a {}", "a picture of a {}", "a {}")


@dataclass(frozen=True)
class Scene:
    """What is to be seen: the caption's words and nothing about the noise around them."""

    colour: str
    shape: str
    size: str
    relation: str | None = None
    companion: str | None = None  # "blue square"

    @property
    def label(self) -> str:
        return f"{self.colour} {self.shape}"

    @property
    def caption(self) -> str:
        tail = f" {self.relation} a {self.companion}" if self.companion else ""
        return f"a photo of a {self.size} {self.label}{tail}"


def render(split: str, index: int, label: int) -> tuple[Image.Image, Scene]:
    """Render image `index` of a split; the same arguments give the same pixels.

    Args:
        split: name of the random stream ("training", "calibration", "evaluation", ...).
        index: which image of that stream.
        label: which of CLASSES the subject is.

    Returns:
        An RGB image of SIZE x SIZE and the scene that it shows.
    """
    rng = np.random.default_rng([int.from_bytes(hashlib.sha256(split.encode()).digest()[:8]), index])
    scene = _scene(rng, CLASSES[label])
    side = SIZE * OVERSAMPLING
    canvas = _background(rng, side)
    draw = ImageDraw.Draw(canvas)
    _clutter(rng, draw, side)
    radius = rng.uniform(*SIZES[scene.size]) * OVERSAMPLING
    centre = side / 2 + rng.uniform(-0.09, 0.09, 2) * side
    if scene.relation and scene.companion:
        centre = _draw_companion(rng, draw, scene.relation, scene.companion, centre, radius)
    _draw_shape(rng, draw, scene.shape, scene.colour, centre, radius)
    if rng.random() < 0.5:
        _occlude(rng, draw, centre, radius)
    return _photograph(rng, canvas), scene


def _scene(rng: np.random.Generator, label: str) -> Scene:
    colour, shape = label.split()
    size = str(rng.choice(list(SIZES)))
    if rng.random() < 0.4:
        return Scene(colour, shape, size)
    companion = str(rng.choice([name for name in CLASSES if name != label]))
    return Scene(colour, shape, size, str(rng.choice(list(RELATIONS))), companion)


def _background(rng: np.random.Generator, side: int) -> Image.Image:
    low, high = np.sort(rng.uniform(40, 225, 2))
    tint = rng.uniform(-30, 30, 3)
    ramp = np.linspace(low, high, side)
    grid = ramp[:, None] if rng.random() < 0.5 else ramp[None, :]
    pixels = np.broadcast_to(grid[..., None] + tint, (side, side, 3))
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _clutter(rng: np.random.Generator, draw: ImageDraw.ImageDraw, side: int) -> None:
    for _ in range(rng.integers(4, 12)):
        start, end = rng.uniform(0, side, 2), rng.uniform(0, side, 2)
        fill = tuple(int(value) for value in rng.uniform(30, 225, 3))
        if rng.random() < 0.5:
            draw.line([tuple(start), tuple(end)], fill=fill, width=int(rng.integers(1, 3 * OVERSAMPLING)))
        else:
            reach = rng.uniform(1, 3) * OVERSAMPLING
            draw.ellipse([*(start - reach), *(start + reach)], fill=fill)


def _draw_companion(
    rng: np.random.Generator,
    draw: ImageDraw.ImageDraw,
    relation: str,
    companion: str,
    centre: np.ndarray,
    radius: float,
) -> np.ndarray:
    """Draw the companion beside the subject and return the subject's centre, moved to keep both in the picture."""
    direction = np.array(RELATIONS[relation])
    small = rng.uniform(*COMPANION_RADIUS) * OVERSAMPLING
    gap = radius + small + rng.uniform(-2, 3) * OVERSAMPLING
    moved = centre - direction * gap * 0.35
    aside = rng.uniform(-0.4, 0.4) * radius * direction[::-1]
    colour, shape = companion.split()
    _draw_shape(rng, draw, shape, colour, moved + direction * gap + aside, small)
    return moved


def _draw_shape(
    rng: np.random.Generator,
    draw: ImageDraw.ImageDraw,
    shape: str,
    colour: str,
    centre: np.ndarray,
    radius: float,
) -> None:
    jitter = rng.uniform(-COLOUR_JITTER, COLOUR_JITTER, 3)
    fill = tuple(int(value) for value in np.clip(np.array(COLOURS[colour]) + jitter, 0, 255))
    if shape == "circle":
        draw.ellipse([*(centre - radius), *(centre + radius)], fill=fill)
        return
    angle = rng.uniform(-0.3, 0.3)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    outline = _outline(shape) @ turn.T * radius + centre
    draw.polygon([tuple(point) for point in outline], fill=fill)


def _outline(shape: str) -> np.ndarray:
    """Corners of a shape in the unit circle, [corners, 2]."""
    if shape == "cross":
        arm, width = 1.0, 0.34
        corners = [(width, arm), (width, width), (arm, width), (arm, -width), (width, -width), (width, -arm)]
        half = np.array(corners)
        return np.concatenate([half, -half])
    count = {"square": 4, "triangle": 3, "hexagon": 6, "star": 10}[shape]
    angles = np.arange(count) * 2 * np.pi / count - (np.pi / 4 if shape == "square" else np.pi / 2)
    reach = np.where(np.arange(count) % 2, 0.48, 1.0) if shape == "star" else np.ones(count)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1) * reach[:, None]


def _occlude(rng: np.random.Generator, draw: ImageDraw.ImageDraw, centre: np.ndarray, radius: float) -> None:
    """Lay a bar across part of the subject."""
    offset = rng.uniform(-0.8, 0.8, 2) * radius
    along = rng.normal(size=2)
    along /= np.linalg.norm(along)
    middle = centre + offset
    fill = tuple(int(value) for value in rng.uniform(30, 225, 3))
    ends = [tuple(middle - along * 2.2 * radius), tuple(middle + along * 2.2 * radius)]
    draw.line(ends, fill=fill, width=int(rng.uniform(0.2, 0.5) * radius) + 1)


def _photograph(rng: np.random.Generator, canvas: Image.Image) -> Image.Image:
    """Scale down, blur, light unevenly and add sensor noise."""
    image = canvas.resize((SIZE, SIZE), Image.Resampling.BOX)
    image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0, 0.9)))
    pixels = np.asarray(image, dtype=np.float32)
    light = rng.uniform(0.75, 1.15) + np.linspace(-1, 1, SIZE)[None, :, None] * rng.uniform(-0.15, 0.15)
    noise = rng.normal(0, rng.uniform(2, 14), pixels.shape)
    return Image.fromarray(np.clip(pixels * light + noise, 0, 255).astype(np.uint8))
