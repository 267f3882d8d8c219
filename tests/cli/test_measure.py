"""The verbs that run a model (ppl, generate, demo) on a random model: numbers are checked for shape and identity."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

WORDS = "the quick brown fox jumps over the lazy dog " * 120


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(WORDS)
    return file


def test_ppl_scores_every_strategy_on_the_same_documents(run, small_model: Path, text: Path):
    result = run(
        "ppl", "--model", small_model, "--text", text, "-s", "rope", "-s", "rerope", "-s", "yarn",
        "--lengths", "64,128", "--score", 16, "--documents", 3, "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    data = json.loads(result.stdout)
    assert list(data["strategies"]) == ["rope", "rerope", "yarn"]
    assert (data["window"], data["documents"], data["scored_tokens"]) == (64, 3, 16)
    scores = {name: found["perplexity"] for name, found in data["strategies"].items()}
    for found in scores.values():
        for score in found.values():
            assert len(score["losses"]) == 3
            assert score["perplexity"] == pytest.approx(math.exp(sum(score["losses"]) / 3))
    assert scores["rope"]["64"]["losses"] != scores["rerope"]["64"]["losses"]


def test_ppl_of_plain_rope_is_the_models_own(run, small_model: Path, text: Path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    result = run(
        "ppl", "--model", small_model, "--text", text, "-s", "rope", "--lengths", 96, "--score", 20,
        "--documents", 1, "--json",
    )  # fmt: skip
    measured = json.loads(result.stdout)["strategies"]["rope"]["perplexity"]["96"]["losses"][0]
    model = AutoModelForCausalLM.from_pretrained(small_model, dtype=torch.float32)
    tokens = torch.tensor(AutoTokenizer.from_pretrained(small_model).encode(WORDS)[:96])
    with torch.no_grad():
        likelihood = model(tokens[None]).logits[0].log_softmax(-1)
    expected = -likelihood[torch.arange(75, 95), tokens[76:]].mean()
    assert measured == pytest.approx(float(expected), abs=1e-5)


def test_ppl_and_generate_run_in_another_dtype(run, small_model: Path, text: Path):
    arguments = (
        "ppl",
        "--model",
        small_model,
        "--text",
        text,
        "-s",
        "rerope",
        "--score",
        8,
        "--documents",
        1,
        "--json",
    )
    whole, half = (
        json.loads(run(*arguments, "--dtype", dtype, "--device", "cpu").stdout) for dtype in ("float32", "bfloat16")
    )
    assert (whole["dtype"], half["dtype"]) == ("torch.float32", "torch.bfloat16")
    losses = [found["strategies"]["rerope"]["perplexity"]["256"]["losses"][0] for found in (whole, half)]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], abs=0.05)
    said = run(
        "generate", "--model", small_model, "--prompt", "the quick", "--dtype", "bfloat16", "--max-new-tokens", 2
    )
    assert said.exit_code == 0, said.stderr


@pytest.mark.parametrize(
    "verb", [("ppl", "-s", "rope", "--model"), ("generate", "--prompt", "fox", "--model"), ("calibrate",)]
)
def test_a_missing_device_is_one_message(run, small_model: Path, verb: tuple[str, ...]):
    result = run(*verb, small_model, "--device", "cuda:99")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "device 'cuda:99': torch cannot use it here" in result.stderr
    assert "Traceback" not in result.stderr


def test_ppl_reads_a_list_of_configurations(run, small_model: Path, text: Path, tmp_path: Path):
    config = tmp_path / "several.yaml"
    config.write_text("- strategy: {name: lampe, mapping: 20}\n- strategy: {name: lampe, mapping: 30}\n")
    arguments = ("ppl", "--model", small_model, "--text", text, "--config", config, "--score", 8, "--documents", 2)
    result = run(*arguments)
    assert result.exit_code == 0, result.stderr
    assert "lampe (mapping=20)" in result.stdout
    assert "lampe (mapping=30)" in result.stdout
    assert "256 (4x)" in result.stdout  # the default lengths are 1, 2 and 4 windows


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "choose a strategy with --strategy NAME or --config FILE"),
        (["-s", "lamp"], "no strategy named 'lamp'. Did you mean 'lampe'?"),
        (["-s", "rope", "-s", "lampe", "-p", "head=3"], "--param needs exactly one --strategy, got 2."),
        (["-s", "rerope", "-p", "window_size=-1"], "rerope.window_size: "),
        (["-s", "rerope", "-p", "windowsize=9"], "rerope.windowsize: no such key."),
        (["-c", "{folder}/missing.yaml"], "missing.yaml: cannot be read (No such file or directory)."),
        (["-c", "{folder}"], "cannot be read (Is a directory)."),
        (["-c", "{folder}/broken.yaml"], "broken.yaml: is not valid YAML: "),
        (["-c", "{folder}/binary.yaml"], "binary.yaml: is not UTF-8 text"),
        (["-c", "{folder}/extra.yaml"], "extra.yaml[1]: stratgy: no such key."),
        (["-c", "{folder}/empty.yaml"], "the list of configurations is empty."),
        (["-s", "rope", "--text", "{folder}/missing.txt"], "missing.txt: cannot be read (No such file or directory)."),
        (["-s", "rope", "--text", "{folder}/empty.txt"], "empty.txt: the text is empty."),
        (["-s", "rope", "--text", "{folder}/binary.yaml"], "binary.yaml: is not UTF-8 text (byte 0)."),
        (["-s", "rope", "--lengths", "64", "--score", "64"], "length 64: must be at least 65"),
        (["-s", "rope", "--lengths", "64", "--score", "0"], "score: must be at least 1 token, got 0."),
        (["-s", "rope", "--lengths", "-64"], "length -64: must be at least 129"),
        (["-s", "rope", "--model", "{folder}/nowhere"], "nowhere: no such model."),
        (["-s", "rope", "--model", "nowhere"], "nowhere: no such model."),
        (["-s", "rope", "--model", "{folder}"], "transformers cannot load its tokenizer: "),
    ],
)
def test_bad_input_of_ppl_is_one_message(run, tmp_path: Path, arguments: list[str], said: str):
    (tmp_path / "broken.yaml").write_text("strategy: {name: rope")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "extra.yaml").write_text("- strategy: rope\n- strategy: rope\n  stratgy: rope\n")
    (tmp_path / "empty.yaml").write_text("[]")
    (tmp_path / "empty.txt").write_text(" \n")
    result = run("ppl", *(argument.format(folder=tmp_path) for argument in arguments))
    assert result.exit_code == 2, result.output
    assert said in result.stderr
    assert result.stderr.startswith("posenc: ")
    assert result.stdout == ""


def test_ppl_refuses_a_text_that_is_too_short(run, small_model: Path, tmp_path: Path):
    file = tmp_path / "short.txt"
    file.write_text("the quick brown fox")
    result = run("ppl", "--model", small_model, "--text", file, "-s", "rope", "--lengths", 200)
    assert result.exit_code == 2
    assert "tokens, too short for an input of 200." in result.stderr


def test_generate_prints_the_models_continuation(run, small_model: Path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    result = run("generate", "--model", small_model, "--prompt", "the quick fox", "--max-new-tokens", 6)
    assert result.exit_code == 0, result.stderr
    tokenizer = AutoTokenizer.from_pretrained(small_model)
    model = AutoModelForCausalLM.from_pretrained(small_model, dtype=torch.float32)
    tokens = tokenizer("the quick fox", return_tensors="pt")["input_ids"]
    out = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=6, do_sample=False)
    assert result.stdout == tokenizer.decode(out[0, tokens.shape[1] :], skip_special_tokens=True) + "\n"


def test_generate_samples_by_seed(run, small_model: Path):
    arguments = ("generate", "--model", small_model, "--prompt", "the lazy dog", "--max-new-tokens", 12, "--sample")
    first, again, other = (run(*arguments, "--seed", seed).stdout for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_generate_reads_a_file_and_a_config(run, small_model: Path, tmp_path: Path):
    (tmp_path / "prompt.txt").write_text("the quick brown fox " * 30)
    (tmp_path / "posenc.yaml").write_text(
        "strategy: {name: rerope, window_size: 16}\nfrequencies: {name: ntk, factor: 2}\n"
    )
    result = run(
        "generate", "--model", small_model, "--prompt-file", tmp_path / "prompt.txt", "--config",
        tmp_path / "posenc.yaml", "--max-new-tokens", 3, "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    data = json.loads(result.stdout)
    assert data["config"]["strategy"] == {"name": "rerope", "window_size": 16}
    assert data["new_tokens"] <= 3 < 64 < data["prompt_tokens"]


def test_generate_reads_standard_input(run, small_model: Path):
    arguments = ("generate", "--model", small_model, "--max-new-tokens", 4)
    assert (
        run(*arguments, "--prompt-file", "-", stdin="the lazy dog").stdout
        == run(*arguments, "--prompt", "the lazy dog").stdout
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give the prompt with either --prompt TEXT or --prompt-file FILE."),
        (["--prompt", "a", "--prompt-file", "b"], "give the prompt with either"),
        (["--prompt", ""], "the prompt is empty."),
        (["--prompt-file", "{folder}/missing"], "missing: cannot be read"),
        (["--prompt", "a", "-s", "rope", "-c", "x"], "--strategy and --config exclude each other."),
        (["--prompt", "a", "--temperature", "0.5"], "--temperature has an effect with --sample only."),
        (["--prompt", "a", "--sample", "--temperature", "0"], "--temperature: must be above 0, got 0.0."),
        (["--prompt", "a", "--sample", "--temperature", "nan"], "--temperature: must be above 0, got nan."),
        (["--prompt", "a", "-s", "reropee"], "Did you mean 'rerope'?"),
        (["--prompt", "a", "-c", "{folder}/two.yaml"], "holds 2 configurations, generate takes one."),
    ],
)
def test_bad_input_of_generate_is_one_message(run, tmp_path: Path, arguments: list[str], said: str):
    (tmp_path / "two.yaml").write_text("- strategy: rope\n- strategy: yarn\n")
    result = run("generate", *(argument.format(folder=tmp_path) for argument in arguments))
    assert result.exit_code == 2, result.output
    assert said in result.stderr
    assert result.stdout == ""


def test_demo_prints_tables_and_writes_its_files(run, small_model: Path, text: Path, tmp_path: Path):
    config = tmp_path / "demo.yaml"
    config.write_text("- strategy: rope\n- strategy: {name: lampe, mapping: 40}\n")
    result = run(
        "demo", "--model", small_model, "--config", config, "--text", text, "--documents", 2,
        "--out", tmp_path / "new" / "out",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    for shown in ("64 (1x)", "128 (2x)", "256 (4x)", "512 (8x)", "perplexity of the last 32", "retrieval", "paired"):
        assert shown in result.stdout
    written = {path.name for path in (tmp_path / "new" / "out").iterdir()}
    assert written == {"results.json", "perplexity.png", "retrieval.png", "position-maps.png"}
    assert all(name in result.stdout for name in written)
    data = json.loads((tmp_path / "new" / "out" / "results.json").read_text())
    assert list(data["strategies"]) == ["rope", "lampe"]
    assert list(data["strategies"]["lampe"]["retrieval"]) == ["64", "128", "256", "512"]


def test_demo_refuses_an_impossible_folder(run, small_model: Path, text: Path, tmp_path: Path):
    config = tmp_path / "demo.yaml"
    config.write_text("strategy: rope\n")
    result = run(
        "demo", "--model", small_model, "--config", config, "--text", text, "--documents", 2, "--out", text / "out"
    )
    assert result.exit_code == 2
    assert "cannot be written (Not a directory)" in result.stderr


def test_demo_refuses_options_that_it_does_not_take(run):
    assert run("demo", "--lengths", "512").exit_code == 2
    result = run("demo", "--lengths", "x,y")
    assert "is not a list of whole numbers" in result.stderr
