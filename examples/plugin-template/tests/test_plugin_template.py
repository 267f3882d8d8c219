"""PluginTemplate keeps the contract of every strategy, and does what it says."""

import posenc.testing

from plugin_template import PluginTemplate


class TestPluginTemplate(posenc.testing.StrategyContract):
    strategy = PluginTemplate
    params = ({"near": 8}, {"near": 1, "step": 3}, {"near": 30, "step": 1})


def test_far_distances_are_compressed():
    relative = PluginTemplate(near=8, step=4).plan(100).relative_positions()
    assert relative[99, 95] == 4
    assert relative[99, 91] == 8
    assert relative[99, 51] == 8 + 40 / 4
