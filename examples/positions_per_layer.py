"""Positions that differ from layer to layer, written with posenc's public names only.

Lower layers look at words and need exact neighbours; upper layers carry the gist and tolerate coarser positions. This
method groups far positions in every layer (Jin et al. 2024, SelfExtend), with larger groups in higher layers.

    python examples/positions_per_layer.py
"""

from __future__ import annotations

from pydantic import PositiveInt

import posenc


class GroupedByLayerParams(posenc.RemapParams):
    lowest: PositiveInt = 2
    highest: PositiveInt = 8
    near: PositiveInt = 64


class GroupedByLayer(posenc.PositionStrategy):
    """SelfExtend with groups of ``lowest`` tokens in the first layer, growing to ``highest`` in the last."""

    name = "grouped_by_layer"
    summary = "exact neighbours, groups that grow with the layer beyond"
    paper = "an example"
    Params = GroupedByLayerParams

    def for_layer(self, layer: int, layers: int) -> posenc.PositionStrategy:
        share = layer / max(layers - 1, 1)
        return self.grouped(round(self.params.lowest + share * (self.params.highest - self.params.lowest)))

    def segments(self, lengths: posenc.Lengths):
        """Return the segments of the last layer, which are shown if no layer is requested."""
        return self.grouped(self.params.highest).segments(lengths)

    def grouped(self, group: int) -> posenc.PositionStrategy:
        kept = {"active_from": self.params.active_from, "replan": self.params.replan}
        return posenc.strategy("self_extend", window=self.window, group=group, window_size=self.params.near, **kept)


@posenc.hookimpl
def posenc_register_strategies(register):
    register(GroupedByLayer)


def main() -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained("posenc/models/tiny")
    with posenc.apply(model, GroupedByLayer(window=256)) as handle:
        for layer in range(model.config.num_hidden_layers):
            plan = handle.plan(1024, layer=layer)
            print(f"layer {layer}: 1023 tokens back is seen at {plan.max_relative:g}")


if __name__ == "__main__":
    main()
