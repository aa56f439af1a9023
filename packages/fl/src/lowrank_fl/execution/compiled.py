"""A client's step compiled: torch.compile fuses what lies between the large products."""

import logging

import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

from lowrank_core import LowrankError
from lowrank_core.errors import shortened
from lowrank_fl.data.examples import Examples, Parts
from lowrank_fl.steps import loss_of
from lowrank_fl.training import LocalTraining, Trainer


class CompiledTrainer(Trainer):
    """Compiles the passes of a full batch; the last, shorter batch of an epoch is computed as ever.

    Rounding differs from that of sequential training, and so may what a dropout draws. Each process compiles once, and
    torch keeps what it made for the next run.

    Raises:
        LowrankError: on a CPU, where there is no C++ compiler.
    """

    def __init__(
        self, model: nn.Module, examples: Examples, parts: Parts, how: LocalTraining, backend: str = "inductor"
    ) -> None:
        super().__init__(model, examples, parts, how)
        if backend == "inductor" and self.device.type == "cpu":
            _find_compiler()
        # What earlier runs of this process compiled would count against the few variants that torch keeps.
        torch.compiler.reset()
        self._loss_of = torch.compile(loss_of, backend=backend, dynamic=False)

    def backward(self, inputs: Tensor, labels: Tensor, lr: float) -> Tensor:
        """As of any trainer.

        Raises:
            LowrankError: torch cannot compile the step here.
        """
        federation = self.how.federation
        if len(labels) != federation.batch_size:
            return super().backward(inputs, labels, lr)
        try:
            loss = self._loss_of(self.model, inputs, labels, federation.precision)
            loss.backward()
        except BackendCompilerFailed as error:
            raise LowrankError(
                f"torch.compile failed ({shortened(str(error.inner_exception))}); mend that, or set "
                "engine.execution=sequential"
            ) from None
        return loss.detach()


def _find_compiler() -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    # It warns where parts of CUDA are installed beside no GPU.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise LowrankError(
            "engine.execution compiled takes a C++ compiler on a CPU, and none was found (CXX, g++); install one, or "
            "set engine.execution=sequential"
        ) from None
