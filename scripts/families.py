"""Build every causal-LM family of the installed transformers tiny, apply posenc, and measure what happens.

    python -m scripts.families               # all families: docs/families.md and docs/families.json
    python -m scripts.families gemma2 llama  # print some of them

Every family runs in a process of its own, so that one that crashes or grows too large does not stop the rest.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
MEMORY = 12 * 2**30
SECONDS = 120
CHUNK = 12
ORDER = ("exact", "refused", "wrong", "broken", "unbuilt", "crashed")


def model_types() -> list[str]:
    """Every causal-LM family that the installed transformers maps."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def measured(names: list[str]) -> list[dict[str, Any]]:
    """Verdicts of some families, each measured in this process and printed as a line of JSON."""
    from scripts.family_measure import measure

    found = []
    for name in names:
        found.append(measure(name).data())
        print(json.dumps(found[-1]), flush=True)
    return found


def in_processes(names: list[str]) -> list[dict[str, Any]]:
    """Verdicts from processes of a few families; one that dies costs the family it died on."""
    found: dict[str, dict[str, Any]] = {}
    waiting = list(names)
    while waiting:
        chunk = waiting[:CHUNK]
        for line in _lines(chunk):
            verdict = json.loads(line)
            found[verdict["model_type"]] = verdict
            print(f"{verdict['verdict']:8} {verdict['model_type']}", file=sys.stderr, flush=True)
        missing = [name for name in chunk if name not in found]
        if missing:
            found[missing[0]] = {"model_type": missing[0], "verdict": "crashed", "reason": "its process died"}
        waiting = [name for name in waiting if name not in found]
    return [found[name] for name in names]


def _lines(names: list[str]) -> list[str]:
    command = [sys.executable, "-m", "scripts.families", "--here", *names]
    environment = {**os.environ, "TRANSFORMERS_VERBOSITY": "error", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            output, _ = process.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
    return [line for line in output.splitlines() if line.startswith('{"model_type"')]


def page(verdicts: list[dict[str, Any]], version: str) -> str:
    """docs/families.md."""
    count = {kind: sum(v["verdict"] == kind for v in verdicts) for kind in ORDER}
    text = [
        "# Families",
        "",
        "Made by `python -m scripts.families`; do not edit. Every causal-LM family of the installed transformers",
        "is built tiny with random weights, posenc is applied, and what happens is measured.",
        "",
        f"transformers {version}: {count['exact']} of {len(verdicts)} families are exact, {count['refused']} are",
        f"refused before any hook is installed, {count['unbuilt'] + count['crashed']} could not be built tiny, and",
        f"{count['wrong'] + count['broken']} are wrong or break.",
        "",
        "*Exact* means: with the identity plan prefill, left-padded batches and decoding equal the unpatched model",
        "(the column says how closely); one remap (ReRoPE with a small window) equals a dense float64 judge in",
        "prefill and five decoded tokens, relative to the largest logit; after detaching everything is bit-equal",
        "again. The judge knows nothing of posenc: it asks the model itself to rotate to every relative position",
        "(`posenc/testing/judge.py`).",
        "",
        "The attention column says under which implementation it was measured: `eager` where the one that",
        "transformers chooses by itself is refused with the advice to load the model so.",
        "",
        "## Exact",
        "",
        "| family | model | attention | identity | identity, bfloat16 | remap error | layers |",
        "|---|---|---|---|---|---|---|",
    ]
    text += [
        f"| {v['model_type']} | {v['model']} | {v['attention']} | {v['identity']} | {v['identity_bfloat16']} | "
        f"{v['remap_error']:.1e} | {'; '.join(v['facts'])} |"
        for v in verdicts
        if v["verdict"] == "exact"
    ]
    for kind, title in (("refused", "Refused"), ("wrong", "Wrong"), ("broken", "Broken"), ("unbuilt", "Not built")):
        rows = [v for v in verdicts if v["verdict"] == kind or (kind == "unbuilt" and v["verdict"] == "crashed")]
        if rows:
            text += ["", f"## {title}", "", "| family | why |", "|---|---|"]
            text += [f"| {v['model_type']} | {_cell(v['reason'])} |" for v in rows]
    return "\n".join(text) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def _short(verdict: dict[str, Any]) -> str:
    kind = "not measured" if verdict["verdict"] in ("unbuilt", "crashed") else verdict["verdict"]
    return f"{kind}: {' '.join(verdict['reason'].split())}"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("families", nargs="*", help="only these; prints instead of writing files")
    parser.add_argument("--here", action="store_true", help="measure in this process")
    arguments = parser.parse_args()
    if arguments.here:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        measured(arguments.families)
        return
    verdicts = in_processes(arguments.families or model_types())
    if arguments.families:
        print(json.dumps(verdicts, indent=1))
        return
    import transformers

    data = {"transformers": transformers.__version__, "families": verdicts}
    (ROOT / "docs" / "families.json").write_text(json.dumps(data, indent=1) + "\n")
    short = {v["model_type"]: v["verdict"] if v["verdict"] == "exact" else _short(v) for v in verdicts}
    shipped = {"transformers": transformers.__version__, "families": short}
    (ROOT / "adapters" / "posenc_adapters" / "families.json").write_text(json.dumps(shipped, indent=1) + "\n")
    (ROOT / "docs" / "families.md").write_text(page(verdicts, transformers.__version__))


if __name__ == "__main__":
    main()
