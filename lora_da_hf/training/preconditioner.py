"""An option of its own: the statistics go on shaping the steps of A while it is trained.

    initialize_lora_da(model, samples, config=LoRADAConfig(save_statistics=True), output_dir=folder)
    optimizer = torch.optim.AdamW(trainable_parameters, lr=1e-3, weight_decay=0.0)
    InputPreconditioner.load(model, folder).attach(optimizer)
    Trainer(model, ..., optimizers=(optimizer, None)).train()

Nothing else of this package uses it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lora_da_hf.adapters.targets import find_targets
from lora_da_hf.artifacts.statistics_store import load_statistics
from lora_da_hf.artifacts.store import load_init
from lora_da_hf.config import Damping
from lora_da_hf.distributed.parameters import is_whole
from lora_da_hf.errors import ConfigError, TargetError, UnsupportedSetupError
from lora_da_hf.theory.kronecker import inverse_root


class InputPreconditioner:
    """Takes an optimizer's steps of each A in coordinates in which its layer's input is white.

    With ``P = Z^-1/2``, Z the damped input second moment that was stored, the optimizer is given the gradient with
    regard to ``A P^-1`` and what it adds to that is brought back: A moves by ``P`` times it. Plain gradient descent
    becomes ``A -= lr * grad Z^-1``, which is the input half of a K-FAC step; Adam adapts in these coordinates. P is
    scaled so that an update with independent entries keeps its expected length. B's steps are left as they are.

    The moments are those of the base model, and stay so. Memory: one ``[d_in, d_in]`` for all layers that share an
    input, in A's dtype and on its device, which is half of what the statistics take or more.

    Attributes:
        layers: Names of the layers whose A is covered.
        left_out: Those of the adapter that are not, which have no stored statistics or are experts.
    """

    def __init__(self, roots: dict[str, tuple[nn.Parameter, Tensor]], left_out: list[str]) -> None:
        self.layers = list(roots)
        self.left_out = left_out
        self._roots = list(roots.values())
        self._before: list[tuple[nn.Parameter, Tensor, Tensor, Tensor]] = []
        self._is_attached = False

    @classmethod
    def load(
        cls,
        model: nn.Module,
        folder: str | Path,
        *,
        adapter_name: str | None = None,
        damping: float | str = "0.1*mean",
    ) -> InputPreconditioner:
        """Read the stored statistics of an adapter's layers, and factorise them.

        Args:
            model: The PEFT model that will be trained.
            folder: An initialisation that was stored with ``save_statistics=True``.
            adapter_name: The adapter, which must be the active one (another is an error); None: that one.
            damping: Added to the diagonal of each second moment, as ``input_damping`` is.

        Raises:
            ArtifactError: if the folder is damaged, or has no statistics.
            TargetError: if no A of the adapter is trained and has statistics that fit it.
            UnsupportedLayerError: if a base layer is quantised in a way that cannot be tapped.
            UnsupportedSetupError: if A is kept in parts or in copies (ZeRO, FSDP2).
            ConfigError: if the damping is none.
            NonFiniteError: if a stored second moment is not finite.
            SolveError: if a second moment is singular with this damping.
        """
        rule = Damping.parse(damping, "damping")
        manifest = load_init(folder).manifest
        statistics = load_statistics(Path(folder), manifest)
        by_leader: dict[str, Tensor] = {}
        roots: dict[str, tuple[nn.Parameter, Tensor]] = {}
        left_out: list[str] = []
        for target in find_targets(model, adapter_name).targets:
            found, weight = statistics.get(target.name), target.lora_A
            if found is None or target.is_routed or not isinstance(weight, nn.Parameter) or not weight.requires_grad:
                left_out.append(target.name)
                continue
            if not is_whole(weight):
                raise UnsupportedSetupError(
                    f"{target.name}: A is kept in parts or in copies, and its steps are taken there. Use DDP."
                )
            moment = found.input_second_moment
            if moment.shape[0] != target.in_features:
                raise TargetError(
                    f"{target.name} has {target.in_features} inputs and the statistics {moment.shape[0]}. They are of "
                    "another model."
                )
            leader = manifest.layers[target.name].shares_input_with
            if leader not in by_leader:
                by_leader[leader] = inverse_root(moment.to(weight.device), rule, layer=leader)
            roots[target.name] = (weight, by_leader[leader])
        if not roots:
            raise TargetError(
                f"{folder} has statistics for no A that is trained. Give the folder that this adapter was initialised "
                "with, and leave freeze_a out."
            )
        return cls(roots, left_out)

    def attach(self, optimizer: Optimizer) -> None:
        """Have an optimizer take its steps so, by its hooks. It may be attached to one optimizer, once.

        ``step`` then refuses a closure, whose gradients would come after the hook. Gradients are after a step what they
        were before it.

        Args:
            optimizer: Torch's own, before a trainer wraps it.

        Raises:
            ConfigError: if it is attached already, or the optimizer lacks some of the layers' A or lets them decay.
        """
        if self._is_attached:
            raise ConfigError(
                "This InputPreconditioner is attached to an optimizer already, whose steps it would transform twice. "
                "Load another for another optimizer."
            )
        decays = {id(p): group.get("weight_decay", 0) for group in optimizer.param_groups for p in group["params"]}
        for name, (weight, _) in zip(self.layers, self._roots, strict=True):
            if id(weight) not in decays:
                raise ConfigError(
                    f"The optimizer does not have lora_A of {name}. Make it from this model's parameters."
                )
            if decays[id(weight)]:
                raise ConfigError(
                    f"weight_decay={decays[id(weight)]} of lora_A of {name} would decay it in other coordinates. Set 0."
                )
        optimizer.register_step_pre_hook(self._before_step)
        optimizer.register_step_post_hook(self._after_step)
        self._is_attached = True

    @torch.no_grad()
    def _before_step(self, _: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if any(callable(given) for given in (*args[1:], *kwargs.values())):  # the first is the optimizer
            raise UnsupportedSetupError(
                "step(closure) takes its gradients in the step, where InputPreconditioner cannot transform them. Call "
                "the closure first, and step() without it."
            )
        self._move_to_weights()
        self._before = []
        for weight, root in self._roots:
            if weight.grad is not None:
                self._before.append((weight, weight.clone(), weight.grad, root))
                weight.grad = weight.grad @ root

    def _move_to_weights(self) -> None:
        """Bring the roots to where the weights are and to their dtype; those that layers share stay one."""
        if any((root.device, root.dtype) != (weight.device, weight.dtype) for weight, root in self._roots):
            moved: dict[tuple[int, torch.device, torch.dtype], Tensor] = {}
            for weight, root in self._roots:
                key = (id(root), weight.device, weight.dtype)
                moved[key] = moved[key] if key in moved else root.to(weight.device, weight.dtype)
            self._roots = [(w, moved[id(root), w.device, w.dtype]) for w, root in self._roots]

    @torch.no_grad()
    def _after_step(self, *_: Any) -> None:
        for weight, old, gradient, root in self._before:
            weight.copy_(old + (weight - old) @ root)
            weight.grad = gradient
        self._before = []
