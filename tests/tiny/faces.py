"""Drawn faces, and small ONNX networks that find them where insightface expects its own.

A face is a magenta square with five dots: red and green eyes, a blue nose, yellow and cyan corners of the mouth. The
detector has SCRFD's nine outputs; it measures how far the square reaches and where the dots lie, so boxes and landmarks
follow the drawing, turned faces included. A square without all its dots is no face.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

SIDE = 160
"""Pictures are seen by the fixed-size detector at this many pixels."""
REACH = 48
"""How far from its centre the detector looks, in its pixels: faces may be up to twice as large."""
DOTS = {  # colour -> place in a square of size 1 around 0
    (255, 0, 0): (-0.2, -0.15),
    (0, 255, 0): (0.2, -0.15),
    (0, 0, 255): (0.0, 0.06),
    (255, 255, 0): (-0.16, 0.27),
    (0, 255, 255): (0.16, 0.27),
}
SKIN = (255, 0, 255)


@dataclass(frozen=True)
class Drawn:
    """A face to draw: centre and side in pixels, turn in degrees."""

    x: float
    y: float
    side: float
    turn: float = 0.0
    dots: int = 5

    @property
    def landmarks(self) -> np.ndarray:
        """(5, 2)"""
        cosine, sine = math.cos(math.radians(self.turn)), math.sin(math.radians(self.turn))
        places = np.array(list(DOTS.values())) @ np.array([[cosine, sine], [-sine, cosine]])
        return places * self.side + (self.x, self.y)

    @property
    def box(self) -> tuple[float, float, float, float]:
        half = self.side / 2
        return self.x - half, self.y - half, self.x + half, self.y + half


def draw(width: int, height: int, *faces: Drawn) -> np.ndarray:
    """A black picture with faces, (height, width, 3) in 0..255."""
    picture = np.zeros((height, width, 3), np.uint8)
    y, x = np.mgrid[:height, :width]
    for face in faces:
        cosine, sine = math.cos(math.radians(face.turn)), math.sin(math.radians(face.turn))
        along = (x - face.x) * cosine + (y - face.y) * sine
        across = (y - face.y) * cosine - (x - face.x) * sine
        picture[(abs(along) <= face.side / 2) & (abs(across) <= face.side / 2)] = SKIN
        for colour, (dot_x, dot_y) in zip(list(DOTS)[: face.dots], face.landmarks):
            picture[np.hypot(x - dot_x, y - dot_y) <= 0.07 * face.side] = colour
    return picture


def write_face_models(folder: Path, *, fixed_size: bool = True, detector: bool = True, recogniser: bool = True) -> Path:
    """The two networks under the names that they have in insightface's pack buffalo_l."""
    folder.mkdir(parents=True, exist_ok=True)
    if detector:
        write_detector(folder / "det_10g.onnx", fixed_size=fixed_size)
    if recogniser:
        write_recogniser(folder / "w600k_r50.onnx")
    return folder


def write_recogniser(path: Path, width: int = 512) -> None:
    """A random projection of the picture averaged over 8 x 8 pixels."""
    import onnx
    from onnx import helper, numpy_helper

    weight = np.random.default_rng(0).standard_normal((3 * 14 * 14, width)).astype(np.float32)
    nodes = [
        helper.make_node("AveragePool", ["input"], ["small"], kernel_shape=[8, 8], strides=[8, 8]),
        helper.make_node("Flatten", ["small"], ["row"]),
        helper.make_node("MatMul", ["row", "weight"], ["output"]),
    ]
    _save(
        path,
        nodes,
        [helper.make_tensor_value_info("input", onnx.TensorProto.FLOAT, ["N", 3, 112, 112])],
        [helper.make_tensor_value_info("output", onnx.TensorProto.FLOAT, ["N", width])],
        [numpy_helper.from_array(weight, "weight")],
    )


def write_detector(path: Path, *, fixed_size: bool = True, landmarks: bool = True) -> None:
    """What finds drawn faces; without a fixed size it sees them at insightface's two sizes, 128 and 640."""
    import onnx
    from onnx import helper

    graph = _Graph()
    signs = [[1, -1, 1], *([1 if level else -1 for level in colour] for colour in DOTS)]
    masks = graph.conv("input", np.array(signs)[:, :, None, None], bias=np.full(len(signs), -2.0))
    masks = graph.add("Clip", masks, graph.constant(0.0), graph.constant(1.0))  # (1, skin and dots, height, width)
    seen = graph.conv(masks, np.ones((1, len(signs), 1, 1)))

    length = 2 * REACH + 1
    ramp = np.arange(length) - REACH
    half = (ramp <= 0).astype(float)
    left, right = (graph.conv(seen, line[None, None, None], stride=(8, 8)) for line in (half, half[::-1]))
    top, bottom = (graph.conv(seen, line[None, None, :, None], stride=(8, 8)) for line in (half, half[::-1]))
    box = graph.add("Mul", graph.add("Concat", left, top, right, bottom, axis=1), graph.constant(1 / 8))

    count = len(DOTS)
    dots = graph.conv(masks, np.eye(count, count + 1, 1)[:, :, None, None])
    ones = np.ones((count, 1, 1, length))
    ramps = np.broadcast_to(ramp[None, None, None], ones.shape)
    columns = graph.conv(dots, ones.swapaxes(2, 3), stride=(8, 1), group=count)
    rows = graph.conv(dots, ones, stride=(1, 8), group=count)
    amount = graph.conv(columns, ones, stride=(1, 8), group=count)
    sums = graph.add(
        "Concat",
        graph.conv(columns, ramps, stride=(1, 8), group=count),
        graph.conv(rows, ramps.swapaxes(2, 3), stride=(8, 1), group=count),
        axis=1,
    )
    some = graph.add("Add", amount, graph.constant(1e-4))
    offsets = graph.add("Div", sums, graph.add("Concat", some, some, axis=1))
    interleave = np.zeros((2 * count, 2 * count))
    for point in range(count):
        interleave[2 * point, point] = interleave[2 * point + 1, count + point] = 1 / 8
    points = graph.conv(offsets, interleave[:, :, None, None])

    middle = graph.conv(offsets, np.kron(np.eye(2), np.full((1, count), 1 / count))[:, :, None, None])
    beside = graph.add("ReduceSum", graph.add("Abs", middle), graph.constant([1]), keepdims=1)
    pairs = (left, right), (top, bottom), (beside, graph.constant(0.0))
    off_centre = graph.add("Sum", *(graph.add("Abs", graph.add("Sub", *pair)) for pair in pairs))
    score = graph.add("Sub", graph.constant(1.0), graph.add("Mul", off_centre, graph.constant(1 / 60)))
    score = graph.add("Relu", score)
    fewest = graph.add("ReduceMin", amount, axes=[1], keepdims=1)
    room = graph.add("Sub", graph.constant(REACH - 4.0), graph.add("Max", left, right, top, bottom))  # 0: too large
    here = graph.conv(seen, np.ones((1, 1, 1, 1)), stride=(8, 8))
    for needed in (fewest, room, here):
        score = graph.add("Mul", score, graph.add("Clip", needed, graph.constant(0.0), graph.constant(1.0)))

    for name, channels, value in (("score", 1, score), ("box", 4, box), ("points", 10, points)):
        if name == "points" and not landmarks:
            break
        second = graph.add("Mul", value, graph.constant(0.0)) if name == "score" else value
        graph.output(f"{name}_8", graph.add("Concat", value, second, axis=1), channels)  # two anchors
        for stride in (16, 32):
            nothing = graph.conv(seen, np.zeros((2 * channels, 1, 1, 1)), stride=(stride, stride))
            graph.output(f"{name}_{stride}", nothing, channels)

    sides = [SIDE, SIDE] if fixed_size else ["?", "?"]
    inputs = [helper.make_tensor_value_info("input", onnx.TensorProto.FLOAT, [1, 3, *sides])]
    _save(path, graph.nodes, inputs, graph.outputs, graph.weights)


class _Graph:
    def __init__(self):
        self.nodes, self.weights, self.outputs = [], [], []

    def constant(self, value) -> str:
        from onnx import numpy_helper

        self.weights.append(numpy_helper.from_array(_single(value), f"w{len(self.weights)}"))
        return self.weights[-1].name

    def add(self, kind: str, *inputs: str, **attributes) -> str:
        from onnx import helper

        name = f"n{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], **attributes))
        return name

    def conv(self, value: str, weight: np.ndarray, *, bias=None, stride=(1, 1), group: int = 1) -> str:
        rows, columns = weight.shape[2] // 2, weight.shape[3] // 2
        more = () if bias is None else (self.constant(bias.astype(np.float32)),)
        weight = self.constant(np.ascontiguousarray(weight, np.float32))
        pads = [rows, columns, rows, columns]
        return self.add("Conv", value, weight, *more, strides=list(stride), pads=pads, group=group)

    def output(self, name: str, value: str, channels: int) -> None:
        """(1, 2 * channels, height, width) -> one row of channels per anchor."""
        import onnx
        from onnx import helper

        last = self.add("Transpose", value, perm=[0, 2, 3, 1])
        rows = self.add("Reshape", last, self.constant([-1, channels]))
        self.nodes.append(helper.make_node("Identity", [rows], [name]))
        self.outputs.append(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["?", channels]))


def _save(path: Path, nodes, inputs, outputs, weights) -> None:
    import onnx
    from onnx import helper

    graph = helper.make_graph(nodes, path.stem, inputs, outputs, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    onnx.save(model, path)


def _single(value) -> np.ndarray:
    """Numbers in the precision of the graph: float32, or int64 for shapes."""
    array = np.asarray(value)
    return array.astype(np.float32) if array.dtype.kind == "f" else array
