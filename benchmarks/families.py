"""What was shown of each model family: the table of the README, from tests that run now.

    pytest -m parity --junitxml=parity.xml                              # extra `parity`
    python -m benchmarks.families --report parity.xml                   # the table
    python -m benchmarks.families --report parity.xml --write README.md # into its place there
    python -m benchmarks.families --only bert vit                       # runs the tests of these

For each file of `jtl/models/families/` the parity tests of the family count, and the known answers
of real weights where a package carries some (`benchmarks.known_answers`; fetched once with a
network). One JSON line a family: tests passed and failed, known answers right and wrong.

    parity        a random model of transformers on PyTorch, through its folder: every hidden state,
                  the outputs of heads, the gradient of every parameter, and back again
    real weights  published weights give known answers
    layout        no such model in transformers: names and shapes of the published file, values
                  against the formulas written once more in the test
"""

import argparse
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree
from collections.abc import Sequence
from typing import Any, NamedTuple

from benchmarks import measure, table
from jtl.models.families import TABLE

_MARKS = ("<!-- families: python -m benchmarks.families -->", "<!-- /families -->")


class Row(NamedTuple):
    """A row of the table.

    Attributes:
        checkpoints: that load, in the field's names.
        tests: files under `tests/models`.
        answers: of `benchmarks.known_answers`.
        oracle: whether transformers has the model, so that its own PyTorch class is compared with.
    """

    checkpoints: str
    tests: tuple[str, ...]
    answers: tuple[str, ...] = ()
    oracle: bool = True


ROWS = {
    "bert": Row(
        "BERT, SciBERT, BiomedBERT, LegalBERT, Bio_ClinicalBERT, MiniLM, CXR-BERT",
        ("test_bert", "test_token_heads"),
        ("minilm",),
    ),
    "electra": Row("ELECTRA", ("test_electra",)),
    "roberta": Row("RoBERTa, XLM-R, CodeBERT, CamemBERT", ("test_roberta",)),
    "distilbert": Row("DistilBERT", ("test_distilbert",)),
    "mpnet": Row("MPNet (all-mpnet-base-v2)", ("test_mpnet",), ("mpnet",)),
    "deberta": Row("DeBERTa v2, v3", ("test_deberta",)),
    "t5": Row("T5, T5 v1.1, Flan-T5, mT5, ByT5", ("test_t5",)),
    "gpt": Row("GPT-2, StarCoder (multi-query attention)", ("test_gpt",)),
    "llama": Row("LLaMA 1 to 3, SmolLM2", ("test_llama",), ("smollm2",)),
    "mistral": Row("Mistral", ("test_llama",)),
    "qwen": Row("Qwen2, Qwen3", ("test_llama",)),
    "starcoder": Row("StarCoder2", ("test_starcoder",)),
    "vit": Row("ViT, DeiT; timm's, big_vision's and DINO's files", ("test_vit",)),
    "dinov2": Row("DINOv2, with registers; RAD-DINO", ("test_dinov2",)),
    "mae": Row("MAE, encoder and decoder", ("test_mae",)),
    "satellite": Row("SatMAE, Prithvi-EO 1.0 and 2.0", ("test_satellite",), oracle=False),
    "sam": Row("SAM ViT-B, L, H", ("test_sam",)),
    "cellvit": Row("CellViT-256, CellViT-SAM", ("test_cellvit",), oracle=False),
    "resnet": Row("ResNet v1, v1.5; torchvision's and timm's files", ("test_resnet",)),
    "convnext": Row("ConvNeXt, ConvNeXt V2", ("test_convnext",)),
    "efficientnet": Row(
        "EfficientNet B0 to B7, Lite0 to Lite4", ("test_efficientnet",), ("efficientnet_lite0",)
    ),
    "swin": Row("Swin", ("test_swin",)),
    "clip": Row("CLIP, BioCLIP (open_clip's files)", ("test_clip",)),
    "siglip": Row("SigLIP", ("test_siglip",)),
    "medclip": Row("MedCLIP", ("test_medclip",), oracle=False),
    "biovil": Row("BioViL's image side", ("test_biovil",), oracle=False),
    "llava": Row("LLaVA 1.5", ("test_llava",)),
    "flamingo": Row("IDEFICS", ("test_flamingo",)),
    "open_flamingo": Row("OpenFlamingo on LLaMA", ("test_open_flamingo",), oracle=False),
    "wav2vec2": Row("wav2vec 2.0, HuBERT", ("test_wav2vec2",)),
    "whisper": Row("Whisper", ("test_whisper",), ("whisper_tiny_en", "whisper_base")),
    "mlp": Row("none: an MLP to train from scratch", ("test_mlp",), oracle=False),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=sorted(ROWS), default=list(ROWS))
    parser.add_argument("--report", help="what a run of the parity tests wrote; else they run")
    parser.add_argument("--json", help="file to which the rows are added")
    parser.add_argument("--write", help="a Markdown file; the table goes between its marks")
    options = parser.parse_args()
    found = []
    for name in options.only:
        measure.say(f"== {name}")
        found.append(shown(name, options.report))
        measure.emit(found[-1], options.json)
    headers = ("family", "model_type", "checkpoints", "shown")
    body = [(row["family"], ", ".join(row["model_types"]), row["checkpoints"], words(row))
            for row in found]  # fmt: skip
    table.show("What was shown of each family", headers, body, left=4)
    if options.write:
        _write(pathlib.Path(options.write), headers, body)
    if any(row["failed"] or row["answers_wrong"] for row in found):
        sys.exit("families: something that the table says did not hold")


def shown(name: str, report: str | None = None) -> dict[str, Any]:
    """Return the row of a family, from a report of tests, or from tests that run now."""
    row = ROWS[name]
    passed, failed = _run(row.tests) if report is None else counted(report, row.tests)
    answers = {answer: _answers(answer) for answer in row.answers}
    return {
        "benchmark": "families",
        "family": name,
        "model_types": [kind for kind, place in TABLE.items() if place.split(":")[0] == name],
        "checkpoints": row.checkpoints,
        "oracle": row.oracle,
        "passed": passed,
        "failed": failed,
        "answers_right": [answer for answer, right in answers.items() if right],
        "answers_wrong": [answer for answer, right in answers.items() if not right],
    }


def words(row: dict[str, Any]) -> str:
    """Return what a row shows, in words.

    >>> row = {"oracle": True, "passed": 9, "failed": 0, "answers_right": [], "answers_wrong": []}
    >>> words(row), words({**row, "oracle": False}), words({**row, "answers_right": ["minilm"]})
    ('parity', 'layout', 'parity, real weights')
    >>> words({**row, "failed": 2}), words({**row, "passed": 0})
    ('2 tests fail', 'trained from scratch here')
    """
    if row["failed"] or row["answers_wrong"]:
        return f"{row['failed'] + len(row['answers_wrong'])} tests fail"
    if not row["passed"]:
        return "trained from scratch here"
    kinds = ["parity" if row["oracle"] else "layout"]
    return ", ".join(kinds + (["real weights"] if row["answers_right"] else []))


def _run(names: Sequence[str]) -> tuple[int, int]:
    """Run the parity tests of these files; return how many pass and fail."""
    with tempfile.TemporaryDirectory() as folder:
        report = pathlib.Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "-m", "parity"]
        command += [f"tests/models/{name}.py" for name in names]
        subprocess.run(
            [*command, f"--junitxml={report}"],
            stdout=sys.stderr,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            check=False,
        )
        return counted(report, names) if report.exists() else (0, 1)


def counted(report: str | pathlib.Path, names: Sequence[str]) -> tuple[int, int]:
    """Return how many tests of these files passed and failed, by a JUnit report."""
    cases = [
        case
        for case in xml.etree.ElementTree.parse(report).getroot().iter("testcase")
        if any(part in names for part in case.get("classname", "").split("."))
    ]
    bad = sum(any(case.find(kind) is not None for kind in ("failure", "error")) for case in cases)
    skipped = sum(case.find("skipped") is not None for case in cases)
    return len(cases) - bad - skipped, bad


def _answers(name: str) -> bool:
    command = [sys.executable, "-m", "benchmarks.known_answers", name]
    return subprocess.run(command, stdout=sys.stderr, check=False).returncode == 0


def _write(path: pathlib.Path, headers: Sequence[str], body: Sequence[Sequence[str]]) -> None:
    text = path.read_text(encoding="utf-8")
    lines = [f"| {' | '.join(headers)} |", f"|{'---|' * len(headers)}"]
    lines += [f"| {' | '.join(row)} |" for row in body]
    place = re.compile(f"{re.escape(_MARKS[0])}.*?{re.escape(_MARKS[1])}", re.DOTALL)
    if not place.search(text):
        sys.exit(f"families: {path} has no place for the table: put {_MARKS[0]} and {_MARKS[1]}")
    made = "\n".join((_MARKS[0], *lines, _MARKS[1]))
    path.write_text(place.sub(lambda _: made, text), encoding="utf-8")


if __name__ == "__main__":
    main()
