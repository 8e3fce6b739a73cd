"""TensorRT engines on an NVIDIA GPU; torch holds their inputs and outputs. Needs no transformers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clip_deploy.core.artifact import EMBEDS, Target
from clip_deploy.core.errors import DeployError
from clip_deploy.core.records import Facts
from clip_deploy.runtimes import pytorch
from clip_deploy.runtimes.tensorrt_library import is_rtx, load_tensorrt, log_of, validity


class Encoder(pytorch.Encoder):
    """TensorRT's engines, which run on the GPU and the version of TensorRT that they were built with."""

    graphs = True

    def load(self, folder: Path, target: Target, towers: Sequence[str]) -> dict[str, pytorch.Tower]:
        library = load_tensorrt()
        refuse_elsewhere(folder.name, target.build, validity(library))
        inputs = {"vision": target.model.image_inputs, "text": self.text_inputs}
        return {tower: Engine(library, folder, tower, inputs[tower]) for tower in towers}


def refuse_elsewhere(name: str, built: Facts, here: dict[str, str]) -> None:
    """Raise DeployError where an engine was built for another GPU, driver or version of TensorRT than are here."""
    if any(built[key] != value for key, value in here.items()):
        raise DeployError(
            f"built for {built['built_for']} with {built['library']}, this machine has {here['built_for']} with "
            f"{here['library']}; run `dvc repro build_engine@{name}`"
        )


class Engine:
    """One tower: called with its inputs on the GPU, it gives float32 [batch, dimension] there, on torch's stream."""

    def __init__(self, library: Any, folder: Path, tower: str, inputs: list[str]) -> None:
        self.target, self.inputs, self.output = folder.name, inputs, EMBEDS[tower]
        self.log = log_of(library)
        self.runtime = library.Runtime(self.log)
        self.engine = self.runtime.deserialize_cuda_engine((folder / f"{tower}.engine").read_bytes())
        if self.engine is None:
            raise DeployError(f"TensorRT refuses {tower}.engine: {self.log.first_error()}")
        self.options = {"runtime_config": self._compile_at_once(library)} if is_rtx(library) else {}
        self.contexts: dict[tuple[Any, ...], Any] = {}  # of each shape: a CUDA graph holds its context's memory

    def __call__(self, *tensors: Tensor) -> Tensor:
        context = self._context(tensors)
        output = torch.empty(tuple(context.get_tensor_shape(self.output)), device="cuda")
        for name, tensor in zip([*self.inputs, self.output], [*tensors, output], strict=True):
            context.set_tensor_address(name, tensor.data_ptr())
        if not context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
            raise DeployError(f"TensorRT does not run the engine: {self.log.first_error()}")
        return output

    def _context(self, tensors: tuple[Tensor, ...]) -> Any:
        shapes = tuple(tuple(tensor.shape) for tensor in tensors)
        if shapes not in self.contexts:
            self._refuse_batch(shapes[0][0])
            context = self.engine.create_execution_context(**self.options)
            if context is None:
                raise DeployError(f"TensorRT makes no context: {self.log.first_error()}")
            for name, shape in zip(self.inputs, shapes, strict=True):
                if not context.set_input_shape(name, shape):
                    raise DeployError(f"{name} of shape {list(shape)}: {self.log.first_error()}")
            if len(self.contexts) == pytorch.MAX_GRAPHS:
                self.contexts.pop(next(iter(self.contexts)))
            self.contexts[shapes] = context
        return self.contexts[shapes]

    def _refuse_batch(self, batch: int) -> None:
        least, _, most = (shape[0] for shape in self.engine.get_tensor_profile_shape(self.inputs[0], 0))
        if not least <= batch <= most:
            limit = "max_batch" if batch > most else "min_batch"
            raise DeployError(
                f"a batch of {batch} lies outside the engine's profile of {least} to {most}: "
                f"set build_engine.{self.target}.{limit}"
            )

    def _compile_at_once(self, library: Any) -> Any:
        """Compile a shape's own kernels before its first run ends; later ones would never enter a captured graph.

        Contexts share them through a cache. It stays in memory: in the target's folder it would be a change to DVC.
        """
        config = self.engine.create_runtime_config()
        config.dynamic_shapes_kernel_specialization_strategy = library.DynamicShapesKernelSpecializationStrategy.EAGER
        self.cache = config.create_runtime_cache()
        config.set_runtime_cache(self.cache)
        return config
