"""Warnings about plans that are valid, but probably not what the user intended."""

from __future__ import annotations

from posenc.plan import PositionPlan
from posenc.positions import IdentityStrategy, PositionStrategy


def concerns(strategy: PositionStrategy, plan: PositionPlan) -> dict[str, str]:
    """Warnings about a plan for a prompt that is longer than the window, by kind.

    Parameters
    ----------
    strategy : PositionStrategy
        The strategy that made the plan.
    plan : PositionPlan
        A plan that covers at least its prompt.

    Returns
    -------
    dict
        ``"identity"`` if a remap changes no position, ``"leaves"`` if it contains distances that the model was not
        trained on. Empty for prompts inside the window, for changed frequencies and for plain RoPE.
    """
    window, prompt = strategy.window, plan.prompt
    if window is None or prompt <= window or strategy.capabilities.changes_frequencies:
        return {}
    if isinstance(strategy, IdentityStrategy):
        return {}
    if plan.prefix(prompt).is_identity:
        return {
            "identity": f"{strategy.name}: a prompt of {prompt} tokens is longer than the window of {window}, but its "
            f"plan moves nothing: distances from {window} to {prompt - 1} are new to the model. Choose smaller sizes "
            f"or a smaller active_from ('posenc show {strategy.name}' lists the parameters)."
        }
    farthest = float(plan.reach[prompt - 1])
    if farthest >= window:
        return {
            "leaves": f"{strategy.name}: the plan for a prompt of {prompt} tokens sees distances up to {farthest:g}, "
            f"but the window is {window}, and distances beyond it are new to the model. Compress more, or choose a "
            "strategy that stays inside the window ('posenc show NAME' says whether a strategy is bounded)."
        }
    return {}
