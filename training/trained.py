"""What a run trains, as one thing: networks, optimizer and loss tables, prepared, saved and loaded together."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from training.config import RunConfig
from training.engines.base import Engine
from training.optimizer_state import load_optimizer_tensors, optimizer_tensors
from training.optimizers import make_optimizer
from training.recipes.base import Recipe, load_recipe
from training.state_folder import LoadedState


@dataclass(frozen=True)
class Trained:
    """See the module. model: what forward is called on; names: of the recipe's parameters."""

    recipe: Recipe
    engine: Engine
    model: nn.Module
    optimizer: torch.optim.Optimizer
    names: Mapping[nn.Parameter, str]

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Return a state's components: {component: {name: tensor}}. Not copies."""
        optimizer, _ = optimizer_tensors(self.optimizer, self.names)
        own = {"model": self.engine.model_state(), "optimizer": optimizer, "recipe": self.recipe.state_tensors()}
        return {name: part for name, part in own.items() if part or name != "recipe"}

    def facts(self) -> dict[str, Any]:
        """Return what a state holds about the optimizer besides tensors."""
        _, facts = optimizer_tensors(self.optimizer, self.names)
        return {"optimizer": facts}

    def load(self, state: LoadedState) -> None:
        """Take over a state. Raises ValueError or StateError when it does not fit these networks."""
        self.engine.load_model_state(state.component("model"))
        load_optimizer_tensors(self.optimizer, state.component("optimizer"), state.facts["optimizer"], self.names)
        if "recipe" in state.components:
            self.recipe.load_state_tensors(state.component("recipe"))


def load_trained(config: RunConfig, engine: Engine) -> Trained:
    """Load the networks that the config names, make their optimizer, and hand both to the engine."""
    recipe, settings = load_recipe(config), config.optimizer
    recipe.load(engine.device)
    optimizer = make_optimizer(
        settings.name,
        recipe.parts(),
        learning_rates=recipe.learning_rates(),
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
    )
    names = {parameter: name for name, parameter in recipe.trainable().named_parameters()}
    return Trained(recipe, engine, engine.prepare(recipe.trainable(), optimizer), optimizer, names)
