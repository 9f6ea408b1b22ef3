"""Scenes to pixels: signed distance fields with soft edges, painted in one of the styles."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scenes import (
    BACKGROUNDS,
    COLOURS,
    EYES,
    HAIR_COLOURS,
    HORIZON,
    SIDE,
    SKINS,
    Creature,
    Person,
    Scene,
    Shape,
    Thing,
)

Array = np.ndarray

_Y, _X = np.mgrid[0:SIDE, 0:SIDE].astype(np.float32) + 0.5
SOFT = 1.5
"""Pixels that an edge is wide; hard ones are beyond a small autoencoder."""
DARK = np.array([40, 40, 52], np.float32) / 255
PAPER = np.array([250, 246, 236], np.float32) / 255
STRIPE_PERIOD = 10.0


@dataclass(frozen=True)
class Part:
    """One painted piece of a thing: its signed distance (negative inside, in pixels) and its colour in 0..1."""

    distance: Array
    colour: Array
    detail: bool = False
    """Small and painted flat in every style, like a pupil."""


def draw(scene: Scene) -> Array:
    """The picture of a scene, (64, 64, 3) in 0..1, float32."""
    canvas = _background(scene)
    for thing in scene.things:
        for part in parts_of(thing):
            canvas = _paint(canvas, part, thing, scene.style)
    if scene.style == "pixel":
        blocks = canvas.reshape(SIDE // 4, 4, SIDE // 4, 4, 3).mean((1, 3))
        canvas = blocks.repeat(4, axis=0).repeat(4, axis=1)
    elif scene.style == "blueprint":
        canvas = _two_inks(canvas, (18, 52, 140), (120, 170, 236))
        for thing in scene.things:
            for part in parts_of(thing):
                if not part.detail:
                    canvas = _mix(canvas, np.float32(1.0), _band(part.distance, 1.6))
    elif scene.style == "poster":
        canvas = _two_inks(canvas, (84, 16, 92), (255, 226, 120))
    return np.clip(canvas, 0, 1)


def mask_of(thing: Thing) -> Array:
    """Where the thing is, (64, 64) in 0..1."""
    return _cover(silhouette(thing))


def silhouette(thing: Thing) -> Array:
    """Signed distance to the whole thing."""
    return np.minimum.reduce([part.distance for part in parts_of(thing) if not part.detail])


def parts_of(thing: Thing) -> list[Part]:
    """The pieces of a thing in the order of painting."""
    if isinstance(thing, Shape):
        return _shape_parts(thing)
    return _creature_parts(thing) if isinstance(thing, Creature) else _person_parts(thing)


# Painting


def _background(scene: Scene) -> Array:
    top, low, ground = (np.array(colour, np.float32) / 255 for colour in BACKGROUNDS[scene.background])
    height = np.clip(_Y / HORIZON, 0, 1)[..., None]
    canvas = _mix(top * (1 - height) + low * height, ground, _cover(HORIZON - _Y))
    if scene.style == "sketch":
        return _mix(canvas, PAPER, np.float32(0.6))
    return canvas * np.float32(0.32) if scene.style == "neon" else canvas


def _paint(canvas: Array, part: Part, thing: Thing, style: str) -> Array:
    inside = _cover(part.distance)
    colour = part.colour
    if isinstance(thing, Shape) and thing.texture == "striped":
        wave = np.clip(0.5 + 1.2 * np.sin((_Y - thing.y) * 2 * math.pi / STRIPE_PERIOD), 0, 1)[..., None]
        other = DARK if thing.colour == "white" else np.float32(1.0)
        colour = colour + (other - colour) * np.float32(0.65) * wave
    if style == "neon":
        canvas = _mix(canvas, colour * np.float32(0.3), inside)
        if part.detail:
            return _mix(canvas, colour, inside)
        glow = np.exp(-np.square(np.clip(part.distance - 1, 0, None) / 3.0)) * (part.distance > -1) * 0.5
        return _mix(canvas, colour, np.maximum(glow, _band(part.distance + 1.5, 2.0)).astype(np.float32))
    if style == "sketch":
        canvas = _mix(canvas, colour + (PAPER - colour) * np.float32(0.25), inside)
        return canvas if part.detail else _mix(canvas, DARK, _band(part.distance + 1.0, 1.4))
    if style == "clay" and not part.detail:
        light = 1.05 - 0.34 * ((_X - thing.x) + (_Y - thing.y)) / thing.radius
        light = np.clip(light, 0.5, 1.6)[..., None]
        colour = colour * np.minimum(light, 1) + (1 - colour) * np.maximum(light - 1, 0)
    return _mix(canvas, colour, inside)


def _mix(canvas: Array, colour: Array, amount: Array) -> Array:
    amount = amount[..., None] if amount.ndim == 2 else amount
    return canvas + (colour - canvas) * amount


def _cover(distance: Array) -> Array:
    return np.clip(0.5 - distance / SOFT, 0, 1)


def _band(distance: Array, half_width: float) -> Array:
    return _cover(np.abs(distance) - half_width)


def _two_inks(canvas: Array, dark: tuple[int, int, int], light: tuple[int, int, int]) -> Array:
    value = (canvas @ np.array([0.35, 0.5, 0.15], np.float32))[..., None]
    dark, light = np.array(dark, np.float32) / 255, np.array(light, np.float32) / 255
    return dark + (light - dark) * np.clip(value * 1.3 - 0.15, 0, 1)


# Distances


def _disc(x: float, y: float, rx: float, ry: float | None = None) -> Array:
    """An ellipse; its distance is exact for a circle and near enough for the flat ones used here."""
    ry = ry or rx
    scaled = np.hypot((_X - x) / rx, (_Y - y) / ry)
    return (scaled - 1) * min(rx, ry)


def _box(x: float, y: float, half_width: float, half_height: float, corner: float = 0.0) -> Array:
    dx, dy = np.abs(_X - x) - half_width + corner, np.abs(_Y - y) - half_height + corner
    return np.hypot(np.maximum(dx, 0), np.maximum(dy, 0)) + np.minimum(np.maximum(dx, dy), 0) - corner


def _polygon(points: list[tuple[float, float]]) -> Array:
    """Signed distance to a closed polygon."""
    squared = np.full_like(_X, np.inf)
    sign = np.ones_like(_X)
    for (ax, ay), (bx, by) in zip(points, points[1:] + points[:1]):
        ex, ey, wx, wy = bx - ax, by - ay, _X - ax, _Y - ay
        along = np.clip((wx * ex + wy * ey) / (ex * ex + ey * ey), 0, 1)
        squared = np.minimum(squared, np.square(wx - ex * along) + np.square(wy - ey * along))
        crossing = (ay > _Y) != (by > _Y)
        left = wx < ex * wy / (ey or 1e-9)
        sign = np.where(crossing & left, -sign, sign)
    return sign * np.sqrt(squared)


# Things


def _colour(name: str) -> Array:
    return np.array(COLOURS[name], np.float32) / 255


def _shape_parts(shape: Shape) -> list[Part]:
    x, y, r = shape.x, shape.y, shape.radius
    match shape.shape:
        case "circle":
            distance = _disc(x, y, 0.94 * r)
        case "square":
            distance = _box(x, y, 0.84 * r, 0.84 * r)
        case "triangle":
            distance = _polygon([(x, y - 0.95 * r), (x + r, y + 0.8 * r), (x - r, y + 0.8 * r)])
        case "cross":
            arm = 0.33 * r
            distance = np.minimum(_box(x, y, 0.95 * r, arm), _box(x, y, arm, 0.95 * r))
        case "ring":
            distance = np.abs(_disc(x, y, 0.7 * r)) - 0.27 * r
        case "star":
            corners = range(10)
            radii = [r if corner % 2 == 0 else 0.46 * r for corner in corners]
            angles = [math.pi * (corner / 5 - 0.5) for corner in corners]
            distance = _polygon([(x + q * math.cos(a), y + q * math.sin(a)) for q, a in zip(radii, angles)])
        case _:
            raise ValueError(f"no shape {shape.shape!r}")
    return [Part(distance, _colour(shape.colour))]


def _creature_parts(creature: Creature) -> list[Part]:
    r, x = creature.radius, creature.x
    y = creature.y + 0.2 * r
    wide, high = {"round": (0.74, 0.74), "tall": (0.56, 0.8), "wide": (0.92, 0.62)}[creature.body]
    wide, high = wide * r, high * r
    main, second = _colour(creature.colour), _colour(creature.second)
    right = second if creature.odd is None else _colour(creature.odd)
    parts = []
    if creature.tail != "none":
        side = -1 if creature.tail == "left" else 1
        parts.append(Part(_disc(x + side * (wide + 0.04 * r), y + 0.3 * high, 0.3 * r), second))
    if creature.feet:
        for side in (-1, 1):
            parts.append(Part(_box(x + side * 0.5 * wide, y + high, 0.2 * r, 0.16 * r, 0.08 * r), second))
    top = y - 0.72 * high
    if creature.top == "ears":
        for side, colour in ((-1, second), (1, right)):
            parts.append(Part(_disc(x + side * 0.62 * wide, top, 0.32 * r), colour))
    elif creature.top == "horns":
        for side, colour in ((-1, second), (1, right)):
            foot, tip = x + side * 0.45 * wide, x + side * 0.8 * wide
            points = [(foot - 0.26 * r, top + 0.1 * r), (foot + 0.26 * r, top + 0.1 * r), (tip, top - 0.58 * r)]
            parts.append(Part(_polygon(points), colour))
    elif creature.top == "antenna":
        parts.append(Part(_box(x, y - high - 0.12 * r, 0.09 * r, 0.24 * r), main))
        parts.append(Part(_disc(x, y - high - 0.3 * r, 0.24 * r), right))
    parts.append(Part(_disc(x, y, wide, high), main))
    if creature.belly:
        parts.append(Part(_disc(x, y + 0.5 * high, 0.5 * wide, 0.36 * high), second))
    eye = 0.25 * r
    for side in (0,) if creature.eyes == 1 else (-1, 1):
        parts.append(Part(_disc(x + side * 0.42 * wide, y - 0.28 * high, eye), np.float32([1, 1, 1]), detail=True))
        parts.append(Part(_disc(x + side * 0.42 * wide, y - 0.28 * high, 0.5 * eye), DARK, detail=True))
    return parts


def _person_parts(person: Person) -> list[Part]:
    who, r, x, y = person.identity, person.radius, person.x, person.y
    width, height = who.head * 0.78 * r, 0.88 * r
    skin = np.array(SKINS[who.skin], np.float32) / 255
    hair = np.array(HAIR_COLOURS[who.hair_colour], np.float32) / 255
    look = person.turn * 0.16 * r
    parts = []
    if who.hair == "long":
        parts.append(Part(_box(x, y + 0.1 * r, width + 0.2 * r, 0.95 * r, 0.6 * r), hair))
    elif who.hair == "spiky":
        for spike in (-1, -0.35, 0.35, 1):
            foot = x + spike * 0.62 * width
            points = [
                (foot - 0.3 * r, y - 0.45 * r),
                (foot + 0.3 * r, y - 0.45 * r),
                (foot + spike * 0.22 * r, y - 1.25 * r),
            ]
            parts.append(Part(_polygon(points), hair))
    parts.append(Part(_disc(x, y, width, height), skin))
    if who.beard:
        parts.append(Part(np.maximum(_disc(x, y, width, height), y + 0.38 * r - _Y), hair))
    if who.hair in ("short", "long"):
        fringe = y - (0.34 if who.hair == "short" else 0.42) * r
        parts.append(Part(np.maximum(_disc(x, y - 0.05 * r, width + 0.08 * r, height + 0.05 * r), _Y - fringe), hair))
    iris = np.array(EYES[who.eyes], np.float32) / 255
    for side in (-1, 1):
        ex, ey = x + side * who.eye_distance * r + look, y - 0.04 * r
        parts.append(Part(_disc(ex, ey, 0.19 * r), np.float32([1, 1, 1]), detail=True))
        parts.append(Part(_disc(ex + 0.04 * look, ey, 0.13 * r), iris, detail=True))
        if who.glasses:
            parts.append(Part(np.abs(_disc(ex, ey, 0.27 * r)) - 0.06 * r, DARK, detail=True))
    parts.append(Part(_box(x + look, y + 0.52 * r, 0.2 * r, 0.07 * r), np.float32([0.7, 0.2, 0.2]), detail=True))
    return parts
