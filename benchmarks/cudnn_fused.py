"""Whether cuDNN's fused engines take this project's layers, and whether they beat the passes they would replace.

    .venv/bin/pip install -r benchmarks/requirements-cudnn-fused.txt
    python benchmarks/cudnn_fused.py --dtypes bf16 --out benchmarks/results/cudnn_fused_gpu.json
    python benchmarks/cudnn_fused.py --out benchmarks/results/cudnn_fused_gpu.json     # the rest; again goes on
    python benchmarks/cudnn_fused.py --without-gpu --channels $(seq 40 40 480)     # only asks, about an H100

A layer reads C maps x, normalises (s x + t), rectifies, and makes K maps by a 3x3 convolution. cuDNN is asked for

    fprop   genstats     scale, bias, ReLU, convolution, statistics: cuDNN's specialised engine
            sums         the same for its general engines: statistics as two reductions
            plain        without statistics
    dgrad   carry+sums   gradient of the input, ReLU's gradient, times s, plus a carry; the sums of g and g (x - mean)
            sums         without the carry
            plain        without the carry and the sums
    wgrad   relu         scale, bias, ReLU, gradient of the weight: cuDNN's specialised engine

with slices: x, the carry and what is made are ranges of wider buffers' channels, as in a fused block; or packed: each
tensor dense. `plain` is of use only where the rest is refused. cuDNN's own operation for the sums of dgrad
(DgradDreluBNBwdWeight, cuDNN 9.8) is missing from the Python package; it takes float16 alone.

Where cuDNN agrees, its plans are built (--plans of them) and the fastest is timed beside the unfused sequence, on the
same tensors: bn_relu, PyTorch's convolution (benchmark mode), write or gather, by Triton. Calls follow each other, the
queue is filled while the GPU waits, rounds alternate, medians count. The error is the largest difference of any output
from PyTorch's in float32, divided by that output's largest value. Outputs are NaN before, or zeros where NaN is left
in them ("zeroed"). Where ReLU's side is in doubt, |s x + t| < 1e-4, dgrad's difference does not count.

Exit code 3: no GPU, or no nvidia-cudnn-frontend. With --without-gpu cuDNN answers for the properties in HOPPER; but
engines that compile at run time ask for a driver, and whether they would take a case stays "open".
"""

import argparse
import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from convolutions import DTYPES, Results, Timer, random_norm
from torch import Tensor
from torch.nn import functional as F
from torch.nn.grad import conv2d_input, conv2d_weight

from densenet_dist.environment import describe_environment
from densenet_dist.model.kernels import choose_kernels
from densenet_dist.model.kernels.interface import Consumer, NormGrad

REQUIREMENTS = "benchmarks/requirements-cudnn-fused.txt"
FORMS = {"fprop": ("genstats", "sums", "plain"), "dgrad": ("carry+sums", "sums", "plain"), "wgrad": ("relu",)}
OUTPUTS = {"fprop": ("out", "total", "squares"), "dgrad": ("out", "total", "centred"), "wgrad": ("d_weight",)}
SPECIALISED = ("genstats", "relu")
"""Forms in which everything but the sums has the maps' type: s and t, and what lies between the operations."""
WINDOW: dict[str, Any] = {"padding": [1, 1], "stride": [1, 1], "dilation": [1, 1]}
BUFFER = 520
"""Channels of a block's buffer: 13 times 40."""
HOPPER = (
    '{"deviceName": "NVIDIA H100 80GB HBM3", "multiProcessorCount": 132, "warpSize": 32, "maxSharedMemoryPerBlock": '
    '49152, "maxSharedMemoryPerBlockOptin": 232448, "reservedSharedMemoryPerBlock": 1024, "maxRegistersPerSM": 65536, '
    '"regsPerBlock": 65536, "maxCtasPerSM": 32, "maxThreadsPerBlock": 1024, "maxThreadsPerSM": 2048, "deviceVer": 900, '
    '"driverVer": 13000, "smClockRateKHz": 1980000, "memClockRateKHz": 2619000, "l2CacheSize": 52428800, '
    '"totalGlobalMem": 85000000000, "maxGridSize": [2147483647, 65535, 65535], "maxBlockSize": [1024, 1024, 64], '
    '"isTccDriver": 0, "supportCoopLaunch": 1, "pciDeviceId": 0, "cudaDeviceId": 0}'
)
"""As cuDNN 9.19 serialises a GPU's properties."""


class Case(NamedTuple):
    op: str
    form: str
    dtype: str
    layout: str
    side: int
    batch: int
    read: int
    made: int

    def __str__(self) -> str:
        where = f"{self.side}x{self.side} batch {self.batch} C {self.read:3} K {self.made}"
        return f"{self.op} {self.form:10} {self.dtype} {self.layout:6} {where}"


class Layer:
    """A case's tensors, by name; on the meta device for their shapes alone."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case, self.device = case, device
        read, made, dtype = case.read, case.made, DTYPES[case.dtype]
        self.norm = random_norm(read, device)
        scale = self.norm.scale()
        vectors = {"scale": scale, "shift": self.norm.beta - self.norm.mean * scale, "mean": self.norm.mean}
        of = dtype if case.form in SPECIALISED else torch.float32
        self.tensors = {name: vector.to(of).view(1, -1, 1, 1) for name, vector in vectors.items()}
        weight = torch.randn(made, read, 3, 3, device=device, dtype=dtype) / (3 * read**0.5)
        self.tensors["weight"] = weight.contiguous(memory_format=torch.channels_last)
        buffer = self._wide(max(BUFFER, -(-(read + made) // 8) * 8))
        self.tensors["x"] = buffer[:, :read] if case.layout == "slices" else self._wide(read)
        if case.op == "fprop":
            slot = buffer[:, read : read + made] if case.layout == "slices" else self._wide(made)
            self.tensors |= {"out": slot, "total": self._sums(made), "squares": self._sums(made)}
            return
        self.tensors["d_made"] = self._wide(made)
        if case.op == "wgrad":
            self.tensors["d_weight"] = torch.empty_like(self.tensors["weight"])
            return
        wide = [self._wide(BUFFER if case.layout == "slices" else read)[:, :read] for _ in range(2)]
        self.tensors |= dict(zip(("carry", "out"), wide, strict=True))
        self.tensors |= {"total": self._sums(read), "centred": self._sums(read)}

    def _wide(self, channels: int) -> Tensor:
        shape = (self.case.batch, self.case.side, self.case.side, channels)
        return torch.randn(shape, device=self.device, dtype=DTYPES[self.case.dtype]).permute(0, 3, 1, 2)

    def _sums(self, channels: int) -> Tensor:
        return torch.zeros(1, channels, 1, 1, device=self.device)


class Drawing:
    """A cuDNN graph of a layer's tensors, as it is drawn."""

    def __init__(self, cudnn: Any, layer: Layer, where: dict[str, Any]) -> None:
        types = {"bf16": cudnn.data_type.BFLOAT16, "fp16": cudnn.data_type.HALF}
        self.io, self.add_up, self.layer = types[layer.case.dtype], cudnn.reduction_mode.ADD, layer
        between = self.io if layer.case.form in SPECIALISED else cudnn.data_type.FLOAT
        self.graph = cudnn.pygraph(
            io_data_type=self.io, intermediate_data_type=between, compute_data_type=cudnn.data_type.FLOAT, **where
        )
        self.named: dict[str, Any] = {}

    def input(self, name: str) -> Any:
        if name not in self.named:
            shape, strides, dtype = self._described(name)
            self.named[name] = self.graph.tensor(name=name, dim=shape, stride=strides, data_type=dtype)
        return self.named[name]

    def output(self, name: str, node: Any) -> None:
        shape, strides, dtype = self._described(name)
        self.named[name] = node.set_output(True).set_dim(shape).set_stride(strides).set_data_type(dtype)

    def sum(self, name: str, node: Any) -> None:
        self.output(name, self.graph.reduction(node, mode=self.add_up))

    def affine(self) -> Any:
        """S x + t."""
        return self.graph.bias(self.graph.scale(self.input("x"), self.input("scale")), self.input("shift"))

    def rectified(self) -> Any:
        return self.graph.relu(self.affine()).set_data_type(self.io)

    def _described(self, name: str) -> tuple[list[int], list[int], torch.dtype]:
        tensor = self.layer.tensors[name]
        channels = tensor.shape[1]
        vector = tensor.shape[2:] == (1, 1)  # whose strides of 1 cuDNN would not take for NHWC
        strides = [channels, 1, channels, channels] if vector else list(tensor.stride())
        return list(tensor.shape), strides, tensor.dtype


def draw_fprop(drawing: Drawing, form: str) -> None:
    graph = drawing.graph
    made = graph.conv_fprop(image=drawing.rectified(), weight=drawing.input("weight"), **WINDOW)
    if form == "genstats":
        drawing.output("out", made)
        for name, node in zip(("total", "squares"), graph.genstats(made), strict=True):
            drawing.output(name, node)
    elif form == "sums":
        drawing.output("out", graph.identity(made))
        drawing.sum("total", made)
        drawing.sum("squares", graph.mul(made, made))
    else:
        drawing.output("out", made)


def draw_dgrad(drawing: Drawing, form: str) -> None:
    graph = drawing.graph
    back = graph.conv_dgrad(loss=drawing.input("d_made"), filter=drawing.input("weight"), **WINDOW)
    back.set_dim(list(drawing.layer.tensors["x"].shape))
    g = graph.relu_backward(loss=back, input=drawing.affine())
    total = graph.scale(g, drawing.input("scale"))
    if form == "carry+sums":
        total = graph.add(total, drawing.input("carry"))
    drawing.output("out", total)
    if form != "plain":
        drawing.sum("total", g)
        drawing.sum("centred", graph.mul(g, graph.sub(drawing.input("x"), drawing.input("mean"))))


def draw_wgrad(drawing: Drawing, form: str) -> None:
    image, loss = drawing.rectified(), drawing.input("d_made")
    drawing.output("d_weight", drawing.graph.conv_wgrad(image=image, loss=loss, **WINDOW))


DRAW = {"fprop": draw_fprop, "dgrad": draw_dgrad, "wgrad": draw_wgrad}


class Refused(Exception):
    """CuDNN's reasons, one of each engine that it asked."""

    def __init__(self, error: Exception) -> None:
        text = str(error)
        found = re.findall(r'"engineId":(-?\d+).*?(?:Warning|Error|Info): (\w+); Reason: ([^\n]*)', text, re.DOTALL)
        self.reasons = [
            f"engine {engine}: {status.removeprefix('CUDNN_STATUS_')}: {reason}" for engine, status, reason in found
        ] or [text.strip().splitlines()[0]]
        # Nothing is learnt from engines for other GPUs, if there are more.
        ours = [reason for reason in self.reasons if "ARCH_MISMATCH" not in reason]
        self.reasons = ours or self.reasons
        self.open = any("PREREQUISITE_MISSING" in reason for reason in self.reasons)
        super().__init__("; ".join(self.reasons))


def ask(cudnn: Any, layer: Layer, where: dict[str, Any]) -> Drawing:
    """Draw a case and have cuDNN say whether it has engines for it.

    Raises:
        Refused: it has none.
    """
    drawing = Drawing(cudnn, layer, where)
    try:
        DRAW[layer.case.op](drawing, layer.case.form)
        drawing.graph.validate()
        drawing.graph.build_operation_graph()
        drawing.graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
        drawing.graph.check_support()
    except (cudnn.cudnnGraphNotSupportedError, RuntimeError, ValueError) as error:
        raise Refused(error) from error
    return drawing


class Plan(NamedTuple):
    name: str
    workspace: int
    run: Callable[[], object]


def build(cudnn: Any, drawing: Drawing, handle: Any, most: int) -> list[Plan]:
    """The plans that can be built and run.

    Raises:
        Refused: none can.
    """
    graph, tensors = drawing.graph, drawing.layer.tensors
    pack = {node.get_uid(): tensors[name].data_ptr() for name, node in drawing.named.items()}
    plans: list[Plan] = []
    failure: Exception = RuntimeError("there is no plan")
    for index in range(min(most, graph.get_execution_plan_count())):
        try:
            graph.build_plan_at_index(index)
            size = graph.get_workspace_size_plan_at_index(index)
            workspace = torch.empty(max(size, 1), dtype=torch.uint8, device=drawing.layer.device)
            run = partial(graph.execute_plan_at_index, pack, workspace, index, handle=handle)
            run()
            torch.cuda.synchronize()
            plans.append(Plan(graph.get_plan_name_at_index(index), size, run))
        except (cudnn.cudnnGraphNotSupportedError, RuntimeError) as error:
            if "CUDA error" in str(error):
                raise  # nothing works after it
            failure = error
    if not plans:
        raise Refused(failure)
    return plans


def unfused(layer: Layer) -> Callable[[], object]:
    """What the project does now: passes, and PyTorch's convolution between them."""
    case, t = layer.case, layer.tensors
    kernels, norm = choose_kernels(layer.device, t["x"].dtype), layer.norm
    rectified = torch.empty_like(t["x"], memory_format=torch.channels_last)
    shape = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)
    sums = torch.empty(2, t["out"].shape[1] if "out" in t else 1, device=layer.device)

    def fprop() -> None:
        kernels.bn_relu(t["x"], norm, rectified)
        made = torch.ops.aten.convolution(rectified, t["weight"], None, *shape)
        kernels.store_output(made, None, 1.0, t["out"], *((None, None) if case.form == "plain" else sums))

    def dgrad() -> None:
        back = torch.ops.aten.convolution_backward
        came = back(t["d_made"], rectified, t["weight"], None, *shape, [True, False, False])[0]
        carry = t["carry"] if "carry" in case.form else None
        kernels.sum_gradients(t["x"], [Consumer(came, NormGrad(norm, sums, None))], carry, t["out"])

    def wgrad() -> Tensor:
        kernels.bn_relu(t["x"], norm, rectified)
        back = torch.ops.aten.convolution_backward
        made: Tensor = back(t["d_made"], rectified, t["weight"], None, *shape, [False, True, False])[1]
        return made

    return {"fprop": fprop, "dgrad": dgrad, "wgrad": wgrad}[case.op]


def reference(layer: Layer) -> tuple[dict[str, Tensor], Tensor | None]:
    """What the outputs should be, in float32, and where `out` may be compared."""
    case, t = layer.case, {name: tensor.float() for name, tensor in layer.tensors.items()}
    y = t["x"] * t["scale"] + t["shift"]
    if case.op == "dgrad":
        g = conv2d_input(y.shape, t["weight"], t["d_made"], padding=1).where(y > 0, 0)
        out = t["scale"] * g + (t["carry"] if "carry" in case.form else 0)
        sums = {"total": g.sum((0, 2, 3), True), "centred": (g * (t["x"] - t["mean"])).sum((0, 2, 3), True)}
        return {"out": out} | ({} if case.form == "plain" else sums), y.abs() >= 1e-4
    rectified = y.relu_().to(layer.tensors["x"].dtype).float()
    if case.op == "wgrad":
        return {"d_weight": conv2d_weight(rectified, t["weight"].shape, t["d_made"], padding=1)}, None
    made = F.conv2d(rectified, t["weight"], padding=1)
    sums = {"total": made.sum((0, 2, 3), True), "squares": made.square().sum((0, 2, 3), True)}
    return {"out": made} | ({} if case.form == "plain" else sums), None


def errors(layer: Layer, run: Callable[[], object]) -> dict[str, Any]:
    """How far outputs are from the reference at most, by its largest value."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=False):
        wanted, sure = reference(layer)
    found: dict[str, float] = {}
    for fill in (float("nan"), 0.0):
        for name in wanted:
            layer.tensors[name].fill_(fill)
        run()
        for name, want in wanted.items():
            off = (layer.tensors[name].float() - want).abs()
            off = off.where(sure, 0) if name == "out" and sure is not None else off
            found[name] = float(off.max() / want.abs().max())
        if all(error == error for error in found.values()):
            break
    worst = float(torch.tensor(list(found.values())).max())  # NaN if any is
    return {"errors": found, "error": worst, "zeroed": fill == 0}


def measure(cudnn: Any, layer: Layer, handle: Any, timer: Timer, most: int) -> dict[str, Any]:
    """Ask, and time what is supported.

    Raises:
        Refused: it isn't.
    """
    plans = build(cudnn, ask(cudnn, layer, {"handle": handle}), handle, most)
    best = min(plans, key=lambda plan: timer.once(plan.run))
    other = unfused(layer)
    other()
    torch.cuda.synchronize()
    taken = {name: 1e3 * seconds for name, seconds in timer.medians({"fused": best.run, "unfused": other}).items()}
    return {
        "ms": taken["fused"],
        "unfused_ms": taken["unfused"],
        **errors(layer, best.run),
        "plan": best.name,
        "plans": len(plans),
        "workspace": best.workspace,
    }


def show(case: Case, row: dict[str, Any]) -> None:
    if "ms" in row:
        gain, zeroed = row["unfused_ms"] / row["ms"], " zeroed" if row["zeroed"] else ""
        print(
            f"{case}: {row['ms']:.4f} ms, unfused {row['unfused_ms']:.4f} ms ({gain:.2f}x), error {row['error']:.1e}"
            f"{zeroed}, {row['plan']}, best of {row['plans']}, workspace {row['workspace'] / 2**20:.1f} MiB",
            flush=True,
        )
    else:
        print(f"{case}: {row['answer']} {'; '.join(row['reasons'])}".rstrip(), flush=True)


def show_summary(rows: list[dict[str, Any]]) -> None:
    """For each kind of graph: how often it was taken, and what it was worth."""
    kinds = defaultdict(list)
    for row in rows:
        kinds[f"{row['op']} {row['form']:10} {row['dtype']} {row['layout']:6}"].append(row)
    print()
    for kind, members in kinds.items():
        counts = {answer: sum(row["answer"] == answer for row in members) for answer in ("taken", "refused", "open")}
        text = ", ".join(f"{answer} {count}" for answer, count in counts.items() if count)
        gains = [row["unfused_ms"] / row["ms"] for row in members if "ms" in row]
        if gains:
            text += f"; unfused / fused {min(gains):.2f} to {max(gains):.2f}, median {statistics.median(gains):.2f}"
            text += f"; error {max(row['error'] for row in members if 'ms' in row):.1e}"
        print(f"{kind}: {text}")


def cases(args: argparse.Namespace) -> Iterator[Case]:
    """All C with the first K, and the C in the middle with the other ones; what the project would use comes first."""
    channels = args.channels
    shapes = [(read, args.made[0]) for read in channels]
    shapes += [(channels[len(channels) // 2], made) for made in args.made[1:]]
    for dtype in args.dtypes:
        for layout in args.layouts:
            for op in args.ops:
                for form in FORMS[op]:
                    for read, made in shapes:
                        yield Case(op, form, dtype, layout, args.side, args.batch, read, made)


def probe(cudnn: Any, args: argparse.Namespace, device_name: str) -> None:
    on_gpu = not args.without_gpu
    handle = cudnn.create_handle() if on_gpu else None
    properties = cudnn.create_device_properties(0 if on_gpu else HOPPER)
    if on_gpu:
        cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream().cuda_stream)
    about = {"backend": cudnn.backend_version_string(), "device": device_name}
    versions = {"frontend": cudnn.__version__, "properties": properties.serialize()}
    results = Results(args.out, args.minutes, **about, **versions, **describe_environment())
    device = torch.device("cuda" if on_gpu else "meta")
    timer, left_out = Timer(device, args.calls, args.rounds), 0
    for case in cases(args):
        if results.has({**case._asdict(), **about}):
            continue
        if not results.left():
            left_out += 1
            continue
        layer, row = Layer(case, device), dict[str, Any](answer="taken")
        try:
            if on_gpu:
                row |= measure(cudnn, layer, handle, timer, args.plans)
            else:
                ask(cudnn, layer, {"device_property": properties})
        except Refused as refused:
            row = {"answer": "open" if refused.open else "refused", "reasons": refused.reasons}
        results.add({**case._asdict(), **about, "reasons": [], **row})
        show(case, results.rows[-1])
    show_summary([row for row in results.rows if all(row[name] == value for name, value in about.items())])
    if left_out:
        print(f"{left_out} cases are left: the same command with --out goes on with them")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--without-gpu", action="store_true", help="only ask whether an H100 would take the cases")
    parser.add_argument("--ops", nargs="+", default=list(FORMS), choices=FORMS)
    parser.add_argument("--dtypes", nargs="+", default=("bf16", "fp16"), choices=("bf16", "fp16"))
    parser.add_argument("--layouts", nargs="+", default=("slices", "packed"), choices=("slices", "packed"))
    parser.add_argument("--channels", type=int, nargs="+", default=(40, 120, 240, 360, 480), help="C")
    parser.add_argument("--made", type=int, nargs="+", default=(40, 35, 48, 64), help="K")
    parser.add_argument("--side", type=int, default=32)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--plans", type=int, default=4, help="how many of each case's plans are built, at most")
    parser.add_argument("--calls", type=int, default=10, help="one after another, to be timed together")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=9.0, help="no case begins after them")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if find_spec("cudnn") is None:
        parser.exit(3, f"cudnn_fused.py: nvidia-cudnn-frontend is not installed: pip install -r {REQUIREMENTS}\n")
    if not (args.without_gpu or torch.cuda.is_available()):
        parser.exit(3, "cudnn_fused.py: PyTorch sees no CUDA GPU here; --without-gpu asks cuDNN about an H100\n")
    import cudnn

    torch.backends.cudnn.benchmark = True
    torch.manual_seed(0)
    probe(cudnn, args, "H100, not there" if args.without_gpu else torch.cuda.get_device_name())


if __name__ == "__main__":
    main()
