"""LaMPE: golden values, profiles, calibration files, the fallback, ablations and the published arithmetic."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from posenc_plugins.lampe import Lampe, Split
from posenc_plugins.lampe_mapping import PROFILES, MappingCurve

import posenc

KIB = 1024
FACTOR_SQUARED = (0.1 * math.log(2) + 1) ** 2


def lampe(**params: Any) -> Lampe:
    strategy = posenc.strategy("lampe", **params)
    assert isinstance(strategy, Lampe)
    return strategy


@pytest.mark.parametrize(
    ("prompt", "head", "tail", "mapping", "start", "b1", "b2"),
    [
        (2048, 512, 200, 1536, 201, 127, 334),
        (3000, 512, 200, 1036, 202, 335, 1496),
        (4096, 1024, 200, 1994, 201, 525, 1473),
    ],
)
def test_plans_have_golden_values(
    prompt: int, head: int, tail: int, mapping: int, start: int, b1: int, b2: int
) -> None:
    strategy = lampe(head=head, tail=tail, mapping=mapping)
    assert strategy.split(prompt) == Split(mapping, prompt - start, start, b1, b2)
    names = [segment.name for segment in strategy.plan(prompt).segments]
    assert names == ["head", "middle", "tail"]
    head_part, middle, tail_part = strategy.plan(prompt).segments
    index = np.arange(prompt)
    np.testing.assert_array_equal(head_part.query_positions, index)
    np.testing.assert_array_equal(middle.key_positions, mapping * index // (prompt - 1))
    np.testing.assert_array_equal(middle.query_positions - middle.key_positions, b1)
    np.testing.assert_array_equal(index - tail_part.query_positions, b2)
    np.testing.assert_array_equal(tail_part.key_positions, index)
    assert (middle.key_stop[head], tail_part.key_stop[prompt - start]) == (1, 1)


LENGTHS = [8 * KIB, 16 * KIB, 32 * KIB, 64 * KIB, 128 * KIB]
TABLE = {
    "llama2": [1283, 1702, 2239, 2473, 2489],
    "llama3": [1036, 1993, 4501, 6129, 6204],
    "mistral": [4104, 7898, 17829, 24280, 24575],
    "llama3.1": [6728, 9389, 17468, 44548, 78864],
}


@pytest.mark.parametrize("profile", TABLE)
def test_profiles_have_known_mapping_lengths(profile: str) -> None:
    strategy = lampe(window=4096, mapping=profile)
    assert [strategy.mapping_length(length) for length in LENGTHS] == TABLE[profile]
    official = lampe(window=4096, mapping=profile, compat="official")
    assert [official.mapping_length(length) for length in LENGTHS] == TABLE[profile]


def test_the_1536_constant_belongs_to_the_published_code_and_to_profiles() -> None:
    for profile, curve in PROFILES.items():
        official = lampe(window=4096, mapping=profile, compat="official")
        short = curve(8191) if profile == "llama3.1" else 1536
        assert official.mapping_length(8191) == short
        assert official.mapping_length(4000) == (curve(4000) if profile == "llama3.1" else 1536)
        assert official.mapping_length(8192) == curve(8192)
        assert lampe(window=4096, mapping=profile).mapping_length(8191) == curve(8191) != 1536
    same_numbers = PROFILES["llama3"].model_dump()
    assert lampe(window=4096, mapping=same_numbers, compat="official").mapping_length(4000) == PROFILES["llama3"](4000)


def test_a_mapping_is_a_number_or_a_curve() -> None:
    assert lampe(window=512, mapping=77).mapping_length(5000) == 77
    curve = {"c": 300.0, "a": 0.001, "b": -2.0}
    assert lampe(window=512, mapping=curve).mapping_length(2000) == int(300 / (1 + math.exp(-(0.001 * 2000 - 2.0))))
    assert MappingCurve(c=5, a=0, b=-800)(10) == 0  # no overflow


def test_the_fallback_has_llama3s_shape_at_the_models_window_and_warns_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="posenc"):
        strategy = lampe(window=2048)
        strategy.plan(5000)
        strategy.plan(6000, 6010)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "posenc calibrate" in record.getMessage()
    assert strategy.mapping_length(5000) == int(0.75 * 2048 / (1 + math.exp(-(0.86 / 2048 * 5000 - 2.467))))


@pytest.mark.parametrize("mapping", ["llama2", 300, {"c": 300, "a": 0.001, "b": -2}])
def test_a_given_mapping_does_not_warn(mapping: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="posenc"):
        lampe(window=2048, mapping=mapping).plan(5000)
    assert not caplog.records


@pytest.mark.parametrize("suffix", ["yaml", "json"])
@pytest.mark.parametrize("nested", [True, False])
def test_a_mapping_is_read_from_a_calibration_file(suffix: str, nested: bool, tmp_path: Path) -> None:
    curve = {"c": 1500.5, "a": 0.0004, "b": -2.5}
    content: dict[str, Any] = {"window": 2048, "model": "some model", **({"mapping": curve} if nested else curve)}
    file = tmp_path / f"calibration.{suffix}"
    file.write_text(json.dumps(content))  # JSON is YAML too
    for given_path in (str(file), file):
        strategy = lampe(window=2048, mapping=given_path)
        assert strategy.mapping_length(9000) == MappingCurve(**curve)(9000)
    described = strategy.describe()
    assert described == {"name": "lampe", "mapping": curve}  # the values, since the path would be useless elsewhere
    assert posenc.strategy(window=2048, **described).plan(9000).max_relative == strategy.plan(9000).max_relative


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"{", "not valid YAML"),
        (b"\xff\xfe\x00", "not UTF-8"),
        (b"- 1\n- 2\n", "no mapping"),
        (b"", "no mapping"),
        (b"mapping: 7\n", "no mapping"),
        (b"mapping: {c: 5, a: 1}\n", "b: Field required"),
        (b"{c: five, a: 1, b: 2}\n", "c: Input should be a valid number"),
        (b"{c: -5, a: 1, b: 2}\n", "c: Input should be greater than 0"),
        (b"{c: .nan, a: 1, b: 2}\n", "c: "),
        (b"{c: 5, a: -1, b: 2}\n", "a: "),
    ],
)
def test_bad_calibration_files_are_refused(content: bytes, says: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_bytes(content)
    with pytest.raises(posenc.InvalidConfigError, match=r"^lampe\.mapping: ") as caught:
        lampe(window=2048, mapping=str(file))
    assert says in str(caught.value)
    assert str(file) in str(caught.value)


def test_a_directory_or_a_missing_file_is_refused_as_a_mapping(tmp_path: Path) -> None:
    with pytest.raises(posenc.InvalidConfigError, match=r"^lampe\.mapping: .*cannot be read"):
        lampe(window=2048, mapping=str(tmp_path))
    with pytest.raises(posenc.InvalidConfigError, match=r"^lampe\.mapping: no profile and no file.*posenc calibrate"):
        lampe(window=2048, mapping=str(tmp_path / "missing.yaml"))
    with pytest.raises(posenc.InvalidConfigError, match=r"^lampe\.mapping: .*Did you mean 'llama3'\?"):
        lampe(window=2048, mapping="lama3")


@pytest.mark.parametrize("mapping", [0, -3, True, 2.5, "", [1], {"c": 1}, {"c": 1, "a": 1, "b": 1, "d": 1}])
def test_bad_mappings_name_the_key(mapping: Any) -> None:
    with pytest.raises(posenc.InvalidConfigError, match=r"^lampe\.mapping: "):
        lampe(window=2048, mapping=mapping)


def test_the_identity_ends_exactly_at_its_borders() -> None:
    strategy = lampe(head=50, tail=10, mapping=60)
    assert strategy.plan(99).is_identity  # P < 2H
    assert not strategy.plan(100).is_identity
    assert lampe(head=5, tail=5, mapping=60).plan(61).is_identity  # U >= P - 1
    assert not lampe(head=5, tail=5, mapping=60).plan(62).is_identity
    assert lampe(head=50, tail=50, mapping=1).plan(100).is_identity  # m is 0 up to 98, so R = 98 and no middle
    assert lampe(head=20, tail=90, mapping=60).plan(100).is_identity  # P - R <= H
    assert lampe(head=20, tail=80, mapping=60).plan(100).is_identity  # R = 80, so P - R == H
    assert not lampe(head=20, tail=79, mapping=60).plan(100).is_identity
    inactive = lampe(head=20, tail=90, mapping=60)
    assert inactive.plan(100, 150).is_identity  # decoding keeps P
    assert inactive.plan(100).query_scale is None


def test_the_attention_factor_scales_active_plans_only() -> None:
    active = lampe(head=8, tail=4, mapping=40).plan(100, 105)
    assert active.query_scale is not None
    np.testing.assert_allclose(active.query_scale, FACTOR_SQUARED, rtol=1e-15)
    assert round(FACTOR_SQUARED, 4) == 1.1434
    assert lampe(head=8, tail=4, mapping=40, attention_factor=1.0).plan(100).query_scale is None
    half = lampe(head=8, tail=4, mapping=40, attention_factor=0.5).plan(100).query_scale
    assert half is not None
    assert set(half) == {0.25}
    for prompt in (5, 100):  # the published code scales short inputs too
        scale = lampe(head=8, tail=4, mapping=40, compat="official").plan(prompt).query_scale
        assert scale is not None
        np.testing.assert_allclose(scale, FACTOR_SQUARED, rtol=1e-15)


def test_distances_are_continuous_at_both_borders_unless_turned_off() -> None:
    def last_row(**params: Any) -> np.ndarray:
        return lampe(head=64, tail=20, mapping=200, **params).plan(1000).relative_positions()[-1, ::-1]

    assert set(np.diff(last_row())) <= {0.0, 1.0}
    broken = np.diff(last_row(continuity=False))
    assert broken.min() < -10  # the head ends at 63 and the middle starts near 12
    assert broken.max() > 100


def test_granularity_chooses_the_segments() -> None:
    def names(kind: str) -> list[str]:
        return [s.name for s in lampe(head=8, tail=4, mapping=40, granularity=kind).plan(200).segments]

    assert names("full") == ["head", "middle", "tail"]
    assert names("head_only") == ["head", "middle"]
    assert names("uniform") == ["middle"]


def test_decoding_continues_the_map() -> None:
    plan = lampe(head=8, tail=4, mapping=40).plan(100, 300)
    middle = plan.segments[1]
    np.testing.assert_array_equal(middle.key_positions, 40 * np.arange(300) // 99)
    assert (middle.key_positions[99], middle.key_positions[299]) == (40, 120)


# ---- compat="official"


def test_official_rounding_differs_from_the_exact_floor_for_about_half_of_all_cases() -> None:
    random = np.random.default_rng(0)
    differs = short = 0
    for _ in range(400):
        prompt = int(random.integers(1000, 20000))
        mapping = int(random.integers(500, prompt - 1))
        index = np.arange(prompt)
        exact = lampe(head=1, tail=1, mapping=mapping).mapped(index, prompt, mapping)
        rounded = lampe(head=1, tail=1, mapping=mapping, compat="official").mapped(index, prompt, mapping)
        assert exact[-1] == mapping
        assert np.abs(exact - rounded).max() <= 1
        differs += bool((exact != rounded).any())
        short += int(rounded[-1] == mapping - 1)
    assert 0.3 < differs / 400 < 0.7
    assert short > 0


def test_official_decoding_freezes_the_map() -> None:
    strategy = lampe(head=8, tail=4, mapping=40, compat="official")
    plan = strategy.plan(100, 130)
    middle = plan.segments[1]
    assert set(middle.key_positions[99:]) == {middle.key_positions[99]}
    at_head = [plan.relative_positions()[i, i - 8] for i in range(99, 130)]
    assert at_head[0] > at_head[7]  # the distance at d = H shrinks as tokens are generated
    assert len(set(at_head[9:])) == 1  # beyond H new tokens the published code crashes; the rule continues
    plan.check()


def test_official_is_inactive_only_below_two_heads_and_stretches() -> None:
    def official(**params: Any) -> Lampe:
        return lampe(tail=4, compat="official", **params)

    short = official(head=50, mapping=60).plan(99)
    assert len(short.segments) == 1
    assert not np.any(short.segments[0].query_positions - np.arange(99))
    stretched = official(head=5, mapping=150).plan(100)
    assert stretched.max_relative > 99
    assert stretched.segments[1].key_positions[99] in (149, 150)
    official(head=20, mapping=60).plan(100).check()


def test_official_never_replans() -> None:
    assert lampe(window=512, mapping=100, compat="official").replan == "never"
    assert lampe(window=512, mapping=100, compat="official", replan=7).replan == "never"
    assert lampe(window=512, mapping=100).replan == "auto"
    assert lampe(window=512, mapping=100, replan=7).replan == 7


@settings(deadline=None, max_examples=60)
@given(
    prompt=st.integers(1, 300),
    extra=st.integers(0, 100),
    head=st.integers(1, 40),
    tail=st.integers(0, 320),
    mapping=st.integers(1, 400),
    kind=st.sampled_from(["full", "uniform", "head_only"]),
    continuity=st.booleans(),
    compat=st.sampled_from(["paper", "official"]),
)
def test_every_variant_is_a_partition(
    prompt: int, extra: int, head: int, tail: int, mapping: int, kind: str, continuity: bool, compat: str
) -> None:
    strategy = lampe(head=head, tail=tail, mapping=mapping, granularity=kind, continuity=continuity, compat=compat)
    strategy.plan(prompt, prompt + extra).check()
