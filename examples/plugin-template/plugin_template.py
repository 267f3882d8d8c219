"""plugin_template: a position strategy for posenc."""

from __future__ import annotations

from pydantic import PositiveInt

import posenc


class PluginTemplateParams(posenc.RemapParams):
    near: PositiveInt = 64
    step: PositiveInt = 4


class PluginTemplate(posenc.PositionStrategy):
    """Distances below ``near`` are exact; farther ones grow by one every ``step`` tokens."""

    name = "plugin_template"
    summary = "exact distances nearby, one step for several tokens beyond"
    paper = "name the paper here"
    Params = PluginTemplateParams

    def segments(self, lengths: posenc.Lengths) -> list[posenc.Segment]:
        index, near, step = lengths.indices, self.params.near, self.params.step
        return [
            posenc.Segment.band("near", lengths.total, 0, near, index, index),
            posenc.Segment.band("far", lengths.total, near, None, index / step + near - near / step, index / step),
        ]


@posenc.hookimpl
def posenc_register_strategies(register):
    register(PluginTemplate)
