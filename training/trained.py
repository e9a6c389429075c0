"""What a run trains, as one thing: networks, optimizer, running average and loss tables, saved and loaded together."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from training.carry_over import CarryOver, OptimizerState, carried_over
from training.config import RunConfig
from training.ema import Ema, make_ema, weights_to_show
from training.engines.base import Engine
from training.engines.scaled import ScaledEngine
from training.optim.from_config import optimizer_from_config
from training.precision import set_weights
from training.recipes.base import Recipe, SampleResult, load_recipe
from training.stages import stages_of
from training.state_folder import LoadedState
from training.tensor_parts import InParts


@dataclass(frozen=True)
class Trained:
    """See the module. model: what forward is called on; names: of the recipe's parameters."""

    recipe: Recipe
    engine: Engine
    model: nn.Module
    optimizer: torch.optim.Optimizer
    names: Mapping[nn.Parameter, str]
    ema: Ema | None = None

    def update(self, results: Sequence[SampleResult]) -> None:
        """Apply the gradients of a step, and let the recipe take note of its losses."""
        self.engine.step()
        self.recipe.after_step(results)

    def step_over(self, global_step: int) -> None:
        """Take note that step `global_step`, counted from 1, is over, with an update or without."""
        if self.ema is not None:
            self.ema.update(global_step)

    def shown(self) -> AbstractContextManager[None]:
        """Return a context with the weights that previews, validation and exports show. Every rank has to enter it."""
        return weights_to_show(self.optimizer, self.ema)

    def tensors(self) -> dict[str, dict[str, Tensor | InParts]]:
        """Return a state's components: {component: {name: tensor}}. Not copies; perhaps in parts."""
        optimizer, _ = self.engine.optimizer_state(self.names)
        own: dict[str, dict[str, Tensor | InParts]] = {
            "model": self.engine.model_state(),
            "optimizer": optimizer,
            "recipe": {**self.recipe.state_tensors()},
        }
        if self.ema is not None:
            own["ema"] = self.ema.tensors()
        return {name: part for name, part in own.items() if part or name != "recipe"}

    def facts(self) -> dict[str, Any]:
        """Return what a state holds besides tensors: options of the optimizer, the loss scale."""
        _, optimizer = self.engine.optimizer_state(self.names)
        scale = {"loss_scale": self.engine.loss_scale.facts()} if isinstance(self.engine, ScaledEngine) else {}
        return {"optimizer": optimizer, **scale}

    def load(self, state: LoadedState, *, carry_over: CarryOver = "all") -> None:
        """Take over a state. Raises ValueError or StateError when it does not fit these networks.

        carry_over: what of the optimizer's, where the state is of another stage.
        """
        self.engine.load_model_state(state.tensors("model"))
        optimizer = OptimizerState(state.tensors("optimizer"), state.facts["optimizer"])
        if carry_over != "all":
            _, own = self.engine.optimizer_state(self.names)
            optimizer = carried_over(optimizer, own, is_fresh=carry_over == "fresh")
        self.engine.load_optimizer_state(optimizer.tensors, optimizer.facts, self.names)
        if "recipe" in state.components:
            self.recipe.load_state_tensors(state.component("recipe"))
        if self.ema is not None:
            self.ema.load(state.tensors("ema"))
        if isinstance(self.engine, ScaledEngine):
            self.engine.loss_scale.load(state.facts["loss_scale"])


def load_trained(config: RunConfig, engine: Engine) -> Trained:
    """Load the networks that the config names, make their optimizer, and hand both to the engine."""
    recipe = load_recipe(config)
    recipe.load(engine.device)
    module = recipe.trainable()
    set_weights(module, config.precision.weights)
    optimizer = optimizer_from_config(config, module, recipe.parts, learning_rates=recipe.learning_rates())
    if config.compile != "no":
        module.compile(backend=config.compile)  # in place: parameters and their names stay
    model = engine.prepare(module, optimizer)
    parameters = dict(module.named_parameters())
    names = {parameter: name for name, parameter in parameters.items()}
    held = parameters
    if stages_of(config):  # a part that rests now was trained before, and its average is shown, too
        held = {name: parameter for name, parameter in parameters.items() if name in module.state_dict()}
    return Trained(
        recipe, engine, model, optimizer, names, make_ema(config.ema, held, with_frozen=held is not parameters)
    )
