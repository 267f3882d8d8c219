"""What is worth a word about a plan: it is sound, but hardly what was meant."""

from __future__ import annotations

from posenc.plan import PositionPlan
from posenc.positions import IdentityStrategy, PositionStrategy


def concerns(strategy: PositionStrategy, plan: PositionPlan) -> dict[str, str]:
    """Messages about a plan for a prompt that is longer than the window, by kind.

    Parameters
    ----------
    strategy : PositionStrategy
        Made the plan.
    plan : PositionPlan
        At least as long as its prompt.

    Returns
    -------
    dict
        ``"identity"`` where a remap moves nothing, ``"leaves"`` where it sees distances that the model never saw.
        Empty for prompts inside the window, for changed frequencies and for plain RoPE.
    """
    window, prompt = strategy.window, plan.prompt
    if window is None or prompt <= window or strategy.capabilities.changes_frequencies:
        return {}
    if isinstance(strategy, IdentityStrategy):
        return {}
    if plan.prefix(prompt).is_identity:
        return {
            "identity": f"{strategy.name}: a prompt of {prompt} tokens is longer than the window of {window}, and its "
            f"plan moves nothing: distances from {window} to {prompt - 1} are new to the model. Smaller sizes, or a "
            f"smaller active_from, let it act ('posenc show {strategy.name}' lists its parameters)."
        }
    farthest = float(plan.reach[prompt - 1])
    if farthest >= window:
        return {
            "leaves": f"{strategy.name}: with a prompt of {prompt} tokens its plan sees distances up to {farthest:g}, "
            f"and the window is {window}: those beyond it are new to the model. Compress more, or take a strategy that "
            "stays inside ('posenc show NAME' says which are bounded)."
        }
    return {}
