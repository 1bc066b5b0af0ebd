"""Where a run begins: a new adapter, or one that is trained further. No torch."""

from __future__ import annotations

from dataclasses import replace

from loramux_adapters.errors import TrainingError
from loramux_adapters.spec import AdapterSpec, BaseGeometry
from loramux_adapters.training.recipe import Recipe, ResolvedRecipe
from loramux_adapters.training.targets import resolve_targets


def new_spec(recipe: ResolvedRecipe) -> AdapterSpec:
    return AdapterSpec(recipe.r, recipe.lora_alpha, recipe.target_modules, recipe.use_rslora)


def stamped(spec: AdapterSpec, geometry: BaseGeometry) -> AdapterSpec:
    """The spec of an adapter that was trained on this base."""
    return replace(spec, base_model_name_or_path=geometry.name, base_identity=geometry.identity or None)


def continued(recipe: Recipe, spec: AdapterSpec, geometry: BaseGeometry) -> Recipe:
    """The recipe with the shape of the adapter that it continues. Raises TrainingError if it asks for another."""
    shape = {
        "r": spec.r,
        "lora_alpha": spec.lora_alpha,
        "use_rslora": spec.use_rslora,
        "target_modules": list(spec.target_modules),
    }
    for field in sorted(recipe.given & shape.keys()):
        wanted, has = getattr(recipe, field), shape[field]
        if field == "target_modules":
            named = replace(spec, target_modules=resolve_targets(wanted, geometry))
            wanted, has = named.targets(geometry), spec.targets(geometry)
        if wanted != has:
            raise TrainingError(
                f"{field} is a property of the adapter that init_from names, where it is {shape[field]}: leave it out",
                param=field,
            )
    if list(spec.target_modules) == ["all-linear"]:
        shape["target_modules"] = "all-linear"
    return recipe.model_copy(update=shape)
