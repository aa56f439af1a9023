"""A client's step as a CUDA graph: hundreds of small kernels, which the CPU launches as one."""

# pyright: reportPrivateImportUsage=false

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lowrank_core import LowrankError
from lowrank_fl.data.examples import Examples, Parts
from lowrank_fl.training import LocalTraining, Trainer

Capture = Callable[[Callable[[], None]], Callable[[], None]]
"""From work on fixed memory to what does it again."""

_WARM_UPS = 3
_MOST_KEPT = 4


class GraphTrainer(Trainer):
    """Replays the forward and backward pass of a full batch; the last, shorter batch of an epoch is computed as ever.

    What is captured depends on which parameters are trained and, with the Jacobian correction, on the learning rate;
    another step is captured where they change. The update itself is not captured, because rates change by round.

    Raises:
        LowrankError: the device is no CUDA device and `capture` is not given.
    """

    def __init__(
        self,
        model: nn.Module,
        examples: Examples,
        parts: Parts,
        how: LocalTraining,
        capture: Capture | None = None,
    ) -> None:
        if capture is None and torch.device(how.device).type != "cuda":
            raise LowrankError(
                f"engine.execution graphs captures CUDA graphs, and device is {how.device}; set device=cuda, or "
                "engine.execution=sequential"
            )
        super().__init__(model, examples, parts, how)
        self._capture = capture or capture_cuda
        self._steps: dict[object, CapturedStep] = {}

    def backward(self, inputs: Tensor, labels: Tensor, lr: float) -> Tensor:
        if len(labels) != self.how.federation.batch_size:
            return super().backward(inputs, labels, lr)
        trained = tuple(p.requires_grad for p in self.model.parameters())
        key = (trained, lr if self.how.jacobian_lambda else None)
        if key not in self._steps:
            if len(self._steps) == _MOST_KEPT:  # each keeps its activations
                self._steps.clear()
            passes = super().backward
            self._steps[key] = CapturedStep(
                self.model, inputs, labels, lambda x, y: passes(x, y, lr), self._capture, self.device
            )
        return self._steps[key](inputs, labels)


class CapturedStep:
    """The passes of one batch of fixed size, over inputs, labels, loss and gradients that stay where they are."""

    def __init__(
        self,
        model: nn.Module,
        inputs: Tensor,
        labels: Tensor,
        passes: Callable[[Tensor, Tensor], Tensor],
        capture: Capture,
        device: torch.device,
    ) -> None:
        self._inputs, self._labels = inputs.clone(), labels.clone()
        self._loss = torch.zeros((), device=device)
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._gradients = [torch.zeros_like(p) for p in self._parameters]
        self._passes = passes
        buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
        # Capturing runs the passes, which move a norm's statistics and draw for a dropout.
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            self._replay = capture(self._work)
        for buffer, before in buffers:
            buffer.copy_(before)

    def _work(self) -> None:
        torch._foreach_zero_(self._gradients)
        self._give()
        self._loss.copy_(self._passes(self._inputs, self._labels))

    def _give(self) -> None:
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient

    def __call__(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Leave the batch's gradients in the parameters; the loss, which the next call overwrites."""
        self._inputs.copy_(inputs)
        self._labels.copy_(labels)
        self._replay()
        self._give()
        return self._loss


def capture_cuda(work: Callable[[], None]) -> Callable[[], None]:
    """Run `work` a few times, as libraries choose their kernels then, and record it."""
    stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UPS):
            work()
    current.wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay
